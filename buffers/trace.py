"""The trace: one served sequence, as the verification pass saw it. Arrays on the CPU, never pickled.

Index convention, stated here and nowhere else
----------------------------------------------
Logits row ``t - 1`` judges token ``t``. Response position ``r`` (0-based) is token ``prompt_len + r``; it is judged by
logits row ``prompt_len + r - 1``, of the target and of the draft alike. `Trace.judging_rows` is that sentence as an
array; use it instead of writing the arithmetic again.

Letters in shapes: T tokens in all, R = T - prompt_len response positions, K target candidates a position, S draws of the
target's tail, C corrections (rejected proposals), K' draft candidates a correction, F branches, U tokens of them all, K''
target candidates and S' draws behind each token, H hidden size.

Two capture modes share one layout. With every position captured ``topk_ids`` has R rows, one a response position. With
only rejected positions captured it has C rows, row c belonging to response position ``rejected_at[c]``.
`Trace.judged_at` gives the response position of each row in both cases.

A *branch* is text that the answer does not have and the target was asked about: a rejected proposal and those behind it,
which the verification of a round scores with the others, or one of the *alternatives*, other tokens that the target might
have said, which an idle decoder asks about. Branch f begins at response position ``branches.at[f]``, in the place of the
token there, and has ``branches.lens[f]`` tokens; token j of it stands behind ``tokens[: prompt_len + branches.at[f]]`` and
the j branch tokens before it. Row u of ``branches.topk_ids`` is the target's distribution of what follows branch token u.
Rejected proposals come first, one branch a correction; several may begin at one position.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

#: In `Trace.rejected`: nothing was rejected at this position.
NO_TOKEN: Final = -1


class Source(IntEnum):
    """How a response token came to be (`Trace.source`)."""

    CORRECTION = 0  # drawn by the target after it rejected a proposal
    ACCEPTED = 1  # proposed by the draft and accepted
    BONUS = 2  # drawn by the target after all proposals were accepted, or where there were none
    UNKNOWN = 3  # the engine did not say


#: Array fields in the order in which they are stored: name -> (allowed dtypes, axes).
ARRAY_FIELDS: "Final[dict[str, tuple[tuple[np.dtype[Any], ...], str]]]" = {
    "tokens": ((np.dtype(np.uint32),), "T"),
    "topk_ids": ((np.dtype(np.uint32),), "PK"),
    "topk_logprobs": ((np.dtype(np.float16),), "PK"),
    "tail_ids": ((np.dtype(np.uint32),), "PS"),
    "source": ((np.dtype(np.uint8),), "R"),
    "rejected": ((np.dtype(np.int32),), "R"),
    "draft_logprob": ((np.dtype(np.float16),), "R"),
    "target_logprob": ((np.dtype(np.float16),), "R"),
    "rejected_at": ((np.dtype(np.int32),), "C"),
    "draft_topk_ids": ((np.dtype(np.uint32),), "CD"),
    "draft_topk_logprobs": ((np.dtype(np.float16),), "CD"),
    "branch_at": ((np.dtype(np.int32),), "F"),
    "branch_lens": ((np.dtype(np.uint8),), "F"),
    "branch_tokens": ((np.dtype(np.uint32),), "U"),
    "branch_topk_ids": ((np.dtype(np.uint32),), "UB"),
    "branch_topk_logprobs": ((np.dtype(np.float16),), "UB"),
    "branch_tail_ids": ((np.dtype(np.uint32),), "UE"),
    "features": ((np.dtype(np.uint16), np.dtype(np.int8)), "TH"),
}
#: Of these the arrays of `Branches`.
_PREFIX: Final = "branch_"
#: Fields of a trace that are not scalars.
NOT_SCALARS: Final = frozenset({*ARRAY_FIELDS, "branches"})


@dataclass(frozen=True, slots=True, eq=False)
class Branches:
    """What was scored beside one sequence; see the module docstring."""

    at: NDArray[np.int32]  # [F] the response position where each branch begins
    lens: NDArray[np.uint8]  # [F] tokens of each branch
    tokens: NDArray[np.uint32]  # [U] the branches' tokens, one branch after the other
    topk_ids: NDArray[np.uint32]  # [U, K''] the target's most likely tokens behind each of them
    topk_logprobs: NDArray[np.float16]  # same shape; temperature 1, descending
    tail_ids: NDArray[np.uint32] | None = None  # [U, S'] drawn from its other tokens (`policies.tail`)

    def take(self, kept: NDArray[np.bool_]) -> "Branches":
        """Some of them, [F]."""
        rows = np.repeat(kept, self.lens)
        return Branches(
            self.at[kept],
            self.lens[kept],
            self.tokens[rows],
            self.topk_ids[rows],
            self.topk_logprobs[rows],
            None if self.tail_ids is None else self.tail_ids[rows],
        )

    def plus(self, more: "Branches") -> "Branches":
        """These, and others of the same sequence behind them; K'' is the smaller one, and so is S'."""
        depth = min(self.topk_ids.shape[1], more.topk_ids.shape[1])
        tail_ids = None
        # A smaller K'' leaves more over than was drawn from: draws are kept where both have the same.
        if self.tail_ids is not None and more.tail_ids is not None and self.topk_ids.shape[1] == more.topk_ids.shape[1]:
            drawn = min(self.tail_ids.shape[1], more.tail_ids.shape[1])
            tail_ids = np.concatenate([self.tail_ids[:, :drawn], more.tail_ids[:, :drawn]])
        return Branches(
            np.concatenate([self.at, more.at]),
            np.concatenate([self.lens, more.lens]),
            np.concatenate([self.tokens, more.tokens]),
            np.concatenate([self.topk_ids[:, :depth], more.topk_ids[:, :depth]]),
            np.concatenate([self.topk_logprobs[:, :depth], more.topk_logprobs[:, :depth]]),
            tail_ids,
        )

    def cut(self, lost: int) -> "Branches":
        """Those that begin behind the first `lost` response positions, counted from there."""
        left = self.take(self.at >= lost)
        return replace(left, at=left.at - np.int32(lost))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Trace:
    """One served sequence. Log-probabilities in nats, times in unix seconds; NaN means not known."""

    tokens: NDArray[np.uint32]  # [T] prompt and response, possibly cut on the left
    prompt_len: int  # tokens before the response, at least 1; R = T - prompt_len
    topk_ids: NDArray[np.uint32]  # [R, K] the target's most likely tokens (or [C, K], see the module docstring)
    topk_logprobs: NDArray[np.float16]  # same shape; temperature 1, descending
    source: NDArray[np.uint8]  # [R] a `Source` code
    rejected: NDArray[np.int32]  # [R] the draft token rejected at a correction, else NO_TOKEN
    draft_logprob: NDArray[np.float16]  # [R] log q of the emitted token when it was served
    target_logprob: NDArray[np.float16]  # [R] log p of it under the *served* p: after temperature, top-p and top-k
    rejected_at: NDArray[np.int32]  # [C] response positions of the corrections, ascending
    draft_topk_ids: NDArray[np.uint32]  # [C, K'] what the draft believed when it was rejected
    draft_topk_logprobs: NDArray[np.float16]  # [C, K']
    request_id: str
    target_id: str  # revision of the target that judged this; traces of another one are aged out
    draft_version: int  # checkpoint version that proposed; 0 is the base draft
    domain: str
    tenant: str
    created_at: float  # unix seconds
    temperature: float  # 0 is greedy
    engine: str
    reserved: bool  # kept for the gate, never trained on
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    surprise: float = 1.0  # SurpriseRatio seed of the priority, in (0, 1]
    shift: float = math.nan  # representation shift against the anchors
    tail_ids: NDArray[np.uint32] | None = None  # [R, S] (or [C, S]) drawn from the other tokens (`policies.tail`)
    branches: Branches | None = None  # where they were captured
    features: NDArray[np.uint16] | NDArray[np.int8] | None = None  # [T, H] target hidden states; uint16 = bfloat16 bits

    @property
    def response_len(self) -> int:
        """R, the number of response positions."""
        return len(self.tokens) - self.prompt_len

    @property
    def response(self) -> NDArray[np.uint32]:
        """[R] the emitted tokens."""
        return self.tokens[self.prompt_len :]

    @property
    def judging_rows(self) -> NDArray[np.int64]:
        """[R] the logits row that judges each response position, of a forward pass over `tokens`."""
        return np.arange(self.prompt_len - 1, len(self.tokens) - 1, dtype=np.int64)

    @property
    def judged_at(self) -> NDArray[np.int64]:
        """[P] the response position each row of `topk_ids` belongs to; P is R, or C if only rejections were kept."""
        if len(self.topk_ids) == self.response_len:
            return np.arange(self.response_len, dtype=np.int64)
        return self.rejected_at.astype(np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays together, without the encoding's header (about 1.5 kB)."""
        return sum(a.nbytes for a in self.arrays().values())

    def arrays(self) -> "dict[str, NDArray[Any]]":
        """The array fields by name; draws, branches and `features` only where there are any."""
        found = {name: a for name in ARRAY_FIELDS if (a := getattr(self, name, None)) is not None}
        if self.branches is not None:
            arrays = {f.name: getattr(self.branches, f.name) for f in fields(Branches)}
            found |= {_PREFIX + name: a for name, a in arrays.items() if a is not None}
        return found

    @classmethod
    def of(cls, arrays: "Mapping[str, NDArray[Any]]", scalars: Mapping[str, Any]) -> "Trace":
        """The trace of what `arrays` and `scalars` return. Raises TypeError: some are missing, or unknown."""
        members: dict[str, Any] = {name: a for name, a in arrays.items() if not name.startswith(_PREFIX)}
        behind = {name.removeprefix(_PREFIX): a for name, a in arrays.items() if name.startswith(_PREFIX)}
        return cls(**members, **scalars, branches=Branches(**behind) if behind else None)

    def scalars(self) -> dict[str, Any]:
        """The other fields by name, JSON-ready but for NaN."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in NOT_SCALARS}

    def validate(self) -> None:
        """Raises ValueError, naming field, value and rule, if the fields contradict each other."""
        sizes: dict[str, int] = {"T": len(self.tokens)}
        if not 1 <= self.prompt_len < len(self.tokens):
            raise ValueError(
                f"prompt_len ({self.prompt_len}) must be at least 1 and less than the {len(self.tokens)} tokens: "
                "the first response token needs a logits row before it"
            )
        sizes["R"] = self.response_len
        sizes["C"] = len(self.rejected_at)
        sizes["P"] = sizes["R"] if len(self.topk_ids) == sizes["R"] else sizes["C"]
        for name, array in self.arrays().items():
            dtypes, axes = ARRAY_FIELDS[name]
            if array.dtype not in dtypes:
                raise ValueError(f"{name} has dtype {array.dtype}; it must be {' or '.join(map(str, dtypes))}")
            if array.ndim != len(axes):
                raise ValueError(f"{name} has {array.ndim} axes; it must have {len(axes)}")
            for axis, size in zip(axes, array.shape, strict=True):
                if sizes.setdefault(axis, size) != size:
                    raise ValueError(f"{name} has shape {array.shape}; axis {axis} must be {sizes[axis]}")
        self._validate_contents(sizes["R"])
        if self.branches is None:
            return
        if (total := int(self.branches.lens.sum())) != sizes["U"]:
            raise ValueError(f"branch_lens sums to {total}; it must be the {sizes['U']} branch_tokens")
        if np.any(at := (self.branches.at < 0) | (self.branches.at >= sizes["R"])):
            raise ValueError(
                f"branch_at ({self.branches.at[at][0]}) must be a response position, 0 to {sizes['R'] - 1}"
            )

    def _validate_contents(self, n_response: int) -> None:
        at = self.rejected_at
        if len(at) and (at[0] < 0 or at[-1] >= n_response or np.any(at[1:] <= at[:-1])):
            raise ValueError(f"rejected_at must be ascending response positions below {n_response}")
        if len(at) and np.any(self.rejected[at] == NO_TOKEN):
            raise ValueError("rejected must name the rejected draft token at every position of rejected_at")
        if np.any(self.source > max(Source)):
            raise ValueError(f"source ({int(self.source.max())}) must be a Source code, at most {int(max(Source))}")
        for name in ("created_at", "temperature", "top_p"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} ({getattr(self, name)}) must be finite")
        if math.isinf(self.shift):
            raise ValueError(f"shift ({self.shift}) must be finite, or NaN where it is not known")
        if not 0.0 < self.surprise <= 1.0:
            raise ValueError(f"surprise ({self.surprise}) must lie in (0, 1]")

    def beside(self, more: Branches) -> "Trace":
        """This trace with further branches."""
        return replace(self, branches=more if self.branches is None else self.branches.plus(more))

    def without_branches(self) -> "Trace":
        """This trace, of the answer alone; itself if it has no branches."""
        return self if self.branches is None else replace(self, branches=None)

    def truncate_left(self, max_tokens: int) -> "Trace":
        """This trace with at most `max_tokens` tokens, the latest ones; itself if it is short enough.

        At least one token stays in front of the response as context. If the cut falls inside the response, the
        positions before it are dropped from every array and the last token cut off becomes that context's start.
        Raises ValueError if `max_tokens` is below 2.
        """
        if max_tokens < 2:
            raise ValueError(f"max_tokens ({max_tokens}) must be at least 2: one of context and one of response")
        cut = len(self.tokens) - max_tokens
        if cut <= 0:
            return self
        lost = max(0, cut + 1 - self.prompt_len)  # response positions without a context token in front of them
        kept = self.rejected_at >= lost
        rows = kept if len(self.topk_ids) != self.response_len else np.arange(self.response_len) >= lost
        return replace(
            self,
            tokens=self.tokens[cut:],
            prompt_len=self.prompt_len + lost - cut,
            topk_ids=self.topk_ids[rows],
            topk_logprobs=self.topk_logprobs[rows],
            tail_ids=None if self.tail_ids is None else self.tail_ids[rows],
            source=self.source[lost:],
            rejected=self.rejected[lost:],
            draft_logprob=self.draft_logprob[lost:],
            target_logprob=self.target_logprob[lost:],
            rejected_at=self.rejected_at[kept] - np.int32(lost),
            draft_topk_ids=self.draft_topk_ids[kept],
            draft_topk_logprobs=self.draft_topk_logprobs[kept],
            features=None if self.features is None else self.features[cut:],
            branches=None if self.branches is None else self.branches.cut(lost),
        )


def is_reserved(request_id: str, share: float) -> bool:
    """Whether this request is kept for the gate: a fixed hash of its id falls into the first `share` of [0, 1).

    The same id gives the same answer in every process and on every day. Raises ValueError if `share` is outside [0, 1].
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share ({share}) must lie in [0, 1]")
    digest = hashlib.blake2b(request_id.encode(), digest_size=8, person=b"adaptd-reserve").digest()
    return int.from_bytes(digest, "big") < share * 2**64
