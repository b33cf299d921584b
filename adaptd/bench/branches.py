"""What a verification would have scored behind its rejections, and an idle decoder beside the answer.

The accepted positions follow from the text (`adaptd.bench.verify`); which token was rejected, and what the draft said
behind it, do not. They are drawn here as decoding draws them, alternatives as an idle decoder draws them, and the target is
asked about all of them in one pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from adaptd.config import Config
from adaptd.decoding.alternatives import branches_of, draw_alternatives
from adaptd.decoding.recall import captured_probs
from adaptd.decoding.sampling import inverse_cdf
from adaptd.learning.batch import collate, draft_logits
from adaptd.learning.branches import Choice, reads_branches
from adaptd.learning.evaluate import Rule
from buffers.trace import Branches, Source, Trace
from policies.tail import captured_draws
from policies.warp import served_probs


class BranchScorer:
    """Adds branches to traces.

    Args:
      target: scores them.
      k: proposals a round.
      k_branch: target candidates kept behind each token.
      k_tail: draws of its other tokens there; 0: none.
      alternatives: other tokens at each position, as `adaptd.decoding.alternatives` draws them.
      rng: draws the tokens.
      wanted: which traces are to have them.
      rule: of the engine that serves: one that drafts greedily proposes its first choice at any temperature.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        *,
        k: int,
        k_branch: int,
        rng: np.random.Generator,
        k_tail: int = 0,
        alternatives: int = 0,
        wanted: Callable[[Trace], bool] = lambda _: True,
        rule: Rule = "rejection",
    ) -> None:
        self._target, self._rule, self._alternatives = target, rule, alternatives
        self._k, self._k_branch, self._k_tail, self._rng, self._wanted = k, k_branch, k_tail, rng, wanted

    @torch.inference_mode()
    def add(self, draft: PreTrainedModel, traces: Sequence[Trace], logits: Sequence[Tensor]) -> list[Trace]:
        """The traces, those that want branches with theirs.

        Args:
          draft: proposed.
          traces: with `source` and `rejected_at` as its proposals left them, all positions captured.
          logits: the draft's at each trace's positions, [R, V]. What is recalled is not mixed in.
        """
        at = [i for i, t in enumerate(traces) if self._wanted(t)]
        if not at:
            return list(traces)
        grown = self._grow(draft, [traces[i] for i in at], [logits[i] for i in at])
        if self._alternatives:
            grown = [self._with_alternatives(trace) for trace in grown]
        if not any(len(_branches(trace).tokens) for trace in grown):
            return list(traces)
        scored = _behind(self._target, grown).log_softmax(-1)
        best = scored.topk(min(self._k_branch, scored.shape[-1]), dim=-1)
        ids = best.indices.numpy(force=True).astype(np.uint32)
        logprobs = best.values.numpy(force=True).astype(np.float16)
        drawn = captured_draws(scored, best.indices, self._k_tail, self._rng)
        found, start = list(traces), 0
        for i, trace in zip(at, grown, strict=True):
            rows = slice(start, start + len(_branches(trace).tokens))
            start = rows.stop
            scores = dataclasses.replace(
                _branches(trace),
                topk_ids=ids[rows],
                topk_logprobs=logprobs[rows],
                tail_ids=None if drawn is None else drawn[rows],
            )
            found[i] = dataclasses.replace(trace, branches=scores)
        return found

    def _grow(self, draft: PreTrainedModel, traces: Sequence[Trace], logits: Sequence[Tensor]) -> list[Trace]:
        """Traces with the tokens of their branches, what the target says of them still empty."""
        lengths = [self._k - _accepted_before(t) for t in traces]
        first = [
            self._rejected(t, rows[t.rejected_at.astype(np.int64)]) for t, rows in zip(traces, logits, strict=True)
        ]
        branches = [[[token] for token in tokens] for tokens in first]
        for depth in range(1, self._k):
            if not any((n > depth).any() for n in lengths):
                break
            shown = [_with_tokens(t, b) for t, b in zip(traces, branches, strict=True)]
            behind = torch.split(_behind(draft, shown), [len(_branches(t).tokens) for t in shown])
            for trace, row, branch, n in zip(shown, behind, branches, lengths, strict=True):
                longer = np.flatnonzero(n > depth)
                ends = np.cumsum([len(b) for b in branch])[longer] - 1
                if self._greedy(trace):
                    drawn = row[ends].argmax(-1).numpy(force=True)
                else:
                    drawn = self._draw(served_probs(row[ends], trace.temperature, trace.top_k, trace.top_p))
                for b, token in zip(longer, drawn, strict=True):
                    branch[b].append(int(token))
        return [_with_tokens(t, b) for t, b in zip(traces, branches, strict=True)]

    def _with_alternatives(self, trace: Trace) -> Trace:
        at, tokens = draw_alternatives(trace, self._alternatives, self._rng)
        empty = np.zeros((len(at), 1))
        return trace.beside(branches_of(at, tokens, empty, empty))

    def _rejected(self, trace: Trace, logits: Tensor) -> list[int]:
        """The proposals that were rejected, [C]: drawn from max(0, q - p), as a rejection says that they were."""
        if self._greedy(trace):
            best: list[int] = logits.argmax(-1).tolist()
            return best
        q = served_probs(logits, trace.temperature, trace.top_k, trace.top_p)
        ids = torch.from_numpy(trace.topk_ids[trace.rejected_at].astype(np.int64)).to(q.device)
        p = torch.zeros_like(q).scatter_(1, ids, captured_probs(trace, q.device)[trace.rejected_at])
        left = (q - p).clamp_min(0)
        drawn: list[int] = self._draw(torch.where(left.sum(-1, keepdim=True) > 0, left, q)).tolist()
        return drawn

    def _greedy(self, trace: Trace) -> bool:
        return trace.temperature == 0 or self._rule == "greedy_draft"

    def _draw(self, mass: Tensor) -> NDArray[np.int64]:
        """A token of each row, in proportion to its mass [N, V]."""
        uniforms = torch.from_numpy(self._rng.random(len(mass), np.float32)).to(mass.device)
        drawn: NDArray[np.int64] = inverse_cdf(mass, uniforms).numpy(force=True)
        return drawn


