// A round as the words that adaptd/decoding/capture.py packs, [batch, width]; see `RoundPacker._layout` for their order.
#pragma once

#include <bit>

#include "likely.h"

namespace adaptd {

struct Sizes {
  int64_t k, vocab, draft_vocab;       // proposals of this round; of the logits
  int64_t k_top, k_tail, k_draft;      // kept
  bool everywhere;                     // at all positions, or at the rejected one alone
  int64_t judged() const { return everywhere ? k + 1 : 1; }
  int64_t believed() const { return k ? k_draft : 0; }
  int64_t width() const { return (k + 1) + 1 + k + (k + 1) + k + judged() * (2 * k_top + k_tail) + 2 * believed(); }
};

// What was played, by batch row: tokens [k + 1], accepted, proposals [k]; logits [k + 1, vocab] of the target and [k, draft_vocab]
// of the draft; p [k + 1, vocab] where rows are sampled, `greedy` of each; offsets [k + 1] for the draws.
struct Played {
  const int64_t *tokens, *accepted, *proposals;
  const float *target, *draft, *p, *offsets;
  const bool* greedy;
};

inline void words_of(const Sizes& s, const Played& played, int64_t b, int32_t* words) {
  const int64_t k = s.k, at = std::min(played.accepted[b], std::max<int64_t>(k - 1, 0));
  const int64_t* tokens = played.tokens + b * (k + 1);
  std::vector<int32_t> ids(std::max(s.k_top, s.k_draft)), tail(s.k_tail);
  std::vector<float> logprobs(ids.size());
  float mass;
  int32_t* next = words;
  const auto place = [&](int64_t n) { return std::exchange(next, next + n); };
  int32_t *token = place(k + 1), *accepted = place(1), *proposals = place(k), *served = place(k + 1), *proposed = place(k);
  int32_t *top_ids = place(s.judged() * s.k_top), *top_logprobs = place(s.judged() * s.k_top);
  int32_t *tails = place(s.judged() * s.k_tail), *draft_ids = place(s.believed()), *draft_logprobs = place(s.believed());
  *accepted = static_cast<int32_t>(played.accepted[b]);
  for (int64_t i = 0; i <= k; ++i) {
    const int64_t row = b * (k + 1) + i;
    const float* logits = played.target + row * s.vocab;
    token[i] = static_cast<int32_t>(tokens[i]);
    likely(logits, s.vocab, s.k_top, ids.data(), logprobs.data(), &mass, s.k_tail, played.offsets ? played.offsets[row] : 0.0f,
           tail.data());
    const bool warped = played.p && !played.greedy[b];
    served[i] = std::bit_cast<int32_t>(warped ? std::log(played.p[row * s.vocab + tokens[i]]) : logits[tokens[i]] - mass);
    if (!s.everywhere && i != at) continue;
    const int64_t to = s.everywhere ? i : 0;
    std::memcpy(top_ids + to * s.k_top, ids.data(), s.k_top * sizeof(int32_t));
    std::memcpy(top_logprobs + to * s.k_top, logprobs.data(), s.k_top * sizeof(int32_t));
    std::memcpy(tails + to * s.k_tail, tail.data(), s.k_tail * sizeof(int32_t));
  }
  for (int64_t i = 0; i < k; ++i) {
    const float* logits = played.draft + (b * k + i) * s.draft_vocab;
    proposals[i] = static_cast<int32_t>(played.proposals[b * k + i]);
    likely(logits, s.draft_vocab, s.k_draft, ids.data(), logprobs.data(), &mass, 0, 0.0f, nullptr);
    proposed[i] = std::bit_cast<int32_t>(logits[tokens[i]] - mass);
    if (i != at) continue;
    std::memcpy(draft_ids, ids.data(), s.k_draft * sizeof(int32_t));
    std::memcpy(draft_logprobs, logprobs.data(), s.k_draft * sizeof(int32_t));
  }
}

}  // namespace adaptd
