"""Rounds from a server's metrics: windows, restarts, and the operator's own figures."""

import asyncio

import httpx
import pytest
from pydantic import ValidationError

from adaptd.sections import UpstreamConfig
from adaptd.sidecar.load import WINDOW_S, LoadMeter, plain_rate


class Server:
    """Two engines that count alike."""

    def __init__(self) -> None:
        self.steps = self.seconds = self.drafts = self.accepted = 0.0
        self.up = True

    def serve(self, steps: int, seconds: float, accepted: float) -> None:
        self.steps += steps
        self.seconds += steps * seconds
        self.drafts += steps
        self.accepted += steps * accepted

    def handle(self, request: httpx.Request) -> httpx.Response:
        if not self.up:
            raise httpx.ConnectError("no")
        rows = {
            "inter_token_latency_seconds_sum": self.seconds,
            "inter_token_latency_seconds_count": self.steps,
            "spec_decode_num_drafts_total": self.drafts,
            "spec_decode_num_accepted_tokens_total": self.accepted,
            "num_requests_running": 4.0,
        }
        lines = [f'vllm:{name}{{engine="{e}"}} {value / 2}' for name, value in rows.items() for e in (0, 1)]
        return httpx.Response(200, text="\n".join(lines) + "\n")


def test_rounds_of_the_last_minutes() -> None:
    server, now = Server(), [0.0]

    async def run() -> None:
        client = httpx.AsyncClient(base_url="http://s", transport=httpx.MockTransport(server.handle))
        meter = LoadMeter(client, lambda: now[0])
        await meter.poll()
        assert meter.load() is None
        server.serve(100, 0.04, 1.5)
        now[0] = 60.0
        await meter.poll()
        load = meter.load()
        assert load is not None
        assert (load.round_s, load.mal, load.running, load.rounds) == pytest.approx((0.04, 2.5, 4.0, 100))
        server.serve(100, 0.08, 0.5)
        now[0] += WINDOW_S
        await meter.poll()
        load = meter.load()
        assert load is not None
        assert (load.round_s, load.mal) == pytest.approx((0.08, 1.5)), "the first sample is too old"
        server.up = False
        await meter.poll()
        assert meter.load() == load
        server.up, server.steps, server.drafts = True, 1.0, 1.0
        await meter.poll()
        assert meter.load() is None, "it restarted"

    asyncio.run(run())


def test_the_rate_without_speculation_is_one_or_several_by_load() -> None:
    assert plain_rate(30.0, 7.0) == 30.0
    given = {16: 20.0, 1: 50.0}
    assert [plain_rate(given, running) for running in (0.5, 1.0, 8.5, 16.0, 40.0)] == [50.0, 50.0, 35.0, 20.0, 20.0]


@pytest.mark.parametrize("value", [0, -1.0, {}, {1: 0.0}])
def test_rates_that_cannot_be_are_refused(value: object) -> None:
    with pytest.raises(ValidationError):
        UpstreamConfig.model_validate({"plain_tokens_per_s": value})
