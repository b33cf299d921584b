"""Acceptance of a draft along a given text, exactly and without decoding: one teacher-forced pass is enough.

Given that the engine emitted token x, the draft's proposal there (if it got to make one) was accepted with a
probability that depends on the rule, and independently of all other positions:

    rejection      min(1, q(x) / p(x))     P(proposed x and accepted) = min(p, q), P(emitted x) = p
    greedy_draft   1 if x = argmax q       the residual after a rejection excludes argmax q
    temperature 0  1 if x = argmax q       x is argmax p

(The first after Leviathan et al. 2023, section 2.3.) Rounds along the text are then a renewal process. Let
S_t(i) = accept[t] ... accept[t+i-1]. A round that starts at t accepts exactly a < k tokens with probability
S_t(a) - S_t(a+1) and all k with S_t(k), and the next round starts at t + a + 1: the round emits the accepted prefix
and one more token (a correction, or the bonus). So u_t, the probability that a round starts at t, follows from u_0 = 1
by one pass over the text, and every count below is a sum over u.
Exact given the text: no simulation, no assumption that acceptance is constant.

Edge: the decoder stops at the text's end R (end of sequence or the length limit). A round that would run past R counts
as one round; only depths at positions below R count as reached, proposed or accepted, as what lies beyond is not known;
`emitted` is R. A round cut that way can miss its last token, so emitted / rounds is at most, and for short texts
slightly below, 1 + accepted / rounds; it cannot be a full block unless all its k positions lie below R.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

#: Float64 elements that one batch of `acceptance_profiles` may hold per working array (8 MiB).
BATCH_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Profile:
    """Expected counts along one text. Depth is 0-based: `accepted_at[0]` counts accepted first proposals."""

    #: Tokens of the text, R.
    emitted: float
    #: Rounds, the last one included even where the end of the text cuts it.
    rounds: float
    #: Proposals accepted, at positions below R.
    accepted: float
    #: Proposals at positions below R.
    proposed: float
    #: [k] rounds in which depth i was judged: all i proposals before it were accepted.
    reached: tuple[float, ...]
    #: [k] rounds in which the proposal at depth i was accepted; at most `reached`.
    accepted_at: tuple[float, ...]
    #: Rounds with all k accepted.
    full_blocks: float


def accept_probability(q_logprob: npt.ArrayLike, p_logprob: npt.ArrayLike) -> FloatArray:
    """min(1, q / p) of each emitted token: acceptance given the token, under rejection sampling.

    Args:
      q_logprob, p_logprob: [R] nats, of the emitted tokens under the *served* draft and target (after temperature,
        top-p, top-k). q of -inf (the draft would not propose it) gives 0.

    Returns: [R] within [0, 1].
    Raises: ValueError: shapes differ, NaN (unknown), or p of -inf (the target cannot have emitted that token).
    """
    q = np.asarray(q_logprob, dtype=np.float64)
    p = np.asarray(p_logprob, dtype=np.float64)
    if q.shape != p.shape:
        raise ValueError(f"q_logprob {q.shape} and p_logprob {p.shape} must have one shape")
    unknown = int(np.isnan(q).sum() + np.isnan(p).sum())
    if unknown:
        raise ValueError(f"log-probabilities ({unknown} NaN) must be known; leave such positions or traces out")
    if np.isneginf(p).any():
        raise ValueError("p_logprob (-inf) must be finite: the target cannot have emitted a token of probability 0")
    result: FloatArray = np.exp(np.minimum(0.0, q - p))
    return result


def expected_rounds(accept: npt.ArrayLike, k: int) -> float:
    """Expected number of rounds in which a decoder with k proposals emits this text.

    Args:
      accept: [R] acceptance probability at each position, if proposed there.
      k: proposals per round, at least 1.

    Returns: within [R / (k+1), R]; 0 for an empty text.
    Raises: ValueError: accept outside [0, 1] or not one-dimensional, k below 1.
    """
    return acceptance_profile(accept, k).rounds


def acceptance_profile(accept: npt.ArrayLike, k: int) -> Profile:
    """Expected counts along one text; see the module for the recursion and its edge.

    Args:
      accept: [R] acceptance probability at each position; 0 or 1 at temperature 0.
      k: proposals per round, at least 1.

    Raises: ValueError: accept outside [0, 1] or not one-dimensional, k below 1.
    """
    return acceptance_profiles([np.asarray(accept, dtype=np.float64)], k)[0]


def acceptance_profiles(accepts: Sequence[npt.ArrayLike], k: int) -> list[Profile]:
    """`acceptance_profile` of many texts at once: the recursion steps through all of them together.

    Args:
      accepts: N arrays, each [R_n].
      k: proposals per round, at least 1.

    Returns: N profiles, in order.
    Raises: ValueError: an array outside [0, 1] or not one-dimensional, k below 1.
    """
    if k < 1:
        raise ValueError(f"k ({k}) must be at least 1")
    rows = [_checked(accept) for accept in accepts]
    profiles: list[Profile | None] = [None] * len(rows)
    for group in _groups_of_similar_length(rows, k):
        for index, profile in zip(group, _profiles_of_group([rows[i] for i in group], k), strict=True):
            profiles[index] = profile
    return [profile for profile in profiles if profile is not None]


def mal(profiles: Iterable[Profile]) -> float:
    """Mean acceptance length: emitted tokens / rounds over all texts (ratio of sums, bonus included).

    Returns: within [1, k+1].
    Raises: ValueError: no rounds.
    """
    listed = list(profiles)
    rounds = sum(profile.rounds for profile in listed)
    if rounds <= 0.0:
        raise ValueError("profiles (0 rounds) must hold at least one token; there is nothing to average")
    return sum(profile.emitted for profile in listed) / rounds


def _checked(accept: npt.ArrayLike) -> FloatArray:
    row = np.asarray(accept, dtype=np.float64)
    if row.ndim != 1:
        raise ValueError(f"accept {row.shape} must be one-dimensional")
    # Written so that NaN fails too.
    if row.size and not (row.min() >= 0.0 and row.max() <= 1.0):
        raise ValueError(f"accept (from {row.min()} to {row.max()}) must lie within [0, 1]")
    return row


def _groups_of_similar_length(rows: Sequence[FloatArray], k: int) -> Iterator[list[int]]:
    """Indices in groups of which each fits `BATCH_ELEMENTS` after padding to its longest; at least one a group."""
    order = sorted(range(len(rows)), key=lambda index: rows[index].size)
    group: list[int] = []
    for index in order:
        # Ascending lengths: this row is the longest of its group so far.
        if group and (len(group) + 1) * (rows[index].size + k) * (k + 1) > BATCH_ELEMENTS:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _profiles_of_group(rows: Sequence[FloatArray], k: int) -> list[Profile]:
    lengths = np.array([row.size for row in rows], dtype=np.int64)
    longest = int(lengths.max())
    accept = np.zeros((len(rows), longest + k))
    for index, row in enumerate(rows):
        accept[index, : row.size] = row
    # survive[n, t, i]: all of the i proposals at t .. t+i-1 accepted.
    survive = np.ones((len(rows), longest, k + 1))
    for i in range(k):
        survive[:, :, i + 1] = survive[:, :, i] * accept[:, i : i + longest]
    advance = survive.copy()
    advance[:, :, :k] -= survive[:, :, 1:]
    starts = np.zeros((len(rows), longest + k + 1))
    starts[:, 0] = 1.0
    for t in range(longest):
        starts[:, t + 1 : t + k + 2] += starts[:, t : t + 1] * advance[:, t]
    position = np.arange(longest)
    # Starts at or past the end of a shorter row are the decoder having stopped.
    starts = np.where(position < lengths[:, None], starts[:, :longest], 0.0)
    # A depth is judged only where its position lies inside the row; acceptance past the end is 0 by the padding.
    inside = position[:, None] + np.arange(k) < lengths[:, None, None]
    reached = np.einsum("nt,nti->ni", starts, np.where(inside, survive[:, :, :k], 0.0))
    accepted_at = np.einsum("nt,nti->ni", starts, survive[:, :, 1:])
    proposed = np.einsum("nt,nti->n", starts, inside.astype(np.float64))
    rounds = starts.sum(1)
    return [
        Profile(
            emitted=float(lengths[n]),
            rounds=float(rounds[n]),
            accepted=float(accepted_at[n].sum()),
            proposed=float(proposed[n]),
            reached=tuple(float(value) for value in reached[n]),
            accepted_at=tuple(float(value) for value in accepted_at[n]),
            full_blocks=float(accepted_at[n, -1]),
        )
        for n in range(len(rows))
    ]
