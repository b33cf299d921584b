"""The proxy in front of a real server: streams flow, aborts arrive, and what it captured is true."""

import json
import threading
import time
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from adaptd.decoding.capture import CaptureConfig
from adaptd.decoding.engine import SpeculativeDecoder
from adaptd.decoding.request import DecodeRequest, SamplingParams
from adaptd.models import load as models
from adaptd.sidecar.steps import figures
from adaptd.sidecar.traces import Provenance, build
from buffers.trace import Source, Trace

pytestmark = pytest.mark.vllm
K = 4
ABOUT = Provenance(
    target_id="t",
    draft_version=0,
    domain="d",
    tenant="",
    temperature=0.0,
    top_p=1.0,
    top_k=0,
    max_tokens=2048,
    reserved_share=0.1,
)
QUESTIONS = (
    "What causes asthma?",
    "Ann has 3 apples and buys 5 more. How many?",
    "What is the weather in Paris?",
    "Write a function that adds two numbers.",
    "What are the symptoms of diabetes?",
    "How is anaemia treated?",
)


def body(question: str, **options: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": "pocket", "messages": messages, "max_tokens": 40, "temperature": 0, **options}


def forget(proxied: Any) -> None:
    """Begin anew, once what the last test left has been reported."""
    wait_until(lambda: not proxied.proxy.counts.in_flight)
    proxied.done.clear()


def wait_until(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def captured(proxied: Any, count: int) -> list[Trace]:
    """The traces of the last `count` answers: the report comes right after the answer's last byte."""
    wait_until(lambda: len(proxied.done) >= count)
    found = [t for done in proxied.done for t in build(done.seen, figures(done.seen.speculative), ABOUT)]
    proxied.done.clear()
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_captured_is_what_the_server_did(proxied: Any, stream: bool) -> None:
    """Against the target itself: its tokens, its log-probabilities, its argmax."""
    forget(proxied)
    for question in QUESTIONS[:3]:
        assert httpx.post(f"{proxied.url}/v1/chat/completions", json=body(question, stream=stream), timeout=60)
    target = models.load_causal_lm(models.resolve("pocket", "target"), dtype="float32", device="cpu")
    traces = captured(proxied, 3)
    assert len(traces) == 3
    for trace in traces:
        with torch.no_grad():
            logits = target(torch.from_numpy(trace.tokens.astype(np.int64))[None]).logits[0]
        rows = logits.log_softmax(-1)[torch.from_numpy(trace.judging_rows)]
        best = rows.topk(trace.topk_ids.shape[1])
        assert trace.topk_ids.shape[1] == 8
        assert np.array_equal(trace.topk_ids, best.indices.numpy().astype(np.uint32))
        assert np.allclose(trace.topk_logprobs, best.values.numpy(), atol=0.01)
        assert np.array_equal(trace.response, trace.topk_ids[:, 0]), "greedy"


def test_the_pattern_of_acceptance_is_the_native_engines(proxied: Any) -> None:
    """The same pair, prompts and k at temperature 0. vLLM's first token comes without proposals, so it joins the prompt."""
    target, draft = (
        models.load_causal_lm(models.resolve("pocket", role), dtype="float32", device="cpu")
        for role in ("target", "draft")
    )
    forget(proxied)
    for question in QUESTIONS:
        httpx.post(f"{proxied.url}/v1/chat/completions", json=body(question, stream=True), timeout=60)
    theirs = captured(proxied, len(QUESTIONS))
    assert len(theirs) == len(QUESTIONS)
    kinds = set()
    for trace in theirs:
        prompt = tuple(int(t) for t in trace.tokens[: trace.prompt_len + 1])
        request = DecodeRequest(
            request_id=trace.request_id,
            prompt_ids=prompt,
            params=SamplingParams(temperature=0.0, max_tokens=trace.response_len - 1, ignore_eos=True),
        )
        engine = SpeculativeDecoder(
            target, draft, k=K, max_batch=1, max_length=512, eos_ids={2}, detokenize=str, capture=CaptureConfig()
        )
        engine.add(request)
        finished = None
        while finished is None:
            finished = next((d.finished for d in engine.step() if d.finished), None)
        assert finished.trace is not None
        assert np.array_equal(finished.trace.response, trace.response[1:])
        assert trace.source[0] == Source.UNKNOWN
        assert np.array_equal(finished.trace.source, trace.source[1:])
        kinds |= set(trace.source.tolist())
    assert kinds >= {Source.CORRECTION, Source.ACCEPTED, Source.BONUS}, "the prompts exercise all three"


def test_a_stream_comes_in_pieces_while_it_is_generated(proxied: Any) -> None:
    times = []
    options = body(QUESTIONS[0], stream=True, max_tokens=200, ignore_eos=True)
    with httpx.stream("POST", f"{proxied.url}/v1/chat/completions", json=options, timeout=60) as answer:
        for _ in answer.iter_raw():
            times.append(time.monotonic())
    assert len(times) > 20
    assert times[len(times) // 2] - times[0] > 0.2 * (times[-1] - times[0])


def running(url: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=10).text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("vllm:num_requests_running"))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_aborts_the_request_in_the_server(vllm: Any, proxied: Any, stream: bool) -> None:
    before = proxied.proxy.counts.aborted
    options = body(QUESTIONS[0], stream=stream, max_tokens=480, ignore_eos=True)
    client = httpx.Client(timeout=httpx.Timeout(60, read=None if stream else 0.4))
    if stream:
        with client.stream("POST", f"{proxied.url}/v1/chat/completions", json=options) as answer:
            pieces = answer.iter_raw()
            while not running(vllm.url):  # the server's gauges lag
                next(pieces)
    else:
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"{proxied.url}/v1/chat/completions", json=options)
    client.close()
    left = time.monotonic()
    while running(vllm.url):
        assert time.monotonic() - left < 1.0, "still running"
        time.sleep(0.02)
    assert proxied.proxy.counts.aborted == before + 1


def test_requests_side_by_side_do_not_mix(vllm: Any, proxied: Any) -> None:
    alone = [httpx.post(f"{vllm.url}/v1/chat/completions", json=body(q), timeout=60).json() for q in QUESTIONS]
    found: dict[int, str] = {}

    def ask(index: int) -> None:
        options = body(QUESTIONS[index % len(QUESTIONS)], stream=True)
        text = httpx.post(f"{proxied.url}/v1/chat/completions", json=options, timeout=60).text
        events = [json.loads(e[6:]) for e in text.split("\n\n") if e.startswith("data: {")]
        found[index] = "".join(c["delta"].get("content") or "" for e in events for c in e["choices"])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: alone[i % len(QUESTIONS)]["choices"][0]["message"]["content"] for i in range(12)}


