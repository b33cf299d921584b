"""/metrics of real daemons, and that Grafana's dashboard and the alert rules ask for nothing that is not in it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from adaptd.app.metrics import Metrics
from adaptd.config import Config
from adaptd.events import CATALOGUE
from adaptd.report import economics
from adaptd.sidecar.load import Load
from tests import samples

CONFIGS = Path(__file__).parents[3] / "configs"
BOARD = CONFIGS / "grafana" / "adaptd.json"
ALERTS = CONFIGS / "prometheus" / "alerts.yaml"
#: Prometheus' own.
OTHERS = {"up"}
Samples = dict[str, list[dict[str, str]]]


def exposed(daemon: Any) -> tuple[str, Samples]:
    """The text, and labels of the samples by name."""
    text = Metrics(daemon).expose().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
        found.setdefault(family.name + ("_total" if family.type == "counter" else ""), [])
    return text, found


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Samples]]:
    now, found = time.time(), {}
    for name, make in (("native", samples.native), ("choosing", samples.choosing), ("vllm", samples.sidecar)):
        daemon = make(tmp_path_factory.mktemp(name), now)
        asyncio.run(daemon.status())
        assert daemon.snapshot is not None
        if name == "vllm":
            daemon.snapshot["economics"] = economics.behind_proxy(Load(0.031, 1.92, 24.0, 4000.0), 70.0, samples.K)
        found[name] = exposed(daemon)
    return found


@pytest.fixture(scope="module")
def known(daemons: dict[str, tuple[str, Samples]]) -> Samples:
    merged: Samples = {}
    for _, found in daemons.values():
        for name, labels in found.items():
            merged.setdefault(name, []).extend(labels)
    return merged


def test_publishers_are_told_apart_by_their_server(daemons: dict[str, tuple[str, Samples]]) -> None:
    text, found = daemons["vllm"]
    assert [labels["server"] for labels in found["adaptd_publisher_active"]] == list(samples.URLS)
    first, second, _ = samples.URLS
    assert f'adaptd_publisher_published_total{{server="{first}"}} 7.0' in text
    assert f'adaptd_publisher_published_total{{server="{second}"}} 6.0' in text
    assert f'adaptd_publisher_failed_total{{reason="refused",server="{second}"}} 1.0' in text
    assert f'adaptd_upstream_server_up{{server="{samples.URLS[2]}"}} 0.0' in text
    assert len(found["adaptd_publisher_last_published_timestamp_seconds"]) == 2, "the third has none"


def test_acceptance_by_depth_adds_up_to_what_was_accepted(daemons: dict[str, tuple[str, Samples]]) -> None:
    text, _ = daemons["native"]
    by_depth = [
        float(x) for x in re.findall(r'^adaptd_depth_accepted_total{.*domain="math".*} (.+)$', text, re.MULTILINE)
    ]
    (whole,) = re.findall(r'^adaptd_accepted_tokens_total{domain="math"} (.+)$', text, re.MULTILINE)
    assert len(by_depth) == samples.K
    assert sum(by_depth) == float(whole) > 0


def test_the_chosen_draft_length_is_there_where_it_is_chosen(daemons: dict[str, tuple[str, Samples]]) -> None:
    """Two decoders, one at 3 and one at 4 for medical: their mean."""
    text, _ = daemons["choosing"]
    assert 'adaptd_draft_length{domain="math"} 0.0' in text
    assert 'adaptd_draft_length{domain="medical"} 3.5' in text
    assert "adaptd_draft_length" not in daemons["native"][1]


def test_while_the_buffer_is_away_only_that_is_told(tmp_path: Path) -> None:
    daemon = samples.native(tmp_path, time.time())
    asyncio.run(daemon.status())
    assert daemon.snapshot is not None
    daemon.snapshot["buffer"] = {"available": False, "error": "refused"}
    text, found = exposed(daemon)
    assert "adaptd_buffer_available 0.0" in text
    assert "adaptd_buffer_bytes" not in found


def selectors(expression: str) -> list[tuple[str, str]]:
    """Names of metrics in PromQL with what is between the braces behind them."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    bare = re.sub(r"\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|on|without|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
    words = re.finditer(r"(?<![\w$])([a-z_]\w*)(?:\{([^}]*)\})?(?!\w|\s*[({])", bare)
    inside = [(m.start(), m.end()) for m in re.finditer(r"\{[^}]*\}", bare)]
    return [
        (word[1], word[2] or "")
        for word in words
        if word[1] not in ("and", "or", "unless", "bool", "offset")
        and not any(start < word.start() < end for start, end in inside)
    ]


