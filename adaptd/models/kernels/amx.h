// The product of a few bfloat16 rows with a stored weight in the matrix unit of processors that have AMX.
#pragma once

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <vector>

#include "product.h"

namespace adaptd {

#if defined(__AMX_BF16__) && defined(__linux__)

// Weights [16, 32] of a tile, two of them at a time.
constexpr int64_t AMX_OUT = 16, AMX_IN = 32, AMX_BLOCK = 2 * AMX_OUT;
// Values ahead of what is multiplied that are asked for.
constexpr int64_t AMX_AHEAD = 128;

// Whether the kernel lets this process use the tiles, which it has to be asked for.
inline bool amx_permitted() {
  static const bool permitted = syscall(SYS_arch_prctl, /* ARCH_REQ_XCOMP_PERM */ 0x1023, /* XFEATURE_XTILEDATA */ 18) == 0;
  return permitted;
}

inline bool amx_takes(int64_t rows, int64_t in) { return rows > 0 && in % AMX_IN == 0 && amx_permitted(); }

struct alignas(64) AmxConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// y [rows, out] = x w^T + bias; `out` a multiple of AMX_BLOCK, x as [chunks, in / 2, width, 2], chunks of `width` rows.
inline void amx_blocks(const c10::BFloat16* x, const c10::BFloat16* w, int64_t ldw, const float* bias, float* y, int64_t ldy,
                       int64_t rows, int64_t width, int64_t out, int64_t in) {
  AmxConfig before, mine;
  const uint16_t row_bytes = static_cast<uint16_t>(width * 4);
  for (int tile = 0; tile < 5; ++tile) {  // 0 and 1: sums, 2 and 3: weights, 4: x
    mine.rows[tile] = 16;
    mine.row_bytes[tile] = tile == 2 || tile == 3 ? AMX_IN * 2 : row_bytes;
  }
  // oneDNN remembers how it has set a thread's tiles and does not look: they are left as they were.
  _tile_storeconfig(&before);
  _tile_loadconfig(&mine);
  alignas(64) float found[AMX_BLOCK * 16];
  for (int64_t n = 0; n < out; n += AMX_BLOCK) {
    const c10::BFloat16* block = w + n * ldw;
    for (int64_t chunk = 0; chunk < rows; chunk += width) {
      const c10::BFloat16* part = x + chunk * in;
      _tile_zero(0);
      _tile_zero(1);
      for (int64_t k = 0; k < in; k += AMX_IN) {
        if (chunk == 0) {
          const int64_t ahead = k + AMX_AHEAD;
          const c10::BFloat16* next = block + (ahead < in ? ahead : AMX_BLOCK * ldw + ahead - in);
          for (int64_t i = 0; i < AMX_BLOCK; ++i) __builtin_prefetch(next + i * ldw);
        }
        _tile_loadd(4, part + k * width, row_bytes);
        _tile_loadd(2, block + k, ldw * 2);
        _tile_dpbf16ps(0, 2, 4);
        _tile_loadd(3, block + AMX_OUT * ldw + k, ldw * 2);
        _tile_dpbf16ps(1, 3, 4);
      }
      _tile_stored(0, found, row_bytes);
      _tile_stored(1, found + AMX_OUT * width, row_bytes);
      for (int64_t r = 0; r < std::min(width, rows - chunk); ++r)
        for (int64_t i = 0; i < AMX_BLOCK; ++i)
          y[(chunk + r) * ldy + n + i] = found[i * width + r] + (bias ? bias[n + i] : 0.0f);
    }
  }
  if (before.palette)
    _tile_loadconfig(&before);
  else
    _tile_release();
}

inline void amx_product(const c10::BFloat16* x, int64_t ldx, const c10::BFloat16* w, int64_t ldw, const float* bias, float* y,
                        int64_t ldy, int64_t rows, int64_t out, int64_t in) {
  const int64_t width = std::min<int64_t>(rows, 16);  // the last chunk is filled up with zeros
  std::vector<c10::BFloat16> pairs((rows + width - 1) / width * width * in);
  for (int64_t r = 0; r < rows; ++r) {
    c10::BFloat16* to = pairs.data() + r / width * width * in + r % width * 2;
    for (int64_t k = 0; k < in; ++k) to[k / 2 * width * 2 + k % 2] = x[r * ldx + k];
  }
  const int64_t blocks = out / AMX_BLOCK, done = blocks * AMX_BLOCK;
  const auto run = [&](int64_t first, int64_t last) {
    const int64_t n = first * AMX_BLOCK;
    amx_blocks(pairs.data(), w + n * ldw, ldw, bias ? bias + n : nullptr, y + n, ldy, rows, width, (last - first) * AMX_BLOCK, in);
  };
  if (rows * out * in < WORTH_A_THREAD)
    run(0, blocks);
  else
    at::parallel_for(0, blocks, 1, run);
  product_of<false>(x, ldx, w + done * ldw, ldw, bias ? bias + done : nullptr, y + done, ldy, rows, out - done, in);
}

#else

inline bool amx_takes(int64_t, int64_t) { return false; }
inline void amx_product(const c10::BFloat16*, int64_t, const c10::BFloat16*, int64_t, const float*, float*, int64_t, int64_t,
                        int64_t, int64_t) {}

#endif

}  // namespace adaptd
