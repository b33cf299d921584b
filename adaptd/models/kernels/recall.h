// What a recall knows of the next token of each row: `Recall.look` of policies/recall.py, of which this is a translation.
#pragma once

#include <c10/util/ArrayRef.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace adaptd {

// Latest matches of an echo that count; classes of observations and of certainty.
constexpr int64_t ECHOES = 8, COUNTS = 5, PEAKS = 4;

// Contexts in sets of `ways`, each with its key, its observations and its `width` most likely tokens.
struct RecallTable {
  const int64_t* key;
  const float* count;
  const int32_t* ids;
  const c10::Half* probs;
  int64_t sets, ways, width;
};

// A source's answer: `width` tokens with their probabilities. Returns its observations; 0: it knows nothing.
inline float recall_context(const RecallTable& table, int64_t key, int64_t* ids, float* probs) {
  const int64_t set = (key >> 20) & (table.sets - 1);
  int64_t way = 0;
  while (key && way < table.ways && table.key[set * table.ways + way] != key) ++way;
  const bool known = key && way < table.ways;
  const int64_t entry = set * table.ways + (known ? way : 0);
  float total = 0.0f;
  for (int64_t m = 0; m < table.width; ++m) {
    ids[m] = table.ids[entry * table.width + m];
    probs[m] = known ? static_cast<float>(table.probs[entry * table.width + m]) : 0.0f;
    total += probs[m];
  }
  for (int64_t m = 0; m < table.width; ++m) probs[m] /= std::max(total, 1e-9f);
  return known ? table.count[entry] : 0.0f;
}

// The same from what followed the last n of `length` tokens before.
inline float recall_echo(const int64_t* history, int64_t length, int64_t n, int64_t kept, int64_t width, int64_t* ids, float* probs) {
  std::fill_n(ids, width, 0);
  std::fill_n(probs, width, 0.0f);
  int64_t found = 0;
  for (int64_t at = length - 1; at >= n && found < kept; --at)
    if (std::equal(history + at - n, history + at, history + length - n)) ids[found++] = history[at];
  std::fill_n(probs, found, found ? 1.0f / static_cast<float>(found) : 0.0f);
  std::fill_n(ids + found, kept - found, history[0]);
  return static_cast<float>(found);
}

// Its class: 0 .. COUNTS * PEAKS - 1 by observations and by the largest probability.
inline int64_t recall_class(float count, float peak) {
  const int64_t seen = std::min<int64_t>(std::ilogb(std::max(count, 1.0f)), COUNTS - 1);
  return seen * PEAKS + std::min(static_cast<int64_t>(peak * PEAKS), PEAKS - 1);
}

// One row; ids and probs [sources, width], kinds [sources].
inline void recall_row(const RecallTable& table, const int64_t* history, int64_t size, int64_t length, c10::ArrayRef<int64_t> orders,
                       c10::ArrayRef<int64_t> echo, int64_t nothing, int64_t* ids, float* probs, int64_t* kinds) {
  const int64_t width = table.width;
  uint64_t mixed = 0;
  int64_t n = 0, source = 0;
  const auto put = [&](float count, float peak) {
    kinds[source] = count > 0.0f ? source * COUNTS * PEAKS + recall_class(count, peak) : nothing;
    ++source;
  };
  for (const int64_t order : orders) {  // in ascending order
    for (; n < order; ++n) {
      mixed = (mixed ^ static_cast<uint64_t>(history[std::max<int64_t>(length - 1 - n, 0)] + 1)) * 0x9E3779B97F4A7C15u;
      mixed ^= static_cast<uint64_t>(static_cast<int64_t>(mixed) >> 32);
    }
    const uint64_t key = length >= order ? (mixed * static_cast<uint64_t>(2 * order + 1)) | 1 : 0;
    float* mine = probs + source * width;
    const float count = recall_context(table, static_cast<int64_t>(key), ids + source * width, mine);
    put(count, *std::max_element(mine, mine + width));
  }
  for (const int64_t order : echo) {
    int64_t* tokens = ids + source * width;
    float* mine = probs + source * width;
    const float count = recall_echo(history, length, order, std::min({ECHOES, size, width}), width, tokens, mine);
    float peak = 0.0f;  // a token may be named several times
    for (int64_t a = 0; a < static_cast<int64_t>(count); ++a) {
      float share = 0.0f;
      for (int64_t b = 0; b < static_cast<int64_t>(count); ++b) share += tokens[a] == tokens[b] ? mine[b] : 0.0f;
      peak = std::max(peak, share);
    }
    put(count, peak);
  }
}

}  // namespace adaptd
