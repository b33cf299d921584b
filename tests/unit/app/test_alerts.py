"""The alert rules as Prometheus' own promtool reads and runs them, where it is installed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

ALERTS = Path(__file__).parents[3] / "configs" / "prometheus" / "alerts.yaml"
PROMTOOL = shutil.which("promtool")
pytestmark = pytest.mark.skipif(
    PROMTOOL is None, reason="no promtool (it comes with Prometheus): alert rules are not run"
)
WHERE = 'instance="a",job="adaptd"'

#: What is fed in, a value every five minutes; minutes until one looks; what fires then, by alert with labels beside WHERE.
CASES: dict[str, tuple[dict[str, str], int, set[str]]] = {
    "acceptance of one domain falls": (
        {
            'adaptd_proposed_tokens_total{WHERE,domain="math"}': "0+2000x312",
            'adaptd_accepted_tokens_total{WHERE,domain="math"}': "0+1000x288 288400+400x23",
            'adaptd_requests_total{WHERE,domain="math"}': "0+50x312",
            'adaptd_proposed_tokens_total{WHERE,domain="medical"}': "0+2000x312",
            'adaptd_accepted_tokens_total{WHERE,domain="medical"}': "0+1000x312",
            'adaptd_requests_total{WHERE,domain="medical"}': "0+50x312",
        },
        1530,
        {"AdaptdAcceptanceFallen domain=math"},
    ),
    "few requests say little": (
        {
            'adaptd_proposed_tokens_total{WHERE,domain="math"}': "0+2000x312",
            'adaptd_accepted_tokens_total{WHERE,domain="math"}': "0+1000x288 288400+400x23",
            'adaptd_requests_total{WHERE,domain="math"}': "0+5x312",
        },
        1530,
        set(),
    ),
    "a daemon that was there is gone, another target never was one": (
        {"up{WHERE}": "1x4 0x4", "adaptd_uptime_seconds{WHERE}": "0+300x4", 'up{instance="b",job="node"}': "0x8"},
        30,
        {"AdaptdDown"},
    ),
    "the learner stands still while traces come": (
        {"adaptd_learner_ticks_total{WHERE}": "0+5x12 60x36", "adaptd_traces_written_total{WHERE}": "0+250x48"},
        210,
        {"AdaptdLearnerStopped"},
    ),
    "without traces there is nothing to learn": (
        {"adaptd_learner_ticks_total{WHERE}": "60x48", "adaptd_traces_written_total{WHERE}": "50x48"},
        210,
        set(),
    ),
    "requests pass and none is captured": (
        {"adaptd_proxy_requests_total{WHERE}": "0+50x24", "adaptd_traces_written_total{WHERE}": "7x24"},
        90,
        {"AdaptdNothingCaptured"},
    ),
    "one in ten traces is dropped": (
        {"adaptd_traces_written_total{WHERE}": "0+450x12", "adaptd_traces_dropped_total{WHERE}": "0+50x12"},
        40,
        {"AdaptdCaptureDropping"},
    ),
    "one in a hundred is not worth a word": (
        {"adaptd_traces_written_total{WHERE}": "0+495x12", "adaptd_traces_dropped_total{WHERE}": "0+5x12"},
        40,
        set(),
    ),
    "the gate promotes nothing": (
        {"adaptd_learner_promoted_total{WHERE}": "3x320", "adaptd_learner_rejected_total{WHERE}": "0+0.5x320"},
        1560,
        {"AdaptdNothingPromoted"},
    ),
    "speculation does not pay, the buffer is away, a version went back": (
        {
            "adaptd_speculation_pays{WHERE}": "0x12",
            "adaptd_buffer_available{WHERE}": "0x12",
            "adaptd_series_available{WHERE}": "0x12",
            "adaptd_rollbacks_total{WHERE}": "0x6 1x6",
            "adaptd_versions_quarantined{WHERE}": "0x6 1x6",
        },
        40,
        {"AdaptdSpeculationDoesNotPay", "AdaptdBufferUnavailable", "AdaptdSeriesUnavailable", "AdaptdRolledBack"},
    ),
    "drift": ({'adaptd_drift_events_total{WHERE,domain="all"}': "0x6 1x6"}, 40, {"AdaptdDrift domain=all"}),
    "one server of two is down and the other halted": (
        {
            "adaptd_upstream_up{WHERE}": "1x6",
            'adaptd_upstream_server_up{WHERE,server="x"}': "1x6",
            'adaptd_upstream_server_up{WHERE,server="y"}': "0x6",
            'adaptd_publisher_halted{WHERE,server="x"}': "1x6",
            'adaptd_publisher_halted{WHERE,server="y"}': "0x6",
            'adaptd_publisher_failed_total{WHERE,server="x",reason="refused"}': "0+5x6",
        },
        25,
        {
            "AdaptdServerDown server=y",
            "AdaptdPublisherHalted server=x",
            "AdaptdPublishingFails reason=refused server=x",
        },
    ),
    "a daemon that does well": (
        {
            "up{WHERE}": "1x60",
            "adaptd_uptime_seconds{WHERE}": "0+300x60",
            "adaptd_decoders_up{WHERE}": "1x60",
            "adaptd_buffer_available{WHERE}": "1x60",
            "adaptd_series_available{WHERE}": "1x60",
            "adaptd_series_lost_requests_total{WHERE}": "3x60",
            "adaptd_speculation_pays{WHERE}": "1x60",
            "adaptd_learner_ticks_total{WHERE}": "0+5x60",
            "adaptd_learner_promoted_total{WHERE}": "0+0.1x60",
            "adaptd_learner_rejected_total{WHERE}": "0+0.25x60",
            "adaptd_learner_restarts_total{WHERE}": "1x60",
            "adaptd_learner_skipped_steps_total{WHERE}": "0x60",
            "adaptd_traces_written_total{WHERE}": "0+250x60",
            "adaptd_traces_dropped_total{WHERE}": "0x60",
            "adaptd_swap_refusals_total{WHERE}": "0x60",
        },
        290,
        set(),
    ),
}


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert PROMTOOL is not None
    return subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_promtool_takes_the_rules() -> None:
    found = promtool("check", "rules", str(ALERTS))
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    assert found.returncode == 0, found.stderr
    assert f"{len(rules)} rules found" in found.stdout


def fired(name: str, severities: Mapping[str, str]) -> dict[str, object]:
    alert, *labels = name.split()
    more = "".join(f',{key}="{value}"' for key, value in (label.split("=") for label in labels))
    about = f'alertname="{alert}",alertstate="firing",severity="{severities[alert]}"'
    return {"labels": f"ALERTS{{{about},{WHERE}{more}}}", "value": 1}


def test_each_alert_fires_when_it_should_and_not_otherwise(tmp_path: Path) -> None:
    groups = yaml.safe_load(ALERTS.read_text())["groups"]
    severities = {rule["alert"]: rule["labels"]["severity"] for group in groups for rule in group["rules"]}
    tests = [
        {
            "name": name,
            "interval": "5m",
            "input_series": [
                {"series": series.replace("WHERE", WHERE), "values": values} for series, values in fed.items()
            ],
            "promql_expr_test": [
                {
                    "expr": 'ALERTS{alertstate="firing"}',
                    "eval_time": f"{minutes}m",
                    "exp_samples": [fired(alert, severities) for alert in sorted(expected)],
                }
            ],
        }
        for name, (fed, minutes, expected) in CASES.items()
    ]
    file = tmp_path / "test.yaml"
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "5m", "tests": tests}))
    found = promtool("test", "rules", str(file))
    assert found.returncode == 0, found.stdout + found.stderr
