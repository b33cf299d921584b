"""The learner's objectives by name. Each gives one loss per position; masks, weights and the mean are the caller's."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor

from policies import divergence


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss per position. `soft` ones compare distributions [N, K+1]; the others need only logits and token ids."""

    name: str
    #: (p, q, **options) -> [N] if `soft`, else (draft_logits, token_ids) -> [N].
    function: Callable[..., Tensor]
    soft: bool
    #: Names of the coefficients that may be set; see the function for their units and defaults.
    options: tuple[str, ...] = ()


#: Every objective that a configuration may name.
OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        objective.name: objective
        for objective in (
            Objective("forward_kl", divergence.forward_kl, soft=True),
            Objective("reverse_kl", divergence.reverse_kl, soft=True),
            Objective("jsd", divergence.jensen_shannon, soft=True, options=("beta",)),
            Objective("tv", divergence.total_variation, soft=True),
            Objective("kl_tv", divergence.kl_tv, soft=True, options=("tv_weight",)),
            Objective("cross_entropy", divergence.cross_entropy, soft=False),
            Objective(
                "entropy_adaptive", divergence.entropy_adaptive, soft=True, options=("midpoint", "width", "beta")
            ),
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
) -> Tensor:
    """The named objective at N positions, in nats (`tv` has no unit), differentiable in the draft.

    Args:
      p, q: [N, K+1] log-probabilities of target and draft with tail; may be None where the objective is not `soft`.
      draft_logits: [N, V]; may be None where it is `soft`.
      token_ids: [N] the target's tokens; may be None where it is `soft`.
      options: coefficients of the objective, e.g. {"tv_weight": 0.5}.

    Returns: [N].
    Raises: ValueError: unknown name or option, or an input that this objective needs is None.
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
        return objective.function(p, q, **chosen)
    if draft_logits is None or token_ids is None:
        raise ValueError(f"objective {name!r} needs draft_logits and token_ids")
    return objective.function(draft_logits, token_ids)
