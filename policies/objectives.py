"""The learner's objectives by name. Each gives one loss per position; masks, weights and the mean are the caller's."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from policies import divergence


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss per position. `soft` ones compare distributions [N, K+1]; the others need only logits and token ids.

    `blocks` ones are `soft` and look along each sequence, at the positions that one round of k proposals covers.
    """

    name: str
    #: (p, q, **options) -> [N] if `soft`, with `lengths` and `k` if `blocks`, else (draft_logits, token_ids) -> [N].
    function: Callable[..., Tensor]
    soft: bool
    #: Names of the coefficients that may be set; see the function for their units and defaults.
    options: tuple[str, ...] = ()
    blocks: bool = False
    #: KL(p || q) is a part of it with weight 1, which draws of the target's tail make whole (`divergence.tail_cross_entropy`).
    draws: bool = False


#: Every objective that a configuration may name.
OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        objective.name: objective
        for objective in (
            Objective("forward_kl", divergence.forward_kl, soft=True, draws=True),
            Objective("reverse_kl", divergence.reverse_kl, soft=True),
            Objective("jsd", divergence.jensen_shannon, soft=True, options=("beta",)),
            Objective("tv", divergence.total_variation, soft=True),
            Objective("kl_tv", divergence.kl_tv, soft=True, options=("tv_weight",), draws=True),
            Objective("cross_entropy", divergence.cross_entropy, soft=False),
            Objective(
                "entropy_adaptive",
                divergence.entropy_adaptive,
                soft=True,
                options=("midpoint", "width", "tv_weight"),
                draws=True,
            ),
            Objective("acceptance_length", divergence.acceptance_length, soft=True, blocks=True),
        )
    }
)


def get_objective(name: str) -> Objective:
    """The objective of that name.

    Raises: ValueError: unknown; names the nearest one.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    nearest = difflib.get_close_matches(name, OBJECTIVES, n=1, cutoff=0.0)[0]
    raise ValueError(f"objective ({name!r}) is unknown; did you mean {nearest!r}? Known: {', '.join(OBJECTIVES)}")


def compute_objective(
    name: str,
    *,
    p: Tensor | None,
    q: Tensor | None,
    draft_logits: Tensor | None,
    token_ids: Tensor | None,
    options: Mapping[str, float] | None = None,
    lengths: Sequence[int] | None = None,
    k: int | None = None,
) -> Tensor:
    """The named objective at N positions, in nats, differentiable in the draft.

    `tv` has no unit; `acceptance_length` is in tokens and at most 0.

    Args:
      p, q: [N, K+1] log-probabilities of target and draft with tail; may be None where the objective is not `soft`.
      draft_logits: [N, V]; may be None where it is `soft`.
      token_ids: [N] the target's tokens; may be None where it is `soft`.
      options: coefficients of the objective, e.g. {"tv_weight": 0.5}.
      lengths: positions of each sequence, in order, summing to N; may be None where the objective is not `blocks`.
      k: tokens proposed a round; likewise.

    Returns: [N].
    Raises: ValueError: unknown name or option, an input that this objective needs is None, or lengths that do not fit.
    """
    objective = get_objective(name)
    chosen = dict(options or {})
    for option in chosen:
        if option not in objective.options:
            known = ", ".join(objective.options) or "none"
            raise ValueError(f"option ({option!r}) is not one of objective {name!r}; known: {known}")
    if objective.soft:
        if p is None or q is None:
            raise ValueError(f"objective {name!r} needs p and q; without target probabilities use 'cross_entropy'")
        if objective.blocks:
            if lengths is None or k is None:
                raise ValueError(
                    f"objective {name!r} needs lengths and k: where sequences begin, and how long a block is"
                )
            return objective.function(p, q, lengths=lengths, k=k, **chosen)
        return objective.function(p, q, **chosen)
    if draft_logits is None or token_ids is None:
        raise ValueError(f"objective {name!r} needs draft_logits and token_ids")
    return objective.function(draft_logits, token_ids)
