// What a trace keeps of a row of logits.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "vector.h"

namespace adaptd {

// The k most likely of n tokens with their log-probabilities, descending, the lower id first where two are alike; the logarithm
// of the logits' mass; and `drawn` tokens of the rest, as policies/tail.py draws them with that offset.
inline void likely(const float* logits, int64_t n, int64_t k, int32_t* ids, float* logprobs, float* mass, int64_t drawn,
                   float offset, int32_t* tail) {
  using Found = std::pair<float, int32_t>;
  const auto better = [](const Found& a, const Found& b) { return a.first != b.first ? a.first > b.first : a.second < b.second; };
  thread_local std::vector<Found> best;
  best.clear();
  for (int64_t i = 0; i < k; ++i) best.emplace_back(logits[i], static_cast<int32_t>(i));
  std::make_heap(best.begin(), best.end(), better);  // the worst of them in front
  for (int64_t i = k; i < n; ++i) {
    if (!(logits[i] > best.front().first)) continue;
    std::pop_heap(best.begin(), best.end(), better);
    best.back() = {logits[i], static_cast<int32_t>(i)};
    std::push_heap(best.begin(), best.end(), better);
  }
  std::sort_heap(best.begin(), best.end(), better);

  const float top = best.front().first;
  thread_local std::vector<float> weights;
  weights.resize(n + LANES);
  Vec total = {};
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    const Vec weight = exponential(load(logits + i) - top);
    store(weights.data() + i, weight);
    total += weight;
  }
  double whole = sum(total);
  if (i < n) {
    store(weights.data() + i, exponential(load_part(logits + i, n - i) - top));
    for (; i < n; ++i) whole += weights[i];
  }
  *mass = top + static_cast<float>(std::log(whole));
  for (int64_t j = 0; j < k; ++j) {
    ids[j] = best[j].second;
    logprobs[j] = best[j].first - *mass;
  }
  if (!drawn) return;
  for (const Found& found : best) weights[found.second] = 0.0f;
  double rest = 0.0;
  for (i = 0; i < n; ++i) rest += weights[i];
  double passed = 0.0;
  i = 0;
  for (int64_t j = 0; j < drawn; ++j) {
    const double mark = (static_cast<double>(j) + offset) / drawn * rest;
    while (i < n && passed + weights[i] <= mark) passed += weights[i++];
    tail[j] = static_cast<int32_t>(std::min(i, n - 1));
  }
}

}  // namespace adaptd