def assert_known(expression: str, known: Samples, where: str) -> None:
    found = list(selectors(expression))
    assert found, f"{where}: no metric in {expression}"
    for name, matchers in found:
        assert name in known or name in OTHERS, f"{where}: {name} is not in /metrics"
        for label in re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers):
            assert label in ("instance", "job") or all(label in labels for labels in known[name]), f"{where}: {label}"
    for labels in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression):
        for label in re.split(r"\s*,\s*", labels.strip()):
            assert label in ("instance", "job") or any(
                label in have for name, _ in found for have in known.get(name, [])
            ), f"{where}: nothing has the label {label}"


def test_names_are_found_in_promql() -> None:
    text = 'sum by (domain) (rate(adaptd_a_total{x=~"$y z"}[5m])) / adaptd_b and on (job, instance) (up == 0) > 0.5 * c_d[1d]'
    assert [name for name, _ in selectors(text)] == ["adaptd_a_total", "adaptd_b", "up", "c_d"]
    with pytest.raises(AssertionError, match="adaptd_wrong is not in"):
        assert_known("rate(adaptd_wrong[5m])", {}, "here")
    with pytest.raises(AssertionError, match="domian"):
        assert_known("sum by (domian) (adaptd_a)", {"adaptd_a": [{"domain": "x"}]}, "here")


def test_the_grafana_dashboard_asks_for_what_there_is_and_for_everything(known: Samples) -> None:
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    asked = set()
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            assert_known(target["expr"], known, panel["title"])
            asked |= {name for name, _ in selectors(target["expr"])}
    for note in board["annotations"]["list"]:
        assert_known(note["expr"], known, note["name"])
    for variable in board["templating"]["list"][1:]:
        assert_known(re.sub(r"^label_values\((.*), \w+\)$", r"\1", variable["definition"]), known, variable["name"])
    left_out = {name for name in known if name.startswith("adaptd_") and not name.endswith("_created")} - asked
    assert left_out <= {"adaptd_build_info"}, "a metric that no panel shows"


def test_the_grafana_dashboard_is_one_and_takes_its_data_source_from_the_reader() -> None:
    board = json.loads(BOARD.read_text(encoding="utf-8"))
    assert {"title", "uid", "schemaVersion", "panels", "templating", "annotations", "time"} <= set(board)
    assert board["templating"]["list"][0] == {
        **board["templating"]["list"][0],
        "type": "datasource",
        "name": "datasource",
    }
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    variables = {v["name"] for v in board["templating"]["list"]} | {"__rate_interval"}
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, f"{panel['title']} lies over another panel"
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["type"] in ("row", "timeseries", "stat")
        if panel["type"] == "row":
            continue
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= variables
        letters = [target["refId"] for target in panel["targets"]]
        assert len(letters) == len(set(letters))


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_alert_rules_ask_for_what_there_is_and_say_what_to_do(known: Samples) -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names)) >= 20
    for rule in rules():
        assert set(rule) == {"alert", "expr", "for", "labels", "annotations"}, rule["alert"]
        assert_known(rule["expr"], known, rule["alert"])
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "runbook"}
        assert len(rule["annotations"]["runbook"]) > 40
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            metrics = [name for name, _ in selectors(rule["expr"])]
            assert label == "instance" or any(label in have for name in metrics for have in known[name]), rule["alert"]


def test_what_alerts_name_in_their_runbooks_exists() -> None:
    sections = Config.model_fields
    for rule in rules():
        text = rule["annotations"]["runbook"]
        for event in re.findall(r"`(\w+\.\w+)`", text):
            assert event in CATALOGUE, (rule["alert"], event)
        for section, key in re.findall(r"\b(\w+)\.([a-z_]+)\b", re.sub(r"`[^`]*`|docs/\w+\.md", "", text)):
            if section in sections:
                assert key in sections[section].annotation.model_fields, (rule["alert"], section, key)  # type: ignore[union-attr]
        for page in re.findall(r"docs/\w+\.md", text):
            assert (CONFIGS.parent / page).is_file(), page
