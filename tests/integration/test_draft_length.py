"""The chosen draft length on the trained pair: same tokens, and k follows what the draft is worth to a domain."""

import copy
from collections.abc import Iterable, Sequence
from queue import Queue
from typing import Any

import pytest
import torch

from adaptd.config import checked
from adaptd.decoding.build import build_loop
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, Delta, Finished, SamplingParams
from adaptd.models import load
from policies.draft_length import DraftLength
from policies.round_costs import RoundCosts

K = 4


class Priced(RoundCosts):
    """Rounds of given prices: what the machine takes is left out."""

    def due(self, batch: int) -> int | None:
        return None

    def put(self, batch: int, k: int, seconds: float, *, trial: bool) -> None:
        """Known before."""

    def ratios(self, batch: int) -> list[float]:
        return [1.0 + 0.1 * k + (0.1 if k else 0.0) for k in range(K + 1)]


def policy() -> DraftLength:
    made = DraftLength(K)
    made.costs = Priced(K)
    return made


def requests(prompts: Sequence[list[int]], domain: str, tokens: int) -> list[DecodeRequest]:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return [DecodeRequest(f"{domain} {at}", prompt, params, domain=domain) for at, prompt in enumerate(prompts)]


def serve(engine: SpeculativeDecoder, wanted: Iterable[DecodeRequest]) -> dict[str, Finished]:
    waiting, done = list(wanted), {}
    while waiting or engine.active:
        while waiting and engine.can_add():
            engine.add(waiting.pop(0))
        done |= {delta.request_id: delta.finished for delta in engine.step() if delta.finished is not None}
    return done


def engine_of(target: Any, draft: Any, chosen: DraftLength | None, batch: int) -> SpeculativeDecoder:
    return SpeculativeDecoder(target, draft, k=K, max_batch=batch, max_length=320, draft_length=chosen)


def test_two_domains_in_one_batch_get_the_tokens_of_transformers(
    pocket_target: Any, pocket_draft: Any, pocket_prompts: dict[str, list[list[int]]]
) -> None:
    chosen, tokens = policy(), 40
    some = {domain: pocket_prompts[domain][:4] for domain in ("medical", "tools")}
    mixed = [r for pair in zip(*(requests(p, d, tokens) for d, p in some.items()), strict=True) for r in pair]
    done = serve(engine_of(pocket_target, pocket_draft, chosen, 4), mixed)
    fixed = serve(engine_of(pocket_target, pocket_draft, None, 4), mixed)
    for request in mixed:
        ids = torch.tensor([list(request.prompt_ids)])
        out = pocket_target.generate(
            ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        answer = tuple(out[0, ids.shape[1] :].tolist())
        assert done[request.request_id].token_ids == fixed[request.request_id].token_ids == answer
    drafted = {finished.stats.proposed / finished.stats.rounds for finished in done.values()}
    assert len(drafted) > 1, "lengths were chosen"
    assert chosen.accept_at("medical")[0] > chosen.accept_at("tools")[0] + 0.1


def test_k_falls_where_little_is_accepted_and_rises_when_a_better_draft_is_swapped_in(
    pocket_target: Any, pocket_draft: Any, pocket_prompts: dict[str, list[list[int]]]
) -> None:
    chosen, prompts = policy(), pocket_prompts["medical"]
    draft = copy.deepcopy(pocket_draft)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) * 2.0)
    engine = engine_of(pocket_target, draft, chosen, 1)
    ruined = serve(engine, requests(prompts[:6], "medical", 40))
    assert chosen.chosen == {"medical": 0}
    last = ruined["medical 5"].stats
    assert last.proposed < last.rounds, "hardly anything is drafted any more"
    # As a swap does: in place, between two rounds, then the version.
    draft.load_state_dict(pocket_draft.state_dict())
    engine.draft_version = 1
    mended = serve(engine, requests(prompts[6:12], "medical", 40))
    assert chosen.chosen["medical"] >= 2
    assert mended["medical 5"].stats.mal > 1.4
    share = mended["medical 5"].stats.share_at_k
    assert share is not None
    assert 0.2 < share < 1.0


@pytest.mark.parametrize("length", ["auto", "fixed"])
def test_the_setting_reaches_the_decoders_and_they_tell_what_was_chosen(
    pocket_draft: Any, pocket_tokenizer: Any, pocket_prompts: dict[str, list[list[int]]], length: str
) -> None:
    config = checked({"engine": {"k": 2, "draft_length": length, "max_length": 320}})
    # One of its own, since a loop packs it.
    target = load.load_causal_lm(load.resolve("pocket", "target"), dtype="float32", device="cpu")
    loop = build_loop(config, target, pocket_draft, pocket_tokenizer, "t")
    try:
        ends: Queue[Delta] = Queue()
        for request in requests(pocket_prompts["medical"][:3], "medical", 30):
            loop.submit(request, lambda delta: ends.put(delta) if delta.finished else None)
        for _ in range(3):
            ends.get(timeout=120)
        assert set(loop.stats().draft_lengths) == ({"medical"} if length == "auto" else set())
    finally:
        loop.close(5.0)
