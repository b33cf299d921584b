"""Prometheus metrics of the daemon, prefix `adaptd_`; base units, counters end in `_total`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from adaptd import __version__
from adaptd.app.publisher_metrics import publisher_metrics

if TYPE_CHECKING:
    from adaptd.app.adaptation import Adaptation


class Metrics:
    """Collects from the daemon's own counters at every scrape; nothing is counted twice."""

    def __init__(self, daemon: Adaptation) -> None:
        self._daemon = daemon
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def expose(self) -> bytes:
        """The text exposition."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Called by the registry."""
        daemon = self._daemon
        info = GaugeMetricFamily("adaptd_build_info", "Version of the daemon.", labels=["version", "deployment"])
        info.add_metric([__version__, daemon.config.deployment], 1)
        yield info
        yield _gauge("adaptd_uptime_seconds", "Seconds since the daemon started.", time.time() - daemon.started_at)
        yield _gauge("adaptd_draft_version", "Live draft version; 0 is day 0.", daemon.store.current() or 0)
        yield from self._requests()
        snapshot = daemon.snapshot
        if snapshot is not None:
            yield from _snapshot(snapshot)

    def _requests(self) -> Iterator[Metric]:
        names = {
            "requests": ("adaptd_requests_total", "Requests answered."),
            "tokens": ("adaptd_tokens_total", "Tokens emitted."),
            "rounds": ("adaptd_rounds_total", "Verification rounds; tokens per round is the mean acceptance length."),
            "proposed": ("adaptd_proposed_tokens_total", "Tokens proposed by the draft."),
            "accepted": ("adaptd_accepted_tokens_total", "Proposed tokens that were accepted."),
        }
        totals = self._daemon.monitor.totals()
        for key, (name, text) in names.items():
            family = CounterMetricFamily(name, text, labels=["domain"])
            for domain, counts in totals.items():
                family.add_metric([domain], counts[key])
            yield family
        for key, text in (
            ("reached", "Proposals that were judged, by their depth in the block."),
            ("accepted", "Proposals that were accepted, by their depth in the block."),
        ):
            family = CounterMetricFamily(f"adaptd_depth_{key}_total", text, labels=["domain", "depth"])
            for domain, depths in self._daemon.monitor.depths().items():
                for depth, value in enumerate(depths[key], 1):
                    family.add_metric([domain, str(depth)], value)
            yield family
        family = CounterMetricFamily("adaptd_drift_events_total", "Drift events.", labels=["domain"])
        for domain, count in self._daemon.monitor.drifts.items():
            family.add_metric([domain], count)
        yield family


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(name, text, value=value)


def _snapshot(status: dict[str, object]) -> Iterator[Metric]:
    """What only the actors and the buffer know, from the last status that was gathered."""
    decoders: list[dict[str, dict[str, float]]] = status["decoders"]  # type: ignore[assignment]
    yield _gauge("adaptd_decoders_up", "Decoder actors that take requests.", len(decoders))
    yield _counter("adaptd_decoders_lost_total", "Decoder actors that died.", float(status["decoders_lost"]))  # type: ignore[arg-type]
    for key, text in (("written", "Traces written."), ("dropped", "Traces dropped before the buffer.")):
        yield _counter(f"adaptd_traces_{key}_total", text, sum(d["writer"][key] for d in decoders))
    recalled = sum(d["engine"]["recalled"] for d in decoders)
    yield _gauge("adaptd_recalled_contexts", "Contexts that the decoders remember.", recalled)
    for key, name, text in (
        ("again", "answers_again", "Answers that idle decoders gave once more, to learn from."),
        ("alternatives", "traces_asked", "Traces about whose alternatives idle decoders asked the target."),
    ):
        yield _counter(f"adaptd_{name}_total", text, sum(d["engine"][key] for d in decoders))
    for key, text in (("swaps", "Hot swaps."), ("refusals", "Checkpoints refused at a swap.")):
        yield _counter(f"adaptd_swap_{key}_total", text, sum(d["swap"][key] for d in decoders))
    pauses = [d["swap"]["max_pause_s"] for d in decoders]
    yield _gauge("adaptd_swap_pause_seconds_max", "Longest pause of a hot swap.", max(pauses, default=0.0))
    series: dict[str, Any] = status["series"]  # type: ignore[assignment]
    yield _gauge("adaptd_series_available", "1 if the time series takes points.", float(series["error"] is None))
    yield _counter("adaptd_series_lost_requests_total", "Requests missing in the time series.", series["lost"])
    yield from _buffer(status["buffer"])  # type: ignore[arg-type]
    yield from _economics(status["economics"])  # type: ignore[arg-type]
    yield from _watch(status["watch"])  # type: ignore[arg-type]
    if "proxy" in status:
        yield from _proxy(status["proxy"], status["upstream"])  # type: ignore[arg-type]
        servers: list[dict[str, Any]] = status["upstream"]["servers"]  # type: ignore[index]
        yield from publisher_metrics({server["url"]: server["publisher"] for server in servers})
    learner: dict[str, float] | None = status["learner"]  # type: ignore[assignment]
    if learner is not None:
        for key, text in (
            ("ticks", "Times that it looked for something to learn and found it."),
            ("steps", "Optimiser steps."),
            ("skipped_steps", "Steps whose loss was not finite."),
            ("promoted", "Candidates promoted."),
            ("rejected", "Candidates rejected."),
            ("restarts", "Restarts of the learner from a published version."),
        ):
            yield _counter(f"adaptd_learner_{key}_total", text, learner[key])


