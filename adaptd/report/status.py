"""The status of a daemon as rich tables: `adaptd status`, and the live display of the demonstration."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table

from adaptd.report.economics import line
from adaptd.report.tables import gain, number, on_base, percent, spark
from adaptd.report.trend_tables import trend_tables


def _age(seconds: float | None) -> str:
    if seconds is None:
        return "day 0"
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def acceptance_table(acceptance: dict[str, Any], k: int) -> Table:
    """MAL and token acceptance by domain and window, with a sparkline."""
    table = Table(title="acceptance", expand=True)
    for column in (
        "domain",
        "requests",
        "MAL now",
        "1 h",
        "24 h",
        "accepted now",
        "1 h",
        "24 h",
        "by depth",
        "MAL, recent requests",
    ):
        table.add_column(
            column, justify="left" if column in ("domain", "MAL, recent requests") else "right", no_wrap=True
        )
    for name, row in [*acceptance["domains"].items(), ("all", acceptance)]:
        line = row.get("sparkline", [])
        table.add_row(
            name,
            str(row["24h"]["requests"]),
            number(row["now"]["mal"]),
            number(row["1h"]["mal"]),
            number(row["24h"]["mal"]),
            percent(row["now"]["token_acceptance"]),
            percent(row["1h"]["token_acceptance"]),
            percent(row["24h"]["token_acceptance"]),
            " ".join("-" if v is None else f"{v:.0%}" for v in row["now"]["by_depth"]),
            spark(line, 1.0, max([*line, 1.0 + k / 2])),
        )
    return table


def _draft_row(status: dict[str, Any]) -> str:
    draft = status["draft"]
    live = sorted({d["draft_version"] for d in status["decoders"]}) or ["none up"]
    return f"version {draft['version']} ({_age(draft['age_s'])}), scope {draft['scope']}; decoders at {', '.join(map(str, live))}"


def _buffer_row(buffer: dict[str, Any]) -> str:
    if not buffer["available"]:
        return f"[red]unavailable[/]: {buffer['error']} (serving goes on)"
    strata = ", ".join(f"{name} {size:,}" for name, size in buffer["sizes"].items())
    refused = sum(buffer["refused_total"].values())
    return f"{strata}; {buffer['stored_bytes'] / 2**20:.1f} MiB; inserted {buffer['inserted_total']:,}, refused {refused:,}"


def _series_row(series: dict[str, Any]) -> dict[str, str]:
    """Only where something is wrong with it."""
    if series["error"] is None and not series["lost"]:
        return {}
    waits = f"{series['waiting']:,} requests wait, {series['lost']:,} lost"
    return {"trends": waits if series["error"] is None else f"[red]not written[/]: {series['error']}; {waits}"}


def _writer_row(decoders: list[dict[str, Any]]) -> str:
    total = {key: sum(d["writer"][key] for d in decoders) for key in ("written", "dropped", "pending")}
    asked = {key: sum(d["engine"][key] for d in decoders) for key in ("again", "alternatives")}
    names = {"again": "of prompts asked again", "alternatives": "with alternatives"}
    of_them = "".join(f", {count:,} {names[key]}" for key, count in asked.items() if count)
    return f"written {total['written']:,}{of_them}, dropped {total['dropped']:,}, pending {total['pending']:,}"


def _recall_row(decoders: list[dict[str, Any]]) -> str:
    return f"{sum(d['engine']['recalled'] for d in decoders):,} contexts"


def _learner_row(learner: dict[str, Any] | None) -> str:
    if learner is None:
        return "off (learn.enabled is false)"
    return (
        f"{learner['steps']:,} steps in {learner['ticks']:,} ticks, last loss {number(learner['last_loss'], 3)}, "
        f"promoted {learner['promoted']}, rejected {learner['rejected']}, restarts {learner['restarts']}"
    )


def _swap_row(decoders: list[dict[str, Any]]) -> str:
    swaps = sum(d["swap"]["swaps"] for d in decoders)
    refusals = sum(d["swap"]["refusals"] for d in decoders)
    pause = max((d["swap"]["max_pause_s"] for d in decoders), default=0.0)
    return f"{swaps} swaps, {refusals} refused, longest pause {pause * 1e3:.1f} ms"


def _watch_row(watch: dict[str, Any]) -> str:
    if not watch["on"]:
        return "off (gate.watch is false)"
    parts = []
    if watch["watching"]:
        seen = f"{watch['requests']} of {watch['max_requests']} requests"
        figures = f", {percent(watch['accepted'])} accepted, {percent(watch['expected'])} expected"
        before = f"version {watch['before']}" if watch["before"] else "day 0"
        parts.append(
            f"version {', '.join(map(str, watch['watching']))} against {before}: {seen}{figures if watch['requests'] else ''}"
        )
    else:
        parts.append("nothing unconfirmed")
    if watch["promise"] != "none":
        parts.append(f"the gate's promise of {watch['promised_gain']:+.1%} is {watch['promise']}")
    parts.append(f"confirmed {watch['confirmed']}, rolled back {watch['rolled_back']}")
    if watch["quarantined"]:
        parts.append(f"[red]quarantined[/]: {', '.join(watch['quarantined'])}")
    if watch["quarantine_error"]:
        parts.append(f"[red]{watch['quarantine_error']}[/]")
    return "; ".join(parts)


def _server_row(upstream: dict[str, Any]) -> str:
    if not upstream["up"]:
        return f"[red]down[/]: {upstream['error']} (adaptd looks again)"
    captured = f"top {upstream['top_logprobs']} of {_captured(upstream['capture'])}"
    acceptance = (
        ""
        if upstream["per_step"]
        else "; [red]no acceptance[/]: start it with --per-request-spec-decode-metrics detailed"
    )
    return f"{upstream['url']}, vLLM {upstream['version']}; {upstream['reason'] or captured}{acceptance}"


def _captured(capture: dict[str, Any]) -> str:
    """The share in force, and why it is not more."""
    if capture["in_force"] is None:
        return "the requests captured"
    why = f" ({capture['bound_by']})" if capture["bound_by"] else ""
    cost = f"it slows requests by {capture['cost']:.1%} while it is on, {capture['budget']:.0%} over time are allowed"
    return f"{capture['in_force']:.0%} of the requests captured{why}; {cost}"


def server_rows(upstream: dict[str, Any]) -> dict[str, str]:
    """One row for each of several servers."""
    rows = {}
    for i, server in enumerate(upstream["servers"], 1):
        state = (
            f"[red]down[/]: {server['error']}"
            if not server["up"]
            else f"[red]left out[/]: {server['left_out']}"
            if server["left_out"]
            else f"vLLM {server['version']}, draft version {server['draft_version']}, {server['in_flight']} in flight"
        )
        role = ", takes new drafts first" if server["url"] == upstream["canary"] else ""
        rows[f"server {i}"] = f"{server['url']}{role}; {state}"
    return rows if len(rows) > 1 else {}


def _proxy_row(proxy: dict[str, Any]) -> str:
    why = ", ".join(f"{name} {count:,}" for name, count in proxy["uncaptured"].items())
    return (
        f"{proxy['requests']:,} requests, {proxy['built']:,} traces; not captured: {why or 'none'}; "
        f"aborted {proxy['aborted']:,}, unreachable {proxy['unreachable']:,}, faults {proxy['faults']:,}"
    )


def _publisher_row(publisher: dict[str, Any]) -> str:
    if not publisher["active"]:
        return f"versions stay in the store: {publisher['reason']}"
    if publisher["halted"]:
        return f"[red]halted[/]: {publisher['halted']}"
    at = publisher["swapped_at"]
    parts = [
        "day 0 in the server" if not publisher["version"] else f"version {publisher['version']} in the server",
        "nothing published yet" if at is None else f"last published {_age(time.time() - at)} ago",
        f"failed {publisher['refusals']}, restored {publisher['restored']}",
        *([f"target tensors checked {checked}"] if (checked := publisher["target_tensors_checked"]) else []),
        *([f"probe: {probe}"] if (probe := publisher["last_probe"]) else []),
        *([f"[red]last error[/]: {error}"] if (error := publisher["last_error"]) else []),
    ]
    return "; ".join(parts)


def _drift_row(drift: dict[str, Any]) -> str:
    parts = [f"{name} {state['mean']:.0%} (n {state['n']})" for name, state in drift["state"].items()]
    last = drift["events"][-1] if drift["events"] else None
    tail = (
        ""
        if last is None
        else f"; last: {last['domain']} {last['direction']} {last['before']:.0%} to {last['after']:.0%}"
    )
    return (", ".join(parts) or "no requests yet") + tail


def verdict_table(learner: dict[str, Any] | None) -> Table:
    """The last gate verdicts with their intervals."""
    table = Table(title="last gate verdicts", expand=True)
    for column in ("when", "trigger", "loss", "gain", "verdict"):
        table.add_column(column)
    for tick in reversed((learner or {}).get("history", [])[-5:]):
        verdict = tick["verdict"] or {}
        outcome = f"version {tick['published']}" if tick["published"] else verdict.get("reason", "no verdict")
        if kept := on_base(verdict):
            outcome += f"; on the base draft: {kept}"
        when = time.strftime("%H:%M:%S", time.localtime(tick["at"]))
        table.add_row(when, tick["reason"], number(tick["loss"], 3), gain(verdict), outcome)
    return table


def render(status: dict[str, Any]) -> RenderableType:
    """The whole status."""
    upstream, chosen = "upstream" in status, status["economics"].get("draft_lengths")
    head = Table(show_header=False, box=None, expand=True)
    head.add_column("key", style="bold", no_wrap=True)
    head.add_column("value")
    k = f"k up to {status['k']}" if chosen else f"k = {status['k']}"
    rows = {
        "engine": f"{status['engine']}, {k}, up {_age(status['uptime_s'])}, {status['in_flight']} in flight",
        **({"server": _server_row(status["upstream"]), "proxy": _proxy_row(status["proxy"])} if upstream else {}),
        **(server_rows(status["upstream"]) if upstream else {}),
        "draft": _draft_row(status),
        "drift": _drift_row(status["acceptance"]["drift"]),
        "buffer": _buffer_row(status["buffer"]),
        "traces": _writer_row(status["decoders"]),
        **_series_row(status["series"]),
        **({} if upstream else {"recall": _recall_row(status["decoders"])}),
        "learner": _learner_row(status["learner"]),
        "watch": _watch_row(status["watch"]),
        "speculation": line(status["economics"]),
        **({"publisher": _publisher_row(status["publisher"])} if upstream else {}),
        "swaps": _swap_row(status["decoders"]),
    }
    for key, value in rows.items():
        head.add_row(key, value)
    return Group(
        Panel(head, title=f"adaptd {status['adaptd_version']}: {status['deployment']}"),
        acceptance_table(status["acceptance"], status["k"]),
        verdict_table(status["learner"]),
        *(trend_tables(status["trends"], status["k"]) if "trends" in status else ()),
    )
