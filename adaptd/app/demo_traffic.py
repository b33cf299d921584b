"""The demonstration's clients of a vLLM server: the official `openai` client, and the server's own counters beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from adaptd.errors import AdaptdError
from adaptd.sidecar.client import VllmClient
from adaptd.sidecar.metrics import SpecCounters

_CONCURRENCY = 8
_MAX_TOKENS = 64
_TIMEOUT_S = 120.0
#: Answered requests between two looks at the server's counters.
STEP = 10


def openai_client() -> Any:
    """The class `openai.AsyncOpenAI`.

    Raises:
      AdaptdError: the package is not installed.
    """
    try:
        from openai import AsyncOpenAI
    except ImportError as error:
        raise AdaptdError(
            "this demonstration sends its traffic with the official client: pip install 'adaptd[demo]' (or openai)"
        ) from error
    return AsyncOpenAI


@dataclass(slots=True)
class Leg:
    """Traffic of one domain: how far it is, and the server's counters every `STEP` answers."""

    domain: str
    answered: int = 0
    looks: list[tuple[int, SpecCounters]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def mal(self, first: int, last: int) -> float | None:
        """Mean acceptance length by the server between two numbers of answered requests, to the nearest look."""
        if not self.looks:
            return None
        begin, end = (min(self.looks, key=lambda look: abs(look[0] - at))[1] for at in (first, last))
        return (end - begin).mal

    def ends(self, window: int) -> dict[str, float | None]:
        """MAL of the first and of the last `window` requests, in the form of a result file."""
        n = self.answered
        return {
            f"first_{window}_mal": self.mal(0, min(window, n)),
            f"last_{window}_mal": self.mal(max(0, n - window), n),
        }


async def send(leg: Leg, questions: Iterable[str], *, url: str, server: str, model: str) -> None:
    """Ask all questions at `url`, a fixed number at a time, greedily; `leg` follows.

    Args:
      questions: drawn as they are asked.
      server: address of the vLLM server, whose counters are read.

    Raises:
      openai.OpenAIError: an answer failed: nothing of this demonstration may.
    """
    waiting = iter(questions)
    watched = VllmClient(server)

    async def look() -> None:
        leg.looks.append((leg.answered, (await watched.metrics()).counters))

    async with openai_client()(base_url=f"{url}/v1", api_key="none", timeout=_TIMEOUT_S, max_retries=0) as client:

        async def one() -> None:
            for question in waiting:
                answer = await client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": question}],
                    max_tokens=_MAX_TOKENS,
                    temperature=0,
                    extra_headers={"x-adaptd-domain": leg.domain},
                )
                leg.texts.append(answer.choices[0].message.content or "")
                leg.answered += 1
                if leg.answered % STEP == 0:
                    await look()

        try:
            await look()
            await asyncio.gather(*(one() for _ in range(_CONCURRENCY)))
            await look()
        finally:
            await watched.close()


async def while_waiting(work: asyncio.Task[None], draw: Callable[[], None], every_s: float) -> None:
    """Draw again and again until the work is done; its error is raised."""
    while not work.done():
        started = time.monotonic()
        await asyncio.to_thread(draw)
        await asyncio.wait({work}, timeout=max(0.0, every_s - (time.monotonic() - started)))
    await work
