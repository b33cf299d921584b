"""Whether speculation pays at the present load, and by how much, from what was measured; plain JSON values.

`expected` is the formula S = MAL / (1 + k c_d + c_v) with timed passes; `measured` sets whole rounds, with everything
that is in them beside the passes, against a target step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from policies.economics import Costs, best_depth, expected_speedup


def native(decoders: Sequence[dict[str, Any]], now: dict[str, Any]) -> dict[str, Any]:
    """Of the decoders' status and the acceptance of the last requests.

    Costs are those of the batch nearest to the present one, over decoders weighted alike.
    """
    rows, chosen = [row for row in map(_present, decoders) if row is not None], draft_lengths(decoders)
    if not rows:
        why = "the passes were not timed yet" if decoders else "no decoder is up"
        return _unknown(why) | {"draft_lengths": chosen}
    k = rows[0]["k"]
    full = Costs(
        draft=_mean([row["draft_s"] / row["target_s"] for row in rows]),
        verify=_mean([max(0.0, row["verify_s"] / row["target_s"] - 1.0) for row in rows]),
    )
    # Where lengths are chosen a round is priced at the mean one, what verifying costs more being about linear in it.
    drafted = k if not chosen or now["draft_length"] is None else now["draft_length"]
    costs = Costs(full.draft, full.verify * drafted / k)
    found = {
        "k": k,
        "batch": _mean([row["batch"] for row in rows]),
        "c_d": costs.draft,
        "c_v": costs.verify,
        "break_even_mal": costs.round(drafted),
        "draft_lengths": chosen,
        "mal": now["mal"],
        "round_s": None,
        "target_s": _mean([row["target_s"] for row in rows]),
    }
    mal = now["mal"]
    if mal is None:
        return _unknown("no requests yet") | found
    expected = expected_speedup(min(max(1.0, mal), drafted + 1.0), drafted, costs)
    rounds = [row["target_s"] / row["round_s"] for row in rows if row["round_s"]]
    measured = mal * _mean(rounds) if rounds else None
    if rounds:
        found["round_s"] = _mean([row["round_s"] for row in rows if row["round_s"]])
    about: dict[str, Any] = {"expected": expected, "measured": measured}
    if chosen:
        # The decoders know better, round by round, and none drafts where it would cost time.
        used = max(chosen.values()) > 0.0
        speedup = expected if measured is None else measured
        verdict = {"pays": True, "speedup": speedup} if used else {"reason": "no domain's draft would save time"}
        return _unknown("") | found | about | verdict
    depths = now["by_depth"]
    known = next((i for i, value in enumerate(depths) if value is None), len(depths))
    best_k, best = best_depth(depths[:known], costs)
    about |= {"best_k": best_k, "best_expected": best}
    return _unknown("") | found | about | _verdict(expected if measured is None else measured)


def draft_lengths(decoders: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The k chosen last by domain, a mean over the decoders that have one; empty where it is fixed."""
    found: dict[str, list[float]] = {}
    for decoder in decoders:
        for domain, k in decoder["engine"].get("draft_lengths", {}).items():
            found.setdefault(domain or "default", []).append(k)
    return {domain: _mean(values) for domain, values in sorted(found.items())}


def behind_proxy(load: Any, plain_tokens_per_s: float | None, k: int) -> dict[str, Any]:
    """Of a server's metrics (`adaptd.sidecar.load.Load`) and what the operator measured without speculation."""
    if load is None:
        return _unknown("too few requests in the last minutes")
    found = {
        "k": k,
        "batch": load.running,
        "mal": load.mal,
        "round_s": load.round_s,
        "tokens_per_s": load.mal / load.round_s,
        "plain_tokens_per_s": plain_tokens_per_s,
    }
    if plain_tokens_per_s is None:
        why = "the draft's share of a round cannot be told from outside: set upstream.plain_tokens_per_s"
        return _unknown(why) | found
    measured = load.mal / load.round_s / plain_tokens_per_s
    found |= {"measured": measured, "break_even_mal": load.round_s * plain_tokens_per_s}
    return _unknown("") | found | _verdict(measured)


def _present(decoder: dict[str, Any]) -> dict[str, Any] | None:
    """The timed passes of the batch nearest to the one that is decoded, with the time of a round."""
    engine, costs = decoder["engine"], decoder.get("costs") or []
    if not costs:
        return None
    batch = engine.get("round_batch") or 1.0
    nearest: dict[str, Any] = min(costs, key=lambda row: abs(row["batch"] - batch))
    # A round at another batch than the timed one says nothing about it.
    same = 0.5 <= nearest["batch"] / batch <= 2.0
    return {**nearest, "round_s": engine.get("round_s") if same else None}


def _verdict(speedup: float) -> dict[str, Any]:
    return {"pays": speedup >= 1.0, "speedup": speedup}


def _unknown(reason: str) -> dict[str, Any]:
    keys = ("pays", "speedup", "expected", "measured", "break_even_mal", "mal", "k", "batch", "c_d", "c_v", "round_s")
    return {"reason": reason, **dict.fromkeys(keys)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def line(found: dict[str, Any]) -> str:
    """For `adaptd status`."""
    figures = []
    if found["expected"] is not None:
        figures.append(f"expected {found['expected']:.2f}x")
    if found["measured"] is not None:
        figures.append(f"measured {found['measured']:.2f}x")
    if found["c_d"] is not None:
        figures.append(f"c_d {found['c_d']:.3f}, c_v {found['c_v']:.3f}")
    if found["break_even_mal"] is not None:
        figures.append(f"breaks even at MAL {found['break_even_mal']:.2f}")
    if found["round_s"] is not None:
        figures.append(f"round {found['round_s'] * 1e3:.1f} ms")
    if found["batch"] is not None:
        figures.append(f"batch {found['batch']:.1f}")
    if found.get("best_k") is not None and found["best_k"] != found["k"]:
        figures.append(f"k = {found['best_k']} would give {found['best_expected']:.2f}x")
    if chosen := found.get("draft_lengths"):
        figures.append("k " + ", ".join(f"{domain} {k:.3g}" for domain, k in chosen.items()))
    about = "; ".join(figures)
    if chosen and found["pays"] is None and found["expected"] is not None:
        return f"off: {found['reason']} ({about})"
    if found["pays"] is None:
        return f"unknown: {found['reason']}" + (f" ({about})" if about else "")
    if found["pays"]:
        return f"pays: {about}"
    without = f"tokens would come {1 / found['speedup']:.2f} times as fast without it"
    return f"[red]does not pay[/]: {without}; {about}"
