"""Real daemons that were not started, with what a day of traffic leaves in them: for the dashboard and for /metrics."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import time
from pathlib import Path
from typing import Any

from adaptd.app.daemon import Daemon
from adaptd.app.sidecar import SidecarDaemon
from adaptd.config import load
from adaptd.decoding.loop_stats import LoopStats
from adaptd.report import economics
from adaptd.report.monitor import Finished, Monitor
from adaptd.sidecar.load import Load
from adaptd.sidecar.probe import Capabilities
from buffers.open import open_table
from buffers.writer import WriterStats

K = 4
#: Acceptance of a proposal by domain, before and after the draft has learned it; the last asks for text, not markup.
DOMAINS = {"medical": (0.72, 0.74), "math": (0.24, 0.52), "tools": (0.15, 0.45), "<b>code</b>": (0.31, 0.41)}
#: Seconds, and seconds of a bucket, as the series has them.
PERIODS = {"1h": (3600, 60), "6h": (21600, 60), "24h": (86400, 60), "7d": (604800, 900), "30d": (2592000, 7200)}
URLS = ("http://10.0.0.1:8000", "http://10.0.0.2:8000", "http://10.0.0.3:8000")


def traffic(monitor: Monitor, now: float, seed: int = 0) -> None:
    """Twenty hours of requests, which the draft serves better and better."""
    rng, clock = random.Random(seed), {"at": now}
    monitor._clock = lambda: clock["at"]
    for i in range(1500):
        clock["at"] = now - 72000 * (1 - i / 1500)
        domain = rng.choice(list(DOMAINS))
        before, after = DOMAINS[domain]
        reached, accepted, rounds = [0] * K, [0] * K, 24
        for _ in range(rounds):
            for depth in range(K):
                reached[depth] += 1
                if rng.random() > (before if i < 500 else after) - 0.03 * depth:
                    break
                accepted[depth] += 1
        total = sum(accepted)
        monitor.observe(Finished(domain, rounds + total, rounds, K * rounds, total, tuple(reached), tuple(accepted), 7))
    monitor._clock = time.time


def interval(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.03, "high": mean + 0.03}


def learner(now: float) -> dict[str, Any]:
    """As `LearnerCycle.status` gives it."""
    verdicts = [
        (None, -0.004, "the lower bound of the gain, -3.4 %, is not above 0.0 %"),
        (6, 0.061, "gain +6.1 % [+3.1 %, +9.1 %] on 240 traces"),
        (None, 0.02, "math loses 4.1 %, more than 2.0 %"),
        (7, 0.094, "gain +9.4 % [+6.4 %, +12.4 %] on 251 traces"),
    ]
    history = [
        {
            "reason": reason,
            "steps": 48,
            "loss": 0.61 - 0.02 * i,
            "tokens": 81920,
            "seconds": 11.2,
            "skipped_steps": 0,
            "published": version,
            "verdict": {"promote": version is not None, "reason": text, "gain": interval(gain), "on_base": ["medical"]},
            "at": now - 900 * (len(verdicts) - i),
        }
        for i, ((version, gain, text), reason) in enumerate(
            zip(verdicts, ("traces", "drift", "traces", "time"), strict=True)
        )
    ]
    totals = {"ticks": 41, "steps": 1968, "skipped_steps": 0, "tokens": 3_358_720, "promoted": 7, "rejected": 5}
    return {**totals, "restarts": 1, "draft_version": 7, "learner_steps": 1968, "last_loss": 0.55, "history": history}


def happened(now: float) -> list[dict[str, Any]]:
    return [
        {"at": now - 7000, "kind": "drift", "domain": "math", "direction": "down", "before": 0.51, "after": 0.24},
        {"at": now - 2700, "kind": "promoted", "version": 6, "gain": interval(0.061)},
        {"at": now - 2100, "kind": "confirmed", "version": 6, "reason": "no loss in 400 requests", "promise": "kept"},
        {"at": now - 1800, "kind": "rejected", "reason": "math loses 4.1 %", "gain": interval(0.02)},
        {"at": now - 900, "kind": "promoted", "version": 7, "gain": interval(0.094)},
    ]


def watch() -> dict[str, Any]:
    return {
        "watching": [7],
        "before": 6,
        "settled": 6,
        "requests": 140,
        "max_requests": 400,
        "accepted": 0.447,
        "expected": 0.431,
        "promised_gain": 0.064,
        "promise": "open",
        "confirmed": 5,
        "rolled_back": 1,
        "quarantined": {"3": "live acceptance of tools fell from 44 % to 31 %"},
    }


def trends(period: str, now: float, seed: int = 0) -> dict[str, Any]:
    """In the form of `GET /adaptd/status?since=`: acceptance rises when version 3 and 7 come, math drifts before."""
    rng, (length, step) = random.Random(seed), PERIODS[period]
    at = [math.floor((now - length) / step) * step + step * i for i in range(length // step + 1)]
    share = [i / len(at) for i in range(len(at))]
    domains: dict[str, dict[str, list[Any]]] = {}
    for name, (before, after) in DOMAINS.items():
        accepted = [
            before + (after - before) * (min(1.0, 3 * s) if s < 0.55 else 0.35 if s < 0.7 and name == "math" else 1.0)
            for s in share
        ]
        accepted = [x + rng.gauss(0, 0.02) for x in accepted]
        asked = [0 if name == "tools" and 0.2 < s < 0.3 else rng.randrange(20, 90) for s in share]
        domains[name] = {
            "requests": asked,
            "tokens": [60 * n for n in asked],
            "mal": [sum(x**i for i in range(K + 1)) if n else None for x, n in zip(accepted, asked, strict=True)],
            "token_acceptance": [
                sum(x**i for i in range(1, K + 1)) / K if n else None for x, n in zip(accepted, asked, strict=True)
            ],
        }
    asked = [sum(d["requests"][i] for d in domains.values()) for i in range(len(at))]

    def mean(key: str, i: int) -> float:
        return sum((d[key][i] or 0) * d["requests"][i] for d in domains.values()) / asked[i]

    domains["all"] = {
        "requests": asked,
        "tokens": [60 * n for n in asked],
        **{key: [mean(key, i) for i in range(len(at))] for key in ("mal", "token_acceptance")},
    }
    marks: list[tuple[float, str, dict[str, Any]]] = [
        (0.10, "promoted", {"version": 2}),
        (0.21, "promoted", {"version": 3}),
        (0.27, "rolled_back", {"version": 4, "refused": [3]}),
        (0.28, "quarantined", {"version": 3}),
        (0.41, "rejected", {"reason": "the lower bound of the gain is not above 0"}),
        (0.56, "drift", {"domain": "math", "direction": "down", "before": 0.51, "after": 0.34}),
        (0.63, "promoted", {"version": 6}),
        (0.71, "promoted", {"version": 7}),
    ]
    events = [{"at": at[0] + x * length, "kind": kind, **about} for x, kind, about in marks]
    return {
        "since": period,
        "from": now - length,
        "to": now,
        "step_s": step,
        "at": at,
        "domains": domains,
        "events": events,
    }


def _settings(home: Path, *more: str, file: Path | None = None) -> Any:
    return load(file, [f"state_dir={home}", "server.port=0", f"engine.k={K}", "deployment=support-chat", *more])


def _dress(daemon: Any, now: float) -> None:
    config = daemon.config
    daemon.table = open_table("memory://", config.deployment, **config.buffer.model_dump(exclude={"url"}))
    daemon.started_at = now - 72000
    daemon._learner_seen = learner(now)
    daemon.events = happened(now)
    traffic(daemon.monitor, now)


def _worn(status: dict[str, Any], now: float) -> dict[str, Any]:
    """What only a running daemon would have: versions in the store, traces in the buffer."""
    sizes = {"recent": 18400, "anchors": 4000, "reserved": 910}
    held = {"recent": 141_000_000, "anchors": 31_000_000, "reserved": 7_100_000}
    status["draft"] |= {"version": 7, "age_s": 900.0}
    status["watch"] |= watch()
    status["buffer"] |= {
        "sizes": sizes,
        "bytes": held,
        "stored_bytes": 166_000_000,
        "inserted_total": 96_210,
        "evicted_total": 71_000,
    }
    return status


class _Pool:
    """Decoders of a daemon that has none."""

    def __init__(self, now: float) -> None:
        self.in_flight, self.lost, self.up, self._now = 3, 0, True, now

    async def status(self) -> list[dict[str, Any]]:
        engine = dataclasses.asdict(
            LoopStats(0, 3, 7, 0, 0.0, *(0,) * 10, 0.0, 0.0, recalled=5210, round_s=0.0121, round_batch=3.0)
        )
        swap = {"swaps": 7, "refusals": 0, "last_pause_s": 0.003, "max_pause_s": 0.0041, "swapped_at": self._now - 900}
        costs = [{"k": K, "batch": 4, "target_s": 0.0083, "draft_s": 0.0006, "verify_s": 0.0091}]
        writer = dataclasses.asdict(WriterStats(96_214, 96_210, 4, 0, 0, True, None))
        about = {"target_id": "pocket", "draft_version": 7}
        return [{**about, "engine": engine, "costs": costs, "swap": swap, "writer": writer}]


def native(home: Path, now: float) -> Daemon:
    """With decoders of its own."""
    daemon = Daemon(_settings(home))
    _dress(daemon, now)
    daemon.pool = _Pool(now)  # type: ignore[assignment]
    daemon.serving = True
    return daemon


def choosing(home: Path, now: float) -> Daemon:
    """As `native`, with decoders that choose their draft's length."""
    daemon = native(home, now)
    known = daemon.pool.status

    async def status() -> list[dict[str, Any]]:
        (decoder,) = await known()
        lengths = ({"math": 0, "medical": 3}, {"math": 0, "medical": 4})
        return [{**decoder, "engine": decoder["engine"] | {"draft_lengths": chosen}} for chosen in lengths]

    daemon.pool.status = status  # type: ignore[method-assign]
    return daemon