def _buffer(buffer: dict[str, Any]) -> Iterator[Metric]:
    """Of the replay buffer; while it does not answer only that."""
    yield _gauge("adaptd_buffer_available", "1 if the replay buffer answers.", float(bool(buffer["available"])))
    if not buffer["available"]:
        return
    for key, name, text in (
        ("sizes", "traces", "Traces in the replay buffer."),
        ("bytes", "bytes", "Bytes of traces in the replay buffer; one in recent and anchors counts in both."),
    ):
        family = GaugeMetricFamily(f"adaptd_buffer_{name}", text, labels=["stratum"])
        for stratum, value in buffer[key].items():
            family.add_metric([stratum], value)
        yield family
    yield _gauge("adaptd_buffer_max_bytes", "What recent and anchors may take together.", buffer["max_bytes"])
    for key, text in (("inserted", "Traces inserted."), ("evicted", "Traces that left because of the budget.")):
        yield _counter(f"adaptd_buffer_{key}_total", text, buffer[f"{key}_total"])


def _economics(found: dict[str, Any]) -> Iterator[Metric]:
    """What is known of them; what is not is left out."""
    for key, name, text in (
        ("expected", "speedup_expected", "MAL / (1 + k c_d + c_v) from timed passes: below 1 speculation costs time."),
        ("measured", "speedup_measured", "Tokens a second with speculation over those without, from whole rounds."),
        ("break_even_mal", "speculation_break_even_mal", "MAL below which speculation costs time."),
        ("c_d", "draft_cost_ratio", "Draft step over target step (c_d)."),
        ("c_v", "verify_cost_ratio", "Extra cost of verifying k + 1 positions, in target steps (c_v)."),
        ("round_s", "round_seconds", "One round at the present load."),
    ):
        if found[key] is not None:
            yield _gauge(f"adaptd_{name}", text, found[key])
    if lengths := found.get("draft_lengths"):
        family = GaugeMetricFamily("adaptd_draft_length", "Tokens the draft proposes a round now.", labels=["domain"])
        for domain, k in lengths.items():
            family.add_metric([domain], k)
        yield family
    if found["pays"] is not None:
        yield _gauge(
            "adaptd_speculation_pays", "1 if speculation saves time at the present load.", float(found["pays"])
        )


def _watch(watch: dict[str, Any]) -> Iterator[Metric]:
    """Of the watch over promotions."""
    yield _counter("adaptd_versions_confirmed_total", "Versions that live acceptance confirmed.", watch["confirmed"])
    yield _counter("adaptd_rollbacks_total", "Times that live acceptance took versions back.", watch["rolled_back"])
    yield _gauge("adaptd_versions_watched", "Promoted versions that are not confirmed yet.", len(watch["watching"]))
    yield _gauge("adaptd_versions_quarantined", "Versions that may not be promoted.", len(watch["quarantined"]))


def _proxy(proxy: dict[str, Any], upstream: dict[str, Any]) -> Iterator[Metric]:
    """Of a daemon in front of a vLLM server."""
    yield _gauge("adaptd_upstream_up", "1 if the server behind the proxy answers.", float(upstream["up"]))
    for key, text in (
        ("requests", "Requests that reached the proxy."),
        ("aborted", "Clients that left before their answer was complete."),
        ("unreachable", "Requests that the server did not answer."),
        ("broken", "Answers that the server broke off."),
        ("rerouted", "Requests that another server took."),
        ("resent", "Requests sent again without additions after a refusal."),
        ("faults", "Failures of the proxy's own; the request went on without it."),
    ):
        yield _counter(f"adaptd_proxy_{key}_total", text, proxy[key])
    for key, name, text in (
        ("up", "up", "1 if this server answers and is not left out."),
        ("in_flight", "in_flight", "Requests that this server works on."),
        ("draft_version", "draft_version", "Draft version that this server has, as far as known."),
    ):
        each = GaugeMetricFamily(f"adaptd_upstream_server_{name}", text, labels=["server"])
        for server in upstream["servers"]:
            value = server["up"] and not server["left_out"] if key == "up" else server[key]
            each.add_metric([server["url"]], float(value))
        yield each
    capture = upstream["capture"]
    if capture["in_force"] is not None:
        yield _gauge("adaptd_capture_share", "Share of the last requests that were captured.", capture["in_force"])
    yield _gauge(
        "adaptd_capture_cost",
        "Part of a request's speed that capture costs at this load while it is on.",
        capture["cost"],
    )
    yield _gauge("adaptd_proxy_in_flight", "Requests being passed.", proxy["in_flight"])
    family = CounterMetricFamily("adaptd_proxy_uncaptured_total", "Requests not captured.", labels=["reason"])
    for reason, count in proxy["uncaptured"].items():
        family.add_metric([reason], count)
    yield family
    family = CounterMetricFamily("adaptd_proxy_traces_refused_total", "Answers without a trace.", labels=["reason"])
    for reason, count in {**proxy["refused"], "queue full": proxy["dropped"]}.items():
        family.add_metric([reason], count)
    yield family
