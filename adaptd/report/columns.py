"""What the columns of the time series mean, and how requests and traces become counts.

requests, emitted, rounds, proposed, accepted; judged and accepted by bin of target entropy; judged and rejected by token
group; reached and accepted by depth. The depths come last: a row ends where its counts do.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from adaptd.report.monitor import Finished
from adaptd.report.token_groups import TokenGroups
from buffers.series import Counts
from buffers.trace import Source, Trace

FloatArray = NDArray[np.float64]

#: Edges of the entropy bins, in nats; the last bin has no end.
EDGES: Final = (0.0, 0.1, 0.5, 1.0, 2.0, 3.0)
#: Token groups that have a place: the built-in ones and three of one's own.
MAX_GROUPS: Final = 10
#: Depths told apart.
MAX_DEPTH: Final = 16
_HEAD: Final = 5
_ENTROPY: Final = slice(_HEAD, _HEAD + 2 * len(EDGES))
GROUPS: Final = slice(_ENTROPY.stop, _ENTROPY.stop + 2 * MAX_GROUPS)
_DEPTH: Final = slice(GROUPS.stop, GROUPS.stop + 2 * MAX_DEPTH)
WIDTH: Final = _DEPTH.stop


def request_counts(item: Finished) -> Counts:
    """[WIDTH] of one finished request."""
    counts = np.zeros(WIDTH, np.int64)
    counts[:_HEAD] = 1, item.emitted, item.rounds, item.proposed, item.accepted
    depths = counts[_DEPTH].reshape(-1, 2)
    for column, values in enumerate((item.reached_at, item.accepted_at)):
        depths[: len(values), column] = values[:MAX_DEPTH]
    return counts


def trace_counts(trace: Trace, groups: TokenGroups | None) -> Counts:
    """[WIDTH] of the positions of a trace at which a proposal was judged, by entropy of the target and by token group.

    The token is the one that the target emitted: at a correction the one that the draft should have proposed.
    """
    counts = np.zeros(WIDTH, np.int64)
    source = trace.source
    judged = (source == Source.ACCEPTED) | (source == Source.CORRECTION)
    accepted = source == Source.ACCEPTED
    if len(trace.topk_ids) == trace.response_len:  # with rejections alone nothing is known of the accepted positions
        bins = np.digitize(entropy(trace.topk_logprobs.astype(np.float64)), EDGES) - 1
        table = counts[_ENTROPY].reshape(-1, 2)
        np.add.at(table[:, 0], bins[judged], 1)
        np.add.at(table[:, 1], bins[accepted], 1)
    if groups is not None:
        where = groups.of(trace.response)
        table = counts[GROUPS].reshape(-1, 2)
        np.add.at(table[:, 0], where[judged], 1)
        np.add.at(table[:, 1], where[source == Source.CORRECTION], 1)
    return counts


def entropy(logprobs: FloatArray) -> FloatArray:
    """[R] entropy in nats of the top K plus one tail bucket, a lower bound of the whole one (design section 5).

    What `policies.divergence.entropy` is for a learner, without torch.

    Args:
      logprobs: [R, K] nats.
    """
    p = np.exp(logprobs)
    tail = np.maximum(1e-12, 1.0 - p.sum(1))
    found: FloatArray = np.maximum(0.0, -(p * logprobs).sum(1) - tail * np.log(tail))
    return found


def widened(counts: Counts) -> Counts:
    """[..., WIDTH] of rows that end where their counts do."""
    wide = np.zeros((*counts.shape[:-1], WIDTH), np.int64)
    n = min(WIDTH, counts.shape[-1])
    wide[..., :n] = counts[..., :n]
    return wide


def ratio(numerator: float, denominator: float) -> float | None:
    """A share, None without a denominator."""
    return float(numerator / denominator) if denominator else None


def summary(counts: Counts, groups: tuple[str, ...]) -> dict[str, Any]:
    """Metrics of design section 3 from summed counts [WIDTH]; a ratio without a denominator is None.

    `by_entropy` and `by_group` count a sample of the traffic, the traces looked at.
    """
    requests, emitted, rounds, proposed, accepted = (int(v) for v in counts[:_HEAD])
    depths = counts[_DEPTH].reshape(-1, 2)
    entropies, tokens = counts[_ENTROPY].reshape(-1, 2), counts[GROUPS].reshape(-1, 2)
    return {
        "requests": requests,
        "tokens": emitted,
        "rounds": rounds,
        "mal": ratio(emitted, rounds),
        "token_acceptance": ratio(accepted, proposed),
        "by_depth": [
            {"reached": int(r), "accepted": int(a), "acceptance": ratio(a, r)} for r, a in depths[depths[:, 0] > 0]
        ],
        "by_entropy": [
            {
                "from": low,
                "to": EDGES[i + 1] if i + 1 < len(EDGES) else None,
                "judged": int(entropies[i, 0]),
                "accepted": int(entropies[i, 1]),
                "acceptance": ratio(entropies[i, 1], entropies[i, 0]),
            }
            for i, low in enumerate(EDGES)
        ],
        "by_group": {
            name: {"judged": int(judged), "rejected": int(rejected), "rate": ratio(rejected, judged)}
            for name, (judged, rejected) in zip(groups, tokens, strict=False)
        },
    }
