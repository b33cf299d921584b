// Vectors of the compiler, which lowers them to what the processor has. Between products bfloat16 is computed in float32.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace adaptd {

#if defined(__AVX512F__)
constexpr int LANES = 16;
// Accumulators of a tile of a product, TILE_OUT x TILE_ROWS, and its operands fit the registers.
constexpr int TILE_OUT = 5, TILE_ROWS = 5;
#elif defined(__AVX2__)
constexpr int LANES = 8;
constexpr int TILE_OUT = 2, TILE_ROWS = 5;
#else
constexpr int LANES = 4;
constexpr int TILE_OUT = 4, TILE_ROWS = 5;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Int __attribute__((vector_size(LANES * 4)));
typedef uint32_t Word __attribute__((vector_size(LANES * 4)));
typedef uint16_t Half __attribute__((vector_size(LANES * 2)));

template <class To, class From>
inline To as(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To found;
  std::memcpy(&found, &value, sizeof(To));
  return found;
}

inline Vec load(const float* from) {
  Vec found;
  std::memcpy(&found, from, sizeof(Vec));
  return found;
}

inline Vec load(const c10::BFloat16* from) {
  Half half;
  std::memcpy(&half, from, sizeof(Half));
  return as<Vec>(__builtin_convertvector(half, Word) << 16);
}

inline void store(float* to, Vec value) { std::memcpy(to, &value, sizeof(Vec)); }

inline void store(c10::BFloat16* to, Vec value) {
  const Word word = as<Word>(value);
  const Half half = __builtin_convertvector((word + 0x7fff + ((word >> 16) & 1)) >> 16, Half);  // to nearest, ties to even
  std::memcpy(to, &half, sizeof(Half));
}

inline float sum(Vec value) {
  float lanes[LANES];
  std::memcpy(lanes, &value, sizeof(Vec));
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

inline float largest(Vec value) {
  float found = value[0];
  for (int i = 1; i < LANES; ++i) found = value[i] > found ? value[i] : found;
  return found;
}

// e^x within 2 units in the last place, for x from -87 to 88; what is beyond counts as its end.
inline Vec exponential(Vec x) {
  x = x < -87.0f ? Vec{} - 87.0f : x;
  x = x > 88.0f ? Vec{} + 88.0f : x;
  const Vec halves = x * 1.44269504f;
  const Int n = __builtin_convertvector(halves + (halves < 0.0f ? Vec{} - 0.5f : Vec{} + 0.5f), Int);
  const Vec whole = __builtin_convertvector(n, Vec);
  const Vec r = (x - whole * 0.693359375f) - whole * -2.12194440e-4f;
  Vec p = Vec{} + 1.98756915e-4f;  // the minimax polynomial of Cephes' expf
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345205e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666654e-1f;
  p = p * r + 5.00000012e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * as<Vec>((n + 127) << 23);
}

// Fewer values than a vector has: the rest are zeros, and are not written.
template <class T>
inline Vec load_part(const T* from, int64_t n) {
  T part[LANES] = {};
  std::memcpy(part, from, n * sizeof(T));
  return load(part);
}

template <class T>
inline void store_part(T* to, Vec value, int64_t n) {
  T part[LANES];
  store(part, value);
  std::memcpy(to, part, n * sizeof(T));
}

}  // namespace adaptd
