"""A hundred hot swaps under continuous load, through the real store, follower and loop, on the pocket pair."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptd.actors.follower import StoreFollower
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.loop import DecodeLoop
from adaptd.decoding.request import DecodeRequest, Delta, Finished, SamplingParams
from adaptd.learning.cycle import Identity
from adaptd.models.scope import AdaptedDraft, ScopeConfig
from checkpoints.store import CheckpointStore

SWAPS = 100
BATCH = 4
TOKENS = 20


class Load:
    """Keeps `BATCH` requests in flight over and over; remembers every answer and every failure."""

    def __init__(self, loop: DecodeLoop, prompts: list[list[int]]) -> None:
        self.loop, self.prompts = loop, prompts
        self.answers: list[tuple[int, Finished]] = []
        self.failures: list[Exception] = []
        self.lock, self.sent, self.stopping = threading.Lock(), 0, False
        self.idle = threading.Event()

    def send(self) -> None:
        with self.lock:
            if self.stopping:
                self.idle.set()
                return
            number = self.sent
            self.sent += 1
        which = number % len(self.prompts)

        def on_delta(delta: Delta) -> None:
            if delta.finished is not None:
                self.answers.append((which, delta.finished))
                self.send()

        request = DecodeRequest(f"r{number}", self.prompts[which], SamplingParams(temperature=0.0, max_tokens=TOKENS))
        self.loop.submit(request, on_delta, self.failures.append)


@pytest.fixture
def identity() -> Identity:
    return Identity(base_id="base", tokenizer_hash="tok", scope="private_expert", scope_config={}, config={})


def publish(store: CheckpointStore, tensors: dict[str, torch.Tensor], identity: Identity, **changes: Any) -> int:
    fields: dict[str, Any] = {
        "base_id": identity.base_id,
        "tokenizer_hash": identity.tokenizer_hash,
        "scope": identity.scope,
        "scope_config": {},
        "gate": {},
        "window": {},
        "config": {},
    }
    return store.publish(tensors, **(fields | changes)).version


def test_a_hundred_swaps_under_load_fail_no_request_and_change_no_token(
    tmp_path: Path, pocket_target: Any, pocket_draft: Any, pocket_prompts: Any, identity: Identity, capsys: Any
) -> None:
    prompts = [p for d in ("medical", "math", "tools", "code") for p in pocket_prompts[d][:3]]
    draft = AdaptedDraft(pocket_draft, ScopeConfig(), serving=True)
    engine = SpeculativeDecoder(pocket_target, draft.model, k=4, max_batch=BATCH, max_length=320)
    expected = [
        pocket_target.generate(
            torch.tensor([p]), max_new_tokens=TOKENS, do_sample=False, pad_token_id=0, eos_token_id=[]
        )[0, len(p) :].tolist()
        for p in prompts
    ]
    loop = DecodeLoop(engine)
    store = CheckpointStore(tmp_path)
    follower = StoreFollower(store, draft, loop, identity, "test")
    load = Load(loop, prompts)
    for _ in range(BATCH):
        load.send()
    generator = torch.Generator().manual_seed(0)
    pauses = []
    for _ in range(SWAPS):
        answered = len(load.answers)
        publish(
            store, {n: 0.05 * torch.randn(t.shape, generator=generator) for n, t in draft.state().items()}, identity
        )
        assert follower.poll()
        pauses.append(follower.counts["last_pause_s"])
        if len(pauses) % 10 == 0:
            while len(load.answers) == answered and not load.failures:
                threading.Event().wait(0.005)
        store.prune(3)
    load.stopping = True
    loop.close(30)
    assert not load.failures
    assert follower.counts["swaps"] == SWAPS
    assert follower.version == loop.stats().draft_version == SWAPS
    assert len({f.stats.draft_version_max for _, f in load.answers}) > 10, "requests must have seen many versions"
    wrong = [which for which, f in load.answers if list(f.token_ids) != expected[which]]
    assert not wrong
    with capsys.disabled():
        ordered = sorted(pauses)
        print(
            f"\n{SWAPS} swaps, {len(load.answers)} requests at batch {BATCH}: pause median "
            f"{1e3 * ordered[SWAPS // 2]:.2f} ms, longest {1e3 * ordered[-1]:.2f} ms"
        )


@pytest.mark.parametrize("fault", ["truncated", "nan", "shape", "base"])
def test_a_bad_version_is_refused_counted_and_decoding_goes_on(
    tmp_path: Path, pocket_target: Any, pocket_draft: Any, pocket_prompts: Any, identity: Identity, fault: str
) -> None:
    draft = AdaptedDraft(pocket_draft, ScopeConfig(), serving=True)
    engine = SpeculativeDecoder(pocket_target, draft.model, k=4, max_batch=1, max_length=320)
    loop = DecodeLoop(engine)
    store = CheckpointStore(tmp_path)
    follower = StoreFollower(store, draft, loop, identity, "test")
    good = {n: 0.01 * torch.ones_like(t) for n, t in draft.state().items()}
    publish(store, good, identity)
    assert follower.poll()
    before = draft.state()
    bad = {n: t.clone() for n, t in good.items()}
    name = next(iter(bad))
    if fault == "shape":
        bad[name] = torch.zeros(3, 5)
    if fault == "nan":
        # The store itself refuses it; a file that was damaged later must be refused as well.
        with pytest.raises(Exception, match=r"finite|NaN|nan"):
            publish(store, bad | {name: bad[name] * torch.nan}, identity)
    version = publish(store, bad, identity, **({"base_id": "other"} if fault == "base" else {}))
    if fault in ("truncated", "nan"):
        file = next((tmp_path / f"v{version:06d}").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-8] + (b"\xff" * 8 if fault == "nan" else b""))
    assert not follower.poll()
    assert not follower.poll(), "a refused version is tried once"
    assert follower.counts["refusals"] == 1
    assert follower.version == 1
    assert all(torch.equal(before[n], t) for n, t in draft.state().items())
    done: list[Finished] = []
    ready = threading.Event()

    def on_delta(delta: Delta) -> None:
        if delta.finished is not None:
            done.append(delta.finished)
            ready.set()

    prompt = pocket_prompts["math"][0]
    loop.submit(DecodeRequest("r", prompt, SamplingParams(temperature=0.0, max_tokens=8)), on_delta)
    assert ready.wait(30)
    assert done[0].stats.draft_version_max == 1
    loop.close(5)