def build_scorer(
    config: Config,
    target: PreTrainedModel,
    draft: PreTrainedModel,
    rng: np.random.Generator,
    *,
    wanted: Callable[[Trace], bool],
    rule: Rule = "rejection",
) -> BranchScorer | None:
    """A scorer as configured; None if nothing is to be learned from branches, or one of the models cannot read them."""
    k_branch = config.capture.k_branch
    if not k_branch or not config.learn.branch_weight or not (reads_branches(target) and reads_branches(draft)):
        return None
    return BranchScorer(
        target,
        k=config.engine.k,
        k_branch=k_branch,
        # As decoders do: what they draw is of the tokens that `k_top` leaves over.
        k_tail=config.capture.k_tail if k_branch == config.capture.k_top else 0,
        rng=rng,
        alternatives=config.capture.asked,
        wanted=wanted,
        rule=rule,
    )


def _accepted_before(trace: Trace) -> NDArray[np.int64]:
    """Proposals that were accepted in the round of each correction, [C]."""
    place = np.arange(trace.response_len)
    begins = np.maximum.accumulate(np.where(trace.source == Source.ACCEPTED, -1, place))
    before: NDArray[np.int64] = (
        trace.rejected_at.astype(np.int64) - np.concatenate(([-1], begins))[trace.rejected_at] - 1
    )
    return before


def _with_tokens(trace: Trace, branches: Sequence[Sequence[int]]) -> Trace:
    tokens = np.array([token for branch in branches for token in branch], np.uint32)
    rejected = trace.rejected.copy()
    rejected[trace.rejected_at] = [branch[0] for branch in branches]
    lens = np.array([len(branch) for branch in branches], np.uint8)
    empty = np.zeros((len(tokens), 1), np.uint32), np.zeros((len(tokens), 1), np.float16)
    return dataclasses.replace(trace, rejected=rejected, branches=Branches(trace.rejected_at, lens, tokens, *empty))


def _branches(trace: Trace) -> Branches:
    assert trace.branches is not None
    return trace.branches


def _behind(model: PreTrainedModel, traces: Sequence[Trace]) -> Tensor:
    """A model's logits behind each branch token, [U, V]."""
    longest = max(max(len(t.tokens), len(_branches(t).tokens)) for t in traces)
    batch = collate(traces, longest, next(model.parameters()).device, branches=Choice())
    return draft_logits(model, batch)[len(batch.row) :]
