"""Prometheus metrics of the publishers, from their status: one of each server, by label `server`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_PREFIX = "adaptd_publisher_"


def publisher_metrics(statuses: Mapping[str, dict[str, Any]]) -> Iterator[Metric]:
    """Of `Publication.status` by server; of one that publishes nothing only that, and what failed."""
    yield _gauge("active", "1 if new versions are brought into the server.", _each(statuses, "active"))
    yield _counter("faults", "Failures of no known kind.", _each(statuses, "faults"))
    own = {server: status for server, status in statuses.items() if "published" in status}
    yield _gauge("version", "Version that the server drafts with; 0 is day 0.", _each(own, "version"))
    halted = {server: float(bool(status["halted"])) for server, status in own.items()}
    yield _gauge("halted", "1 if the target's checksums changed and nothing is published.", halted)
    yield _gauge("pause_seconds_max", "Longest pause of the server for an update.", _each(own, "max_pause_s"))
    when = {server: status["swapped_at"] for server, status in own.items() if status["swapped_at"] is not None}
    yield _gauge("last_published_timestamp_seconds", "Unix time of the last publication.", when)
    for key, text in (
        ("published", "Versions brought into the server."),
        ("restored", "Times that the version before, or a lost one, was brought back."),
        ("lost", "Times that the server no longer held its version."),
    ):
        yield _counter(key, text, _each(own, key))
    failed = CounterMetricFamily(f"{_PREFIX}failed_total", "Publications that failed.", labels=["server", "reason"])
    for server, status in own.items():
        for reason, count in status["failed"].items():
            failed.add_metric([server, reason], count)
    yield failed
    tensors = GaugeMetricFamily(
        f"{_PREFIX}target_tensors",
        "Tensors of the target, and those whose checksums are seen.",
        labels=["server", "kind"],
    )
    for server, status in own.items():
        if status["target_tensors_checked"]:
            checked, _, held = status["target_tensors_checked"].partition(" of ")
            tensors.add_metric([server, "checked"], float(checked))
            tensors.add_metric([server, "held"], float(held))
    yield tensors


def _each(statuses: Mapping[str, dict[str, Any]], key: str) -> dict[str, float]:
    return {server: float(status[key] or 0) for server, status in statuses.items()}


def _gauge(name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"{_PREFIX}{name}", text, labels=["server"])
    for server, value in values.items():
        family.add_metric([server], value)
    return family


def _counter(name: str, text: str, values: Mapping[str, float]) -> Metric:
    family = CounterMetricFamily(f"{_PREFIX}{name}_total", text, labels=["server"])
    for server, value in values.items():
        family.add_metric([server], value)
    return family
