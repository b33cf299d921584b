"""What a round costs on this machine, in target steps: timed passes over the caches that decoding uses.

Of several passes the quickest counts: whatever else the machine does only ever adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from adaptd.decoding.runner import ModelRunner
from policies.economics import Costs

_REPEATS = 9
#: Tokens in the cache while a pass is timed.
_CONTEXT = 128


@torch.inference_mode()
def measure_costs(
    target: PreTrainedModel, draft: PreTrainedModel, depths: Sequence[int], batch: int = 1
) -> dict[int, Costs]:
    """c_d and c_v of each k in `depths`, at `batch` requests decoded together.

    Raises: ValueError: a depth below 1.
    """
    if min(depths) < 1:
        raise ValueError(f"depths ({min(depths)}) must be at least 1")
    most = max(depths)
    step = _timer(target, batch, most)
    unit = step(1)
    draft_step = _timer(draft, batch, 1)(1) / unit
    return {k: Costs(draft=draft_step, verify=max(0.0, step(k + 1) / unit - 1.0)) for k in depths}


def _timer(model: PreTrainedModel, batch: int, most: int) -> Callable[[int], float]:
    """Seconds of a pass over so many new tokens."""
    limit = int(model.config.get_text_config().max_position_embeddings)
    context = max(1, min(_CONTEXT, limit - most - 1))
    length = context + most + 1
    runner = ModelRunner(model, slots=batch, capacity=length, max_length=length)
    _pass(runner, batch, 0, context, length)

    def seconds(tokens: int) -> float:
        found = []
        for _ in range(_REPEATS):
            started = time.perf_counter()
            _pass(runner, batch, context, tokens, length)
            found.append(time.perf_counter() - started)
        return min(found)

    return seconds


def _pass(runner: ModelRunner, batch: int, first: int, tokens: int, length: int) -> None:
    ids = torch.full((batch, tokens), 3, device=runner.device)
    positions = (first + torch.arange(tokens, device=runner.device)).expand(batch, tokens)
    logits = runner.forward(ids, positions, runner.masks(positions, length), 0, length, last_only=False)
    logits[0, -1, 0].item()  # the device has finished