def native_status(home: Path, now: float) -> dict[str, Any]:
    return _worn(asyncio.run(native(home, now).status()), now)


def sidecar(home: Path, now: float) -> SidecarDaemon:
    """In front of three servers: the canary, one that follows, one that is down."""
    servers = (f"upstream.urls=[{', '.join(URLS)}]", "upstream.publish_remote=true")
    daemon = SidecarDaemon(_settings(home, *servers, file=Path(__file__).parents[1] / "configs/vllm.yaml"))
    _dress(daemon, now)
    able = Capabilities("0.32.0", ("served",), "target", K, 20, False, True, "words", "")
    for i, server in enumerate(daemon.upstream.servers):
        up = i < 2
        server.upstream.up, server.upstream.since = up, now - 70000 + 60000 * (i > 1)
        server.upstream.error = "" if up else "ConnectError: All connection attempts failed"
        server.upstream.capabilities = able if up else Capabilities()
        server.in_flight = (2, 3, 0)[i]
        publication = daemon.publications[i]
        publication._unable = ""
        publication.follower.counts["swapped_at"] = now - 900 if up else None
        if publication.publisher is not None:
            publication.publisher.counts |= {"published": 7 - i, "restored": i, "max_pause_s": 0.21, "lost": 0}
            publication.publisher._target._baseline = {"layer.0": "sha256", "layer.1": "sha256"} if up else {}
            publication.publisher.counts["failed"] = {"refused": 1} if i else {}
    daemon.proxy.counts.requests = 96_900
    daemon.proxy.counts.uncaptured.update({"opted out": 120, "sampled with penalties": 33})
    daemon.share._recent.extend(["", "", "not in the share", ""])
    daemon.rollout._canary.wanted(URLS[:2], 7, 6)
    return daemon


def sidecar_status(home: Path, now: float) -> dict[str, Any]:
    status = _worn(asyncio.run(sidecar(home, now).status()), now)
    status["economics"] = economics.behind_proxy(Load(0.031, 1.92, 24.0, 4000.0), 70.0, K)
    for i, server in enumerate(status["upstream"]["servers"]):
        server["draft_version"] = (7, 6, 0)[i]
        status["decoders"][i]["draft_version"] = (7, 6, 0)[i]
        server["publisher"] |= {"version": (7, 6, None)[i]}
    status["publisher"] |= {"version": 7, "last_probe": "acceptance 44.7 % against 43.1 %, as promised"}
    return status


def figures(home: Path) -> dict[str, Any]:
    """Everything that a dashboard may be shown: statuses by kind of daemon, trends by period."""
    now = time.time()
    shapes = {
        "native": native_status(home / "native", now),
        "vllm": sidecar_status(home / "vllm", now),
        "young": {"engine": "native", "draft": {"version": 0}, "events": []},
    }
    return {"shapes": shapes, "trends": {period: trends(period, now) for period in PERIODS}}
