// Products of a handful of rows with a weight as it is stored, [out, in]: the weight is read once, as fast as memory gives it.
// A row's result does not depend on the rows beside it: each is summed in the same order.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "vector.h"

namespace adaptd {

// Rows above which a library's product, which blocks for the caches, is faster.
constexpr int64_t FEW_ROWS = 96;
// The same in bfloat16, where libraries have the processor's own products of it.
constexpr int64_t FEW_BFLOAT_ROWS = 16;
// Bytes ahead of what is multiplied that are asked for: without, memory gives two thirds of what it could.
constexpr int64_t AHEAD = 1024;
// Multiplications that are worth a second thread.
constexpr int64_t WORTH_A_THREAD = 1 << 17;

// How STEP values of x and of w are read and multiplied into the lanes of a sum.
template <class X, class W>
struct Dot {
  static constexpr int64_t STEP = LANES;
  using Read = Vec;
  template <class V>
  static Read read(const V* from) { return load(from); }
  template <class V>
  static Read read_part(const V* from, int64_t n) { return load_part(from, n); }
  static void add(Vec& sum, Read a, Read b) { sum += a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Dot<c10::BFloat16, c10::BFloat16> {
  static constexpr int64_t STEP = 2 * LANES;
  using Read = __m512bh;
  static Read read(const c10::BFloat16* from) {
    Read found;
    std::memcpy(&found, from, sizeof(Read));
    return found;
  }
  static Read read_part(const c10::BFloat16* from, int64_t n) {
    c10::BFloat16 part[STEP] = {};
    std::memcpy(part, from, n * sizeof(*from));
    return read(part);
  }
  static void add(Vec& sum, Read a, Read b) { sum = as<Vec>(_mm512_dpbf16_ps(as<__m512>(sum), a, b)); }
};
#endif

// ASK: whether these rows of w are read for the first time, so that what follows them is to be asked for.
template <int OUT, int ROWS, bool ADD, bool ASK, class X, class W>
inline void tile(const X* x, int64_t ldx, const W* w, int64_t ldw, const float* bias, float* y, int64_t ldy, int64_t in) {
  using D = Dot<X, W>;
  constexpr int64_t ahead = AHEAD / sizeof(W);
  Vec found[OUT][ROWS] = {};
  int64_t k = 0;
  for (; k + D::STEP <= in; k += D::STEP) {
    typename D::Read a[ROWS];
    for (int r = 0; r < ROWS; ++r) a[r] = D::read(x + r * ldx + k);
    // What follows the end of these rows of w is the start of the next OUT, which a prefetcher of the processor does not guess.
    const int64_t next = k + ahead < in ? k + ahead : OUT * ldw + k + ahead - in;
    for (int n = 0; n < OUT; ++n) {
      const auto b = D::read(w + n * ldw + k);
      if constexpr (ASK) __builtin_prefetch(w + n * ldw + next);
      for (int r = 0; r < ROWS; ++r) D::add(found[n][r], a[r], b);
    }
  }
  if (k < in)
    for (int n = 0; n < OUT; ++n)
      for (int r = 0; r < ROWS; ++r)
        D::add(found[n][r], D::read_part(x + r * ldx + k, in - k), D::read_part(w + n * ldw + k, in - k));
  for (int n = 0; n < OUT; ++n)
    for (int r = 0; r < ROWS; ++r) {
      const float value = sum(found[n][r]) + (bias ? bias[n] : 0.0f);
      y[r * ldy + n] = ADD ? y[r * ldy + n] + value : value;
    }
}

template <int OUT, bool ADD, bool ASK, class X, class W>
inline void last_rows(const X* x, int64_t ldx, const W* w, int64_t ldw, const float* bias, float* y, int64_t ldy, int64_t rows,
                      int64_t in) {
  switch (rows) {
    case 4: return tile<OUT, 4, ADD, ASK>(x, ldx, w, ldw, bias, y, ldy, in);
    case 3: return tile<OUT, 3, ADD, ASK>(x, ldx, w, ldw, bias, y, ldy, in);
    case 2: return tile<OUT, 2, ADD, ASK>(x, ldx, w, ldw, bias, y, ldy, in);
    case 1: return tile<OUT, 1, ADD, ASK>(x, ldx, w, ldw, bias, y, ldy, in);
  }
}

template <int OUT, bool ADD, class X, class W>
inline void rows_of(const X* x, int64_t ldx, const W* w, int64_t ldw, const float* bias, float* y, int64_t ldy, int64_t rows,
                    int64_t in) {
  if (rows < TILE_ROWS) return last_rows<OUT, ADD, true>(x, ldx, w, ldw, bias, y, ldy, rows, in);
  tile<OUT, TILE_ROWS, ADD, true>(x, ldx, w, ldw, bias, y, ldy, in);
  int64_t r = TILE_ROWS;
  for (; r + TILE_ROWS <= rows; r += TILE_ROWS)
    tile<OUT, TILE_ROWS, ADD, false>(x + r * ldx, ldx, w, ldw, bias, y + r * ldy, ldy, in);
  last_rows<OUT, ADD, false>(x + r * ldx, ldx, w, ldw, bias, y + r * ldy, ldy, rows - r, in);
}

// y [rows, out] = x [rows, in] w^T + bias, or added to y; by one thread.
template <bool ADD, class X, class W>
inline void product_of(const X* x, int64_t ldx, const W* w, int64_t ldw, const float* bias, float* y, int64_t ldy,
                       int64_t rows, int64_t out, int64_t in) {
  int64_t n = 0;
  for (; n + TILE_OUT <= out; n += TILE_OUT)
    rows_of<TILE_OUT, ADD>(x, ldx, w + n * ldw, ldw, bias ? bias + n : nullptr, y + n, ldy, rows, in);
  for (; n < out; ++n) rows_of<1, ADD>(x, ldx, w + n * ldw, ldw, bias ? bias + n : nullptr, y + n, ldy, rows, in);
}

template <bool ADD = false, class X, class W>
inline void product(const X* x, int64_t ldx, const W* w, int64_t ldw, const float* bias, float* y, int64_t ldy,
                    int64_t rows, int64_t out, int64_t in) {
  if (rows * out * in < WORTH_A_THREAD) return product_of<ADD>(x, ldx, w, ldw, bias, y, ldy, rows, out, in);
  const int64_t tiles = (out + TILE_OUT - 1) / TILE_OUT;
  at::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    const int64_t n = first * TILE_OUT, end = std::min(last * TILE_OUT, out);
    product_of<ADD>(x, ldx, w + n * ldw, ldw, bias ? bias + n : nullptr, y + n, ldy, rows, end - n, in);
  });
}

}  // namespace adaptd
