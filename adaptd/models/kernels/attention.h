// What stands between the products of a layer, on activations of T (float or bfloat16), computed in float32.
#pragma once

#include <ATen/Parallel.h>

#include <cmath>
#include <vector>

#include "product.h"

namespace adaptd {

// y = x / sqrt(mean(x^2) + eps) * weight, over n values.
template <class T, class Y>
inline void norm(const T* x, const T* weight, Y* y, int64_t n, float eps) {
  Vec squares = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Vec v = load(x + i);
    squares += v * v;
  }
  if (i < n) {
    const Vec v = load_part(x + i, n - i);
    squares += v * v;
  }
  const float scale = 1.0f / std::sqrt(sum(squares) / n + eps);
  for (i = 0; i + LANES <= n; i += LANES) store(y + i, load(x + i) * scale * load(weight + i));
  if (i < n) store_part(y + i, load_part(x + i, n - i) * scale * load_part(weight + i, n - i), n - i);
}

// x += addition, over n values.
template <class T>
inline void add(T* x, const T* addition, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(x + i, load(x + i) + load(addition + i));
  if (i < n) store_part(x + i, load_part(x + i, n - i) + load_part(addition + i, n - i), n - i);
}

// y = x sigmoid(x) times, over n values.
template <class T>
inline void gated(const T* x, const T* times, float scale, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += LANES) {
    const int64_t part = n - i;
    const Vec v = part < LANES ? load_part(x + i, part) : load(x + i);
    const Vec u = part < LANES ? load_part(times + i, part) : load(times + i);
    const Vec found = v / (1.0f + exponential(-v)) * u * scale;
    part < LANES ? store_part(y + i, found, part) : store(y + i, found);
  }
}

// One head of one position: normed where there is a weight, turned by its position, into y.
template <class T, class Y>
inline void turned(const T* x, const T* weight, float eps, const float* cos, const float* sin, float scale, Y* y, int64_t dim) {
  float values[1024];
  if (weight) {
    norm(x, weight, values, dim, eps);
  } else {
    for (int64_t i = 0; i < dim; ++i) values[i] = static_cast<float>(x[i]);
  }
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    y[i] = static_cast<Y>((values[i] * cos[i] + values[i + half] * sin[i]) * scale);
    y[i + half] = static_cast<Y>((values[i + half] * cos[i + half] + values[i] * sin[i + half]) * scale);
  }
}

// Queries [m, dim] of one row that share keys and values [seen, dim]; mask [m, length]. Into out, one pointer a query.
template <class T>
inline void attend(const float* queries, int64_t m, const T* keys, const T* values, const T* const* masks, int64_t seen,
                   int64_t dim, T* const* out) {
  // Filled up to whole vectors: where a row ends, which depends on the queries beside it, then changes no sum.
  const int64_t padded = (seen + LANES - 1) / LANES * LANES;
  thread_local std::vector<float> scores;
  scores.resize(m * padded);
  product_of<false>(queries, dim, keys, dim, nullptr, scores.data(), padded, m, seen, dim);
  for (int64_t q = 0; q < m; ++q) {
    float* row = scores.data() + q * padded;
    const T* mask = masks[q];
    Vec most = Vec{} - INFINITY;
    for (int64_t i = 0; i < padded; i += LANES) {
      const int64_t part = seen - i;
      const Vec v = load(row + i) + (part < LANES ? load_part(mask + i, part) : load(mask + i));
      store(row + i, v);
      if (part < LANES) std::fill(row + seen, row + padded, -INFINITY);
      const Vec there = load(row + i);
      most = there > most ? there : most;
    }
    const float top = largest(most);
    Vec total = {};
    for (int64_t i = 0; i < padded; i += LANES) {
      const Vec v = exponential(load(row + i) - top);
      store(row + i, v);
      total += v;
    }
    const float scale = 1.0f / sum(total);
    for (int64_t i = 0; i < padded; i += LANES) store(row + i, load(row + i) * scale);
  }
  for (int64_t first = 0; first < m; first += TILE_ROWS) {
    const int64_t some = std::min<int64_t>(TILE_ROWS, m - first);
    const float* row = scores.data() + first * padded;
    for (int64_t d = 0; d < dim; d += LANES) {
      const int64_t part = std::min<int64_t>(LANES, dim - d);
      Vec found[TILE_ROWS] = {};
      for (int64_t i = 0; i < seen; ++i) {
        const Vec v = part < LANES ? load_part(values + i * dim + d, part) : load(values + i * dim + d);
        for (int64_t r = 0; r < some; ++r) found[r] += row[r * padded + i] * v;
      }
      for (int64_t r = 0; r < some; ++r)
        part < LANES ? store_part(out[first + r] + d, found[r], part) : store(out[first + r] + d, found[r]);
    }
  }
}

}  // namespace adaptd
