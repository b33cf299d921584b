"""The dashboard in a real browser: what it shows, live, by keyboard, on a phone, and when the daemon goes away."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from adaptd.server.app import LINGER_S
from tests import samples
from tests.browser.conftest import OpenPage, Served
from tests.browser.devtools import Page

CHART = "!!trends.plot && trends.plot.status === 1"


@pytest.fixture(autouse=True)
def reset(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "served" in request.fixturenames:
        request.getfixturevalue("served").tell(shape="native", draining=False)


def opened(open_page: OpenPage, served: Served, shape: str = "native", hash: str = "", **options: Any) -> Page:
    served.tell(shape=shape)
    page = open_page(f"{served.url}/{hash}", **options)
    page.wait("document.body.dataset.link === 'stream'")
    page.wait(CHART)
    return page


def words(page: Page, selector: str) -> str:
    return re.sub(r"\s+", " ", page.text(selector))


def test_everything_of_a_native_daemon_is_shown(open_page: OpenPage, served: Served) -> None:
    page = opened(open_page, served)
    assert page.text("#state") == "serving"
    assert "support-chat" in page.text("#about")
    for there in ("draft version", "2.04", "learner steps", "1,968", "1.40×"):
        assert there in words(page, "#tiles")
    assert [row.split()[0] for row in page.js("[...domains.tBodies[0].rows].map(r => r.textContent)")] != []
    assert page.js("domains.tBodies[0].rows.length") == len(samples.DOMAINS) + 1
    assert page.js("depth.tHead.rows[0].cells.length") == samples.K + 2
    assert re.search(r"medical ?7\d %", words(page, "#depth tbody"))
    assert "Yes: tokens come 1.40 times as fast" in page.text("#verdict")
    assert "version 7 against version 6: 140 of 400 requests; 44.7 % accepted" in words(page, "#versions")
    assert "version 3: live acceptance of tools fell" in page.text("#versions .bad")
    assert "+9.4 % [+6.4 %, +12.4 %]" in words(page, "#verdicts")
    assert "math loses 4.1 %" in words(page, "#verdicts")
    assert "18,400" in words(page, "#buffer")
    assert "before 0.510" in words(page, "#events")
    assert page.js("['servers-card', 'publisher-card', 'proxy-card'].every(id => document.getElementById(id).hidden)")
    assert page.text("#notices") == ""
    assert not page.troubles()


def test_names_from_outside_are_text(open_page: OpenPage, served: Served) -> None:
    page = opened(open_page, served)
    assert "<b>code</b>" in page.text("#domains")
    assert "<b>code</b>" in page.text("#legend")
    assert page.js("document.querySelectorAll(':is(td, th, button, dd, li, #readout, #about) b').length") == 0


def test_several_servers_are_shown_with_their_roles_and_publishers(open_page: OpenPage, served: Served) -> None:
    page = opened(open_page, served, "vllm")
    rows = page.js("[...servers.tBodies[0].rows].map(r => [...r.cells].map(c => c.innerText))")
    assert [row[0] for row in rows] == list(samples.URLS)
    assert rows[0][1].startswith("up since")
    assert rows[2][1].startswith("down: ConnectError")
    assert [row[2] for row in rows] == ["canary: new drafts first", "follows the canary", "follows the canary"]
    assert [row[4] for row in rows] == ["7", "6", "0"]
    assert rows[0][6].startswith("version 7, brought in")
    assert "published7; restored 0" in words(page, "#publisher")
    assert "top 20 of 75 % of the requests captured (not in the share)" in words(page, "#servers-note")
    assert "opted out 120" in words(page, "#proxy")
    assert "does not pay" in page.text("#notices")
    assert "No: tokens would come 1.13 times as fast without it." in page.text("#verdict")
    assert f"Without requests: {samples.URLS[2]}" in page.text("#notices")
    assert not page.troubles()


def test_the_stream_brings_changes_without_another_request(open_page: OpenPage, served: Served) -> None:
    page = opened(open_page, served)
    page.js("window.kept = document.getElementById('when')")
    before = sum(url.endswith("/adaptd/status") for url in page.requested())
    served.tell(in_flight=77, buffer={"available": False, "error": "refused"})
    page.wait("tiles.textContent.includes('77')")
    assert "unavailable: refused (serving goes on)" in page.text("#buffer-note")
    assert "nothing is learned until it is back" in page.text("#notices")
    assert sum(url.endswith("/adaptd/status") for url in page.requested()) == before == 0


def test_a_promotion_while_one_looks_appears_in_the_chart(open_page: OpenPage, served: Served) -> None:
    page = opened(open_page, served)
    asked = sum("since=" in url for url in page.requested())
    served.tell(events=[{"at": 1_700_000_000, "kind": "promoted", "version": 8}])
    page.wait("events.textContent.includes('version 8')")
    page.wait(f"performance.getEntriesByType('resource').filter(r => r.name.includes('since=')).length > {asked}")
    assert not page.troubles()


def test_where_event_streams_fail_the_page_polls_and_says_what_is_wrong(open_page: OpenPage, served: Served) -> None:
    page = opened(open_page, served)
    page.js("PACE.again = 1000")
    served.tell(draining=True)
    page.wait("document.body.dataset.link === 'poll' && state.textContent === 'draining'")
    served.tell(draining=False, in_flight=41)
    page.wait("tiles.textContent.includes('41') && state.textContent === 'serving'")
    assert page.wait("document.body.dataset.link === 'stream'")


def test_without_event_source_the_page_polls(open_page: OpenPage, served: Served) -> None:
    page = open_page("about:blank")
    page.call("Page.addScriptToEvaluateOnNewDocument", source="delete window.EventSource")
    page.open(f"{served.url}/")
    page.wait("document.body.dataset.link === 'poll' && tiles.textContent.includes('2.04')")
    served.tell(in_flight=55)
    page.wait("tiles.textContent.includes('55')")
    assert page.js("document.body.dataset.link") == "poll"
    assert not any(url.endswith("/adaptd/stream") for url in page.requested())


def test_viewers_do_not_hold_up_a_daemon_that_stops(open_page: OpenPage, fresh: Served) -> None:
    page = opened(open_page, fresh)
    assert fresh.stop() < 5
    page.wait("document.body.classList.contains('stale')")
    assert re.match(r"no status \(.+\); shown: ", page.text("#state"))


@pytest.mark.slow
def test_a_viewer_that_sleeps_does_not_hold_up_a_daemon_that_stops(fresh: Served) -> None:
    host, port = fresh.url.removeprefix("http://").split(":")
    with socket.socket() as viewer:
        viewer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        viewer.connect((host, int(port)))
        fresh.tell(events=[{"at": 0, "kind": "more than the connection holds", "text": "x" * 12_000_000}])
        viewer.sendall(b"GET /adaptd/stream HTTP/1.1\r\nhost: adaptd\r\n\r\n")
        assert viewer.recv(15) == b"HTTP/1.1 200 OK"
        time.sleep(3)
        assert fresh.stop(seconds=30) < LINGER_S + 5


def test_the_period_is_chosen_by_keyboard_and_stays_in_the_address(open_page: OpenPage, served: Served) -> None:
    page = opened(open_page, served)
    assert page.js("chosen('period')") == "6h"
    page.js("document.querySelector('input[name=period]:checked').focus()")
    page.press("ArrowRight", 39)
    page.wait("trends.data.since === '24h'")
    assert page.js("location.hash") == "#24h"
    again = opened(open_page, served, hash="#30d")
    again.wait("trends.data.since === '30d'")
    assert again.js("chosen('period')") == "30d"


def test_points_of_the_chart_are_read_by_keyboard(open_page: OpenPage, served: Served) -> None:
    page = opened(open_page, served, hash="#24h")
    page.js("document.getElementById('when').focus()")
    page.press("Home", 36)
    first = page.wait("document.getElementById('when').value === '0' && readout.textContent")
    assert re.match(r"(\d+ \w+|\w+ \d+) \d\d:\d\d: all \d\.\d\d \([\d,]+ requests\), <b>code</b> \d\.\d\d", first)
    assert page.js("document.getElementById('when').getAttribute('aria-valuetext')") == first
    page.press("ArrowRight", 39)
    assert page.wait(f"readout.textContent !== {first!r} && readout.textContent")
    spoken = page.js("""(() => {
      const slider = document.getElementById("when"), { at, step_s, events } = trends.data;
      const drift = events.find(e => e.kind === "drift"), i = at.findIndex(t => drift.at < t + step_s);
      slider.value = i; slider.dispatchEvent(new Event("input")); return slider.getAttribute("aria-valuetext");
    })()""")
    assert spoken.endswith("◆ drift math")


def test_many_buckets_are_drawn_as_fewer_without_changing_what_they_say(open_page: OpenPage, served: Served) -> None:
    page = opened(open_page, served, hash="#24h")
    assert page.js("[trends.data.step_s, trends.data.at.length <= 146]") == [600, True]
    total = "Object.values(trends.data.domains).map(d => d.requests.reduce((a, b) => a + b))"
    whole = page.js("ask('/adaptd/status?since=24h').then(s => s.trends)")
    assert page.js(total) == [sum(d["requests"]) for d in whole["domains"].values()]
    bucket = {
        "requests": [1, 2, 0],
        "tokens": [30, 10, 0],
        "mal": [3.0, 1.0, None],
        "token_acceptance": [0.5, 0.0, None],
    }
    many = {name: values + values[-1:] * 359 for name, values in bucket.items()}
    script = f"coarser({json.dumps({'step_s': 60, 'at': list(range(0, 362 * 60, 60)), 'domains': {'x': many}})})"
    found = page.js(script.replace("None", "null"))["domains"]["x"]
    assert found["requests"][:2] == [3, 0]
    assert found["mal"][:2] == [40 / 20, None], "40 tokens in 10 + 10 rounds"
    assert found["token_acceptance"][0] == 0.25


def test_domains_are_switched_off_and_on_and_figures_follow_the_measure(open_page: OpenPage, served: Served) -> None:
    page = opened(open_page, served)
    names = page.js("[...legend.children].map(b => b.textContent)")
    assert names == ["all", *sorted(samples.DOMAINS)]
    page.js("[...legend.children].find(b => b.textContent === 'math').focus()")
    page.press("Enter", 13)
    page.call("Input.dispatchKeyEvent", type="char", text="\r")
    page.wait("trends.plot.series.every(s => s.label !== 'math')")
    assert page.js("marked().every(e => e.domain !== 'math')"), "its drift goes with it"
    assert "math" not in page.text("#readout")
    page.js("document.querySelector('input[value=token_acceptance]').click()")
    assert re.search(r"all \d+\s%", page.text("#readout"))
    assert "Share of tokens accepted over 6h" in page.js("chart.getAttribute('aria-label')")
    assert page.js("marks.tBodies[0].rows.length") == 8


def test_every_control_is_reached_by_tab_and_its_focus_is_seen(open_page: OpenPage, served: Served) -> None:
    page = opened(open_page, served)
    reached = []
    for _ in range(40):
        page.press("Tab", 9)
        reached.append(
            page.js("""(() => {
          const at = document.activeElement, on = at.matches(".choice input") ? at.nextElementSibling : at;
          const name = at.id || at.name || at.className || at.tagName, style = getComputedStyle(on);
          return [name, style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2];
        })()""")
        )
        if reached[-1][0] == "BODY":
            break
    names = [name for name, _ in reached]
    for name in ("skip", "measure", "period", "when", "c0", "c1", "SUMMARY", "scroll"):
        assert name in names, names
    assert all(seen for name, seen in reached if name != "BODY"), reached


def test_every_control_and_figure_has_a_name(open_page: OpenPage, served: Served) -> None:
    page = opened(open_page, served, "vllm")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    named = [(n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if not n.get("ignored")]
    roles = {"button", "radio", "slider", "image", "region", "table", "columnheader", "rowheader", "heading", "status"}
    assert roles <= {role for role, _ in named} | {"table"}
    assert [role for role, name in named if role in roles - {"table", "status"} and not name.strip()] == []
    assert any(role == "radio" and name == "7 d" for role, name in named)


@pytest.mark.parametrize("shape", ["native", "vllm"])
def test_a_phone_shows_everything_without_scrolling_sideways(open_page: OpenPage, served: Served, shape: str) -> None:
    page = opened(open_page, served, shape, width=360, height=740)
    assert page.js("document.documentElement.scrollWidth") <= 360
    assert page.js("trends.plot.width") <= 336
    cut = page.js("""[...document.querySelectorAll("main :is(td, dd, p, li, h2, .tile b)")].filter(n => n.checkVisibility() &&
      !n.closest("#depth, #buffer") && n.getBoundingClientRect().right > innerWidth + 1).map(n => n.textContent)""")
    assert cut == []
    small = page.js("""[...document.querySelectorAll(".choice label, .legend button, input[type=range]")]
      .map(n => n.getBoundingClientRect()).filter(b => b.height < 16 || b.width < 24).length""")
    assert small == 0
    roles = page.js("[...domains.querySelectorAll('[role]')].map(n => n.getAttribute('role'))")
    assert {"row", "cell", "rowheader", "columnheader"} <= set(roles), (
        "rows as blocks are rows to a screen reader still"
    )
    assert page.js("getComputedStyle(domains.tBodies[0].rows[0].cells[1], '::before').content") == '"requests, 24 h"'


def test_words_stand_out_from_their_ground_by_day_and_by_night(open_page: OpenPage, served: Served) -> None:
    contrast = """(() => {
      const lum = c => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
        .map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4); return .2126 * r + .7152 * g + .0722 * b; };
      const ground = n => { for (; n; n = n.parentElement) { const c = getComputedStyle(n).backgroundColor;
        if (!/, 0\\)$/.test(c)) return c; } return getComputedStyle(document.body).backgroundColor; };
      return [...document.querySelectorAll("main *, header *")].filter(n => n.checkVisibility() &&
        [...n.childNodes].some(c => c.nodeType === 3 && c.data.trim())).map(n => {
          const [a, b] = [lum(getComputedStyle(n).color), lum(ground(n))].sort((x, y) => y - x);
          return [(a + .05) / (b + .05), n.textContent.slice(0, 40)]; }).sort((x, y) => x[0] - y[0])[0];
    })()"""
    grounds = set()
    for dark in (False, True):
        page = opened(open_page, served, "vllm", dark=dark)
        worst, text = page.js(contrast)
        assert worst >= 4.5, (dark, worst, text)
        grounds.add(page.js("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


def test_a_young_daemon_has_little_to_tell(open_page: OpenPage, served: Served) -> None:
    served.tell(shape="young")
    page = open_page(f"{served.url}/")
    page.wait("document.body.dataset.link === 'stream' && !document.getElementById('chart-note').hidden")
    assert "No history yet" in page.text("#chart-note")
    assert "no requests yet" in page.text("#domains")
    assert not page.troubles()


def test_a_history_that_is_away_says_why_and_comes_back(open_page: OpenPage, served: Served) -> None:
    served.tell(trends={"at": [], "domains": {}, "events": [], "error": "Redis refused"})
    page = open_page(f"{served.url}/")
    page.wait("document.getElementById('chart-note').textContent === 'No history: Redis refused'")
    assert page.js("document.getElementById('trends').hidden")
    served.tell()
    page.js("loadTrends()")
    page.wait(CHART)
    assert page.js("document.getElementById('chart-note').hidden")


def test_a_refusal_is_shown_in_the_daemons_own_words(open_page: OpenPage, served: Served) -> None:
    served.tell(refuse="there are no trends, since trends.enabled is false: set it to true")
    page = open_page(f"{served.url}/")
    page.wait("document.getElementById('chart-note').textContent.endsWith('trends.enabled is false: set it to true')")
    page.wait("document.body.dataset.link === 'stream'")
    assert page.js("document.getElementById('trends').hidden")


def test_nothing_is_asked_of_another_machine_and_nothing_moves_where_that_is_not_wanted(
    open_page: OpenPage, served: Served
) -> None:
    page = opened(open_page, served)
    assert {url.split("/")[2] for url in page.requested() if not url.startswith("data:")} == {served.url.split("/")[2]}
    still = {"name": "prefers-reduced-motion", "value": "reduce"}
    page.call("Emulation.setEmulatedMedia", features=[still])
    assert page.js("document.getAnimations().length") == 0
    assert page.js("getComputedStyle(document.querySelector('.card')).transitionDuration") == "0s"
