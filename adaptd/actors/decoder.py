"""The decoder actor: a decode loop, a trace writer and a store follower behind Ray calls."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

from adaptd import log
from adaptd.actors.follower import StoreFollower
from adaptd.actors.parts import load_pair
from adaptd.actors.threads import set_threads
from adaptd.config import Config
from adaptd.decoding.build import build_loop
from adaptd.decoding.idle import asked_again
from adaptd.decoding.request import DecodeRequest, Delta, Finished
from adaptd.decoding.timing import Calibration, measure
from adaptd.errors import DecoderStopped
from adaptd.models.load import weights_id
from buffers.open import open_table
from buffers.trace import Trace
from buffers.writer import TraceWriter
from checkpoints.store import CheckpointStore


class DecoderActor:
    """One decoder. Constructed, called and restarted by Ray; all work is in the collaborators."""

    def __init__(self, config: Config, index: int, buffer_url: str) -> None:
        log.configure(config.log.level, config.log.style)
        set_threads(config.engine.threads)
        pair = load_pair(config, config.ray.decoder_gpus)
        self._target_id = weights_id(pair.target)[:16]
        self._loop = build_loop(config, pair.target, pair.draft.model, pair.tokenizer, self._target_id)
        self._writer = TraceWriter(
            open_table(buffer_url, config.deployment, **config.buffer.model_dump(exclude={"url"})),
            max_pending=config.capture.max_pending,
        )
        store = CheckpointStore(config.home / "checkpoints")
        self._follower = StoreFollower(store, pair.draft, self._loop, pair.identity, name=f"decoder-{index}")
        self._again, self._alternatives = config.capture.again, config.capture.asked > 0
        self._poll_s = config.checkpoints.poll_s
        self._polling: asyncio.Task[None] | None = None
        self._timing, self._calibration = config.engine.calibrate, Calibration()

    async def start(self) -> int:
        """Begin to follow the store; returns the draft version in use."""
        await asyncio.to_thread(self._follower.poll)
        if self._polling is None:
            self._polling = asyncio.create_task(self._poll())
        return self._follower.version

    async def _poll(self) -> None:
        while True:
            await self._calibrate()
            await asyncio.sleep(self._poll_s)
            await asyncio.to_thread(self._follower.poll)

    async def _calibrate(self) -> None:
        """Time the models' passes where nothing recent is known of such a batch."""
        if self._timing and self._calibration.due(self._loop.stats().active):
            with contextlib.suppress(DecoderStopped):
                if (times := await asyncio.wrap_future(self._loop.call(measure))) is not None:
                    self._calibration.put(times)

    async def generate(self, request: DecodeRequest, stream: bool) -> AsyncIterator[Delta]:
        """Deltas of one request: each round's if `stream`, else one with the whole answer.

        Raises:
          Overloaded: the queue is full. DecoderStopped: the loop died or is closing.
        """
        if self._polling is None:  # after a restart by Ray
            await self.start()
        queue: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        actor_loop = asyncio.get_running_loop()

        def put(item: Delta | Exception) -> None:
            actor_loop.call_soon_threadsafe(queue.put_nowait, item)

        def on_delta(delta: Delta) -> None:
            if delta.finished is not None and (trace := delta.finished.trace) is not None:
                self._keep(trace)
                for another in asked_again(request, trace, self._again):
                    self._loop.submit_idle(another, self._keep_another)
                delta = dataclasses.replace(delta, finished=dataclasses.replace(delta.finished, trace=None))
            if stream or delta.finished is not None:
                put(delta)

        self._loop.submit(request, on_delta, put)
        done = False
        try:
            while not done:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                done = item.finished is not None
                yield item
        finally:
            if not done:
                self._loop.abort(request.request_id)

    def _keep_another(self, finished: Finished) -> None:
        """An answer that was given again; the gate never judges by one."""
        if finished.trace is not None:
            self._keep(dataclasses.replace(finished.trace, reserved=False))

    def _keep(self, trace: Trace) -> None:
        """To the buffer, by way of the target if it is to be asked about alternatives."""
        if self._alternatives and not trace.reserved:
            self._loop.hold(trace, self._write)
        else:
            self._write(trace)

    def _write(self, trace: Trace) -> None:
        self._writer.append(trace, trace.surprise)

    async def flush(self) -> bool:
        """Write the pending traces now; whether all were written."""
        with contextlib.suppress(DecoderStopped):
            await asyncio.wrap_future(self._loop.release())
        return await asyncio.to_thread(self._writer.flush, 5.0)

    async def status(self) -> dict[str, Any]:
        """Target, version, load, swap and writer counters."""
        return {
            "target_id": self._target_id,
            "draft_version": self._follower.version,
            "engine": dataclasses.asdict(self._loop.stats()),
            "costs": [dataclasses.asdict(times) for times in self._calibration.all()],
            "swap": self._follower.counts,
            "writer": dataclasses.asdict(self._writer.stats()),
        }

    async def close(self, drain_s: float) -> None:
        """Finish what is in flight within `drain_s`, write the pending traces, stop the threads."""
        await asyncio.to_thread(self._loop.close, drain_s)
        await asyncio.to_thread(self._writer.close, 5.0)