def test_opting_out_asks_the_server_for_nothing_but_usage(proxied: Any) -> None:
    forget(proxied)
    headers = {"x-adaptd-no-store": "1"}
    httpx.post(f"{proxied.url}/v1/chat/completions", json=body(QUESTIONS[0], stream=True), headers=headers, timeout=60)
    wait_until(lambda: proxied.done)
    (done,) = proxied.done
    assert done.plan.why_not == "opted out"
    assert not any(c.token_ids or c.logprobs for c in done.seen.choices.values())
    found = figures(done.seen.speculative)
    assert found is not None
    assert found.steps is not None, "acceptance is counted all the same"


def test_other_routes_pass_and_development_routes_do_not(vllm: Any, proxied: Any) -> None:
    for path in ("/v1/models", "/version", "/tokenize", "/nowhere", "/metrics"):
        direct, through = (httpx.get(f"{url}{path}", timeout=10) for url in (vllm.url, proxied.url))
        assert through.status_code == direct.status_code
    tokens = httpx.post(f"{proxied.url}/tokenize", json={"model": "pocket", "prompt": "asthma"}, timeout=10).json()
    assert tokens["tokens"]
    for path in ("/pause", "/%70ause", "/x/../pause", "//pause", "/collective_rpc"):
        assert httpx.post(f"{proxied.url}{path}", timeout=10).status_code == 403, path


def test_the_probe_finds_what_the_server_can_do(proxied: Any) -> None:
    able = proxied.upstream.capabilities
    assert able.reason == ""
    assert (able.k, able.top_logprobs, able.per_step, able.usage_forced) == (K, 8, True, False)
    assert able.models == ("pocket",)
    assert able.target_id
