"""Prometheus metrics of the publisher, from its status."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

_PREFIX = "adaptd_publisher_"


def publisher_metrics(status: dict[str, Any]) -> Iterator[Metric]:
    """Of `Publication.status`; without a publisher only that there is none."""
    yield _gauge("active", "1 if new versions are brought into the server.", float(status["active"]))
    yield CounterMetricFamily(f"{_PREFIX}faults_total", "Failures of no known kind.", value=status["faults"])
    if "published" not in status:
        return
    yield _gauge("version", "Version that the server drafts with; 0 is day 0.", status["version"] or 0)
    yield _gauge(
        "halted", "1 if the target's checksums changed and nothing is published.", float(bool(status["halted"]))
    )
    yield _gauge("pause_seconds_max", "Longest pause of the server for an update.", status["max_pause_s"])
    if status["swapped_at"] is not None:
        yield _gauge("last_published_timestamp_seconds", "Unix time of the last publication.", status["swapped_at"])
    for key, text in (
        ("published", "Versions brought into the server."),
        ("restored", "Times that the version before, or a lost one, was brought back."),
        ("lost", "Times that the server no longer held its version."),
    ):
        yield CounterMetricFamily(f"{_PREFIX}{key}_total", text, value=status[key])
    failed = CounterMetricFamily(f"{_PREFIX}failed_total", "Publications that failed.", labels=["reason"])
    for reason, count in status["failed"].items():
        failed.add_metric([reason], count)
    yield failed
    if status["target_tensors_checked"]:
        checked, _, held = status["target_tensors_checked"].partition(" of ")
        tensors = GaugeMetricFamily(
            f"{_PREFIX}target_tensors", "Tensors of the target, and those whose checksums are seen.", labels=["kind"]
        )
        tensors.add_metric(["checked"], float(checked))
        tensors.add_metric(["held"], float(held))
        yield tensors


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"{_PREFIX}{name}", text, value=value)
