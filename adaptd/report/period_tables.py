"""The text and tables of `adaptd report`, as HTML."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from typing import Any

from adaptd.report.monitor import ALL
from adaptd.report.rejections import MIN_JUDGED
from adaptd.report.tables import number, percent
from adaptd.report.trend_tables import bucket, details, entropy_bin

#: Events listed of each kind, newest first.
_EVENTS = 40


def utc(at: float) -> str:
    """A time, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(at))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, which are escaped; as wide as it must be."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in heads)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{lines}</table></div>'


def introduction(found: dict[str, Any]) -> str:
    """What the page is about, and what is compared."""
    trends = found["trends"]
    text = (
        f"<p>{utc(trends['from'])} to {utc(trends['to'])} UTC, engine {html.escape(found['engine'])}, k = {found['k']}, draft "
        f"version {found['draft_version']} at the end. Mean acceptance length is emitted tokens per verification round, bonus "
        f"included; a bucket of the time series is {bucket(trends['step_s'])}.</p>"
    )
    if found["split"] is None:
        return f"{text}<p>Nothing is compared: {html.escape(found['why_not_compared'])}.</p>"
    parts = found["split"]
    how = {
        "first": "the first third of the rounds with the last",
        "day0": "what was served before version 1 with the last third of the rounds",
    }[found["baseline"]]
    return f"{text}<p>Compared: {how}. Before is until {utc(parts['before'])}, after is from {utc(parts['after'])}.</p>"


def body(found: dict[str, Any], acceptance: str, groups: str) -> str:
    """Everything behind the first figure; `acceptance` and `groups` are the other two, as HTML."""
    return "".join(
        (
            "<h2>By domain</h2>",
            _domains(found),
            "<h2>Acceptance by depth and by target entropy</h2>",
            acceptance,
            "<p>By depth over all requests; by entropy over the traces that the daemon looked at (<code>trends.traces</code>). "
            "The entropy is that of the target's top K and one bucket for the rest, a lower bound.</p>",
            _entropies(found),
            "<h2>Rejections by token group</h2>",
            groups,
            _groups(found),
            _top(found),
            _events(found),
        )
    )


def _domains(found: dict[str, Any]) -> str:
    rows = []
    for name, row in found["trends"]["summary"].items():
        pair = [found.get(side, {}).get(name) for side in ("before", "after")]
        rows.append(
            [name, f"{row['requests']:,}", number(row["mal"])]
            + [number(part and part["mal"]) for part in pair]
            + [_change(*(part and part["mal"] for part in pair))]
            + [percent(part and part["token_acceptance"]) for part in pair]
        )
    heads = ("domain", "requests", "MAL", "before", "after", "change", "accepted before", "after")
    return table(heads, rows)


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{after / before - 1:+.1%}"


def _pair(found: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    if found["split"] is None:
        return [("", found["trends"]["summary"][ALL])]
    return [(side, found[side][ALL]) for side in ("before", "after")]


def _entropies(found: dict[str, Any]) -> str:
    sides = _pair(found)
    rows = []
    for i, first in enumerate(sides[0][1]["by_entropy"]):
        bins = [row["by_entropy"][i] for _, row in sides]
        rows.append(
            [entropy_bin(first), *(cell for b in bins for cell in (percent(b["acceptance"]), f"{b['judged']:,}"))]
        )
    return table(["nats", *(h for side, _ in sides for h in (f"accepted {side}".strip(), "of"))], rows)


def _groups(found: dict[str, Any]) -> str:
    sides, tokens = _pair(found), found["tokens"]
    tested = tokens["by_group"] if tokens else {}
    rows = []
    for name in found["trends"]["groups"]:
        cells = [row["by_group"].get(name, {"rate": None, "judged": 0}) for _, row in sides]
        if any(cell["judged"] for cell in cells):
            counts = [text for cell in cells for text in (percent(cell["rate"]), f"{cell['judged']:,}")]
            rows.append([name, *counts, *_test(tested.get(name))])
    if tokens and found["split"] is not None:
        rows.append(["all", *[""] * (2 * len(sides)), *_test(tokens["all"])])
    heads = ["group", *(h for side, _ in sides for h in (f"rejected {side}".strip(), "of"))]
    said = (
        "<p>The token is the one that the target emitted where a proposal was judged. Figure and rates are of the traffic as it "
        "was: another mixture of requests moves them as another draft does. "
    )
    if tokens and found["split"] is not None:
        n = tokens["traces"]
        said += (
            f"The test pairs each token with itself: its rate of rejection after against before, in the same domain, for tokens "
            f"judged at least {MIN_JUDGED} times on both sides, in the {n['before']} traces of before and {n['after']} of after "
            "that are still in the replay buffer. Difference: weighted mean of the pairs. p: Wilcoxon's signed-rank test, "
            "two-sided, adjusted for the number of groups (Holm); positions of one answer depend on each other, which it "
            "does not know."
        )
        return table([*heads, "pairs", "difference", "p"], rows) + said + "</p>"
    return table(heads, [row[: len(heads)] for row in rows]) + said + "</p>"


def _test(compared: dict[str, Any] | None) -> list[str]:
    if compared is None:
        return ["-", "-", "-"]
    test = compared["test"]
    p = test.get("p_holm", test["p"])
    difference = "-" if test["difference"] is None else f"{test['difference'] * 100:+.1f} points"
    return [str(test["pairs"]), difference, "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"]


def shown(token: str) -> str:
    """A token as it is read: spaces made visible."""
    return "(empty)" if not token else token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


def _top(found: dict[str, Any]) -> str:
    tokens = found["tokens"]
    if not tokens:
        return "<p>No tokens are listed: the replay buffer holds no trace of the period, or there is no tokenizer.</p>"
    wanted = [
        [shown(t["token"]), t["group"], f"{t['rejected']:,}", f"{t['judged']:,}", percent(t["rate"])]
        for t in tokens["top_wanted"]
    ]
    offered = [
        [shown(t["token"]), t["group"], f"{t['rejected']:,}", f"{shown(t['mostly_for'])} ({t['of_them']:,})"]
        for t in tokens["top_proposed"]
    ]
    n = sum(tokens["traces"].values())
    text = f"<h2>Tokens rejected most</h2><p>Of {n:,} traces in the replay buffer.</p>"
    if offered:
        text += "<h3>Proposed and rejected</h3>" + table(("token", "group", "rejected", "mostly for"), offered)
    return (
        f"{text}<h3>What the target wanted where a proposal was rejected</h3>"
        f"{table(('token', 'group', 'rejected', 'judged', 'rate'), wanted)}"
    )


def _events(found: dict[str, Any]) -> str:
    events = found["trends"]["events"]
    listed: list[dict[str, Any]] = []
    for kind in sorted({event["kind"] for event in events}):
        listed += [event for event in events if event["kind"] == kind][-_EVENTS:]
    rows = [
        [utc(event["at"]), event["kind"].replace("_", " "), details(event)]
        for event in sorted(listed, key=lambda e: -float(e["at"]))
    ]
    more = f"<p>The newest {_EVENTS} of each kind.</p>" if len(listed) < len(events) else ""
    return f"<h2>Events</h2>{more}{table(('time, UTC', 'event', 'details'), rows)}" if rows else ""
