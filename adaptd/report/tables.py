"""rich tables for results that are printed once."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.table import Table

from checkpoints.manifest import Manifest

_BARS = " ▁▂▃▄▅▆▇█"


#: Columns of output that goes to no terminal, unless COLUMNS says how many: in rich's 80 tables lose their text.
_COLUMNS = 160


def show(*items: RenderableType) -> None:
    """Print to standard output."""
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=_COLUMNS)
    for item in items:
        console.print(item)


def number(value: float | None, digits: int = 2) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """A share in percent, or a dash."""
    return "-" if value is None else f"{value:.1%}"


def spark(values: Sequence[float | None], low: float, high: float) -> str:
    """A line of block characters between `low` and `high`; a dot where there is no value."""
    span = max(high - low, 1e-9)
    return "".join("·" if v is None else _BARS[1 + min(7, max(0, int((v - low) / span * 8)))] for v in values)


def gain(verdict: dict[str, Any] | None) -> str:
    """The interval of a gate verdict's gain."""
    found = (verdict or {}).get("gain") or {}

    def signed(name: str) -> str:
        value = found.get(name)
        return "-" if value is None else f"{value:+.1%}"

    # Too few traces leave bounds, or all three, unknown: see `policies.gate.Interval`.
    return "-" if found.get("mean") is None else f"{signed('mean')} [{signed('low')}, {signed('high')}]"


def on_base(verdict: dict[str, Any] | None) -> str:
    """Domains that the day-0 draft serves beside this version, listed; empty for none."""
    return ", ".join(domain or "unlabelled" for domain in (verdict or {}).get("on_base", ()))


def evaluation_table(found: dict[str, Any]) -> Table:
    """`adaptd eval`: a row per domain, and all of them."""
    table = Table(title=f"draft version {found['draft_version']}, k = {found['k']}, temperature {found['temperature']}")
    for column in ("domain", "requests", "MAL", "token acceptance", "block acceptance", "by depth"):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for name, row in [*found["by_domain"].items(), ("all", found["overall"])]:
        table.add_row(
            name,
            str(row["requests"]),
            number(row["mal"]),
            percent(row["token_acceptance"]),
            percent(row["block_acceptance"]),
            " ".join(percent(v) for v in row["by_depth"]),
        )
    return table


def doctor_table(checks: Sequence[Any]) -> Table:
    """`adaptd doctor`: a row per check, with the remedy of those that did not pass."""
    table = Table(title="adaptd doctor")
    for column in ("check", "state", "found", "remedy"):
        table.add_column(column)
    styles = {"ok": "green", "warning": "yellow", "failed": "red"}
    for check in checks:
        table.add_row(check.name, f"[{styles[check.state]}]{check.state}[/]", check.found, check.remedy)
    return table


def versions_table(versions: Sequence[Manifest], current: int | None, refused: Mapping[int, str]) -> Table:
    """`adaptd checkpoints list`; `refused`: why a version is quarantined."""
    table = Table(title="draft versions")
    for column in ("version", "parent", "age", "scope", "gate: gain", "note"):
        table.add_column(column)
    for m in versions:
        mark = " *" if m.version == current else ""
        age = f"{(time.time() - m.created_at) / 60:.0f} min"
        note = f"[red]quarantined[/] (show {m.version} says why)" if m.version in refused else ""
        about = "; ".join(filter(None, (note, m.note)))
        table.add_row(f"{m.version}{mark}", str(m.parent or "-"), age, m.scope, gain(dict(m.gate or {})), about)
    return table


def version_table(m: Manifest, refused: str | None = None) -> Table:
    """`adaptd checkpoints show`; `refused`: why it is quarantined."""
    table = Table(title=f"draft version {m.version}", show_header=False)
    table.add_column("key")
    table.add_column("value")
    rows = {
        "parent": m.parent or "-",
        "created": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(m.created_at)),
        "scope": f"{m.scope} {m.scope_config}",
        "base draft": m.base_id[:16],
        "tokenizer": m.tokenizer_hash[:16],
        "tensors": f"{len(m.tensors)}, {sum(_size(t.shape) for t in m.tensors):,} values",
        "gate": gain(dict(m.gate or {})),
        "verdict": (m.gate or {}).get("reason", "-"),
        "on base": on_base(dict(m.gate or {})) or "-",
        "window": m.window,
        "quarantine": refused or "-",
        "note": m.note or "-",
    }
    for key, value in rows.items():
        table.add_row(key, str(value))
    return table


def _size(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def demo_table(result: dict[str, Any]) -> Table:
    """`adaptd demo`: MAL by phase, first hundred requests against last hundred, adapting against frozen."""
    table = Table(title=f"mean acceptance length by phase; {result['swaps']} swaps in {result['seconds']} s")
    for column in (
        "phase",
        "requests",
        "frozen first 100",
        "adapting first 100",
        "frozen last 100",
        "adapting last 100",
        "ratio, last 100",
    ):
        table.add_column(column, justify="left" if column == "phase" else "right")
    for index, row in enumerate(result["phases"], start=1):
        adapting, frozen = row["adapting"], row["frozen"]
        ratio = adapting["last_100_mal"] / frozen["last_100_mal"] if frozen["last_100_mal"] else None
        table.add_row(
            f"{index} {row['domain']}",
            str(row["requests"]),
            number(frozen["first_100_mal"]),
            number(adapting["first_100_mal"]),
            number(frozen["last_100_mal"]),
            number(adapting["last_100_mal"]),
            number(ratio),
        )
    return table
