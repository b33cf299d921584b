"""The day-0 draft beside a candidate: which domains it had better serve, and which are not asked any more."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence

from policies.gate import Score, require_pairs

#: A domain is gone if chance leaves it out of so many of the newest requests less often than this.
_CHANCE = 0.01


def gone(domains: Sequence[str]) -> frozenset[str]:
    """Domains that are not asked any more, though they once were.

    If requests came in any order, each of the n newest would be of a domain with share s with probability s, and none of them
    with (1 - s)^n. Where that is below 1 in 100 the domain's absence is no accident.

    Args:
      domains: [N] of requests, newest first.
    """
    newest: dict[str, int] = {}
    for n, domain in enumerate(domains):
        newest.setdefault(domain, n)
    return frozenset(
        domain for domain, asked in Counter(domains).items() if (1.0 - asked / len(domains)) ** newest[domain] < _CHANCE
    )


def better_on_floor(
    opened: Sequence[Score], floor: Sequence[Score], kept: Collection[str], *, min_traces: int
) -> frozenset[str]:
    """Domains that the floor serves at least as well as the candidate, for a draft that can leave a domain to the floor.

    Args:
      opened, floor: [N] scores of candidate and floor on the same traces.
      kept: domains that the floor serves now; one with fewer than `min_traces` traces stays as it is.
    """
    require_pairs(opened, floor)
    lost: defaultdict[str, list[float]] = defaultdict(list)
    for o, f in zip(opened, floor, strict=True):
        # The same tokens in more rounds: a shorter acceptance.
        lost[o.domain].append(o.rounds - f.rounds)
    found = {d for d, rounds in lost.items() if (sum(rounds) >= 0 if len(rounds) >= min_traces else d in kept)}
    return frozenset(found | (set(kept) - lost.keys()))


def served(opened: Sequence[Score], floor: Sequence[Score], kept: Collection[str]) -> list[Score]:
    """Scores of a draft that leaves the domains `kept` to the floor."""
    return [f if f.domain in kept else o for o, f in zip(opened, floor, strict=True)]
