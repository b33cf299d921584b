"""Judged and hard-label traces beside those that real decoding left behind."""

import dataclasses

import numpy as np
import torch

from adaptd.ingest.record import Record
from adaptd.ingest.render import Rendered
from adaptd.ingest.select import fit_reference, hidden_states, shifts, surprises
from adaptd.ingest.teach import Provenance, judge, label
from adaptd.learning.evaluate import profiles
from buffers.trace import Trace
from policies.divergence import draft_with_tail, forward_kl, with_tail
from tests.unit.learning.conftest import VOCAB, Decode, tiny

ABOUT = Provenance(
    target_id="t", k_top=16, vocab=VOCAB, max_tokens=96, reserved_share=0.0, temperature=0.5, engine="native"
)


def logged(trace: Trace, **settings: float) -> Trace:
    """The same answer as a log has it: tokens alone."""
    rendered = Rendered(tuple(trace.tokens[: trace.prompt_len].tolist()), tuple(trace.response.tolist()))
    record = Record(temperature=trace.temperature, top_p=trace.top_p, top_k=trace.top_k, domain="d")
    return label(dataclasses.replace(record, **settings), rendered, trace.request_id, ABOUT)  # type: ignore[arg-type]


def test_the_target_judges_a_recorded_answer_as_it_did_when_it_served_it(
    decode: Decode, target: torch.nn.Module
) -> None:
    for temperature in (0.0, 0.8):
        served = [f.trace for f in decode(tiny(7), 12, temperature=temperature) if f.trace]
        found = judge(target, [logged(t) for t in served])  # type: ignore[arg-type]
        for ours, theirs in zip(found, served, strict=True):
            ours.validate()
            assert np.array_equal(ours.tokens, theirs.tokens)
            assert np.array_equal(ours.topk_ids[:, 0], theirs.topk_ids[:, 0])
            assert np.allclose(ours.topk_logprobs, theirs.topk_logprobs, atol=0.01)
            assert np.allclose(ours.target_logprob, theirs.target_logprob, atol=0.01)
            assert ours.temperature == temperature


def test_a_recorded_answer_has_draws_as_one_that_was_served(decode: Decode, target: torch.nn.Module) -> None:
    served = [f.trace for f in decode(tiny(7), 4, temperature=1.0) if f.trace]
    labelled = [logged(t) for t in served]
    labelled[0] = dataclasses.replace(labelled[0], reserved=True)
    kept, *others = judge(target, labelled, 6)  # type: ignore[arg-type]
    assert kept.tail_ids is None
    for trace in others:
        trace.validate()
        assert trace.tail_ids is not None
        assert trace.tail_ids.shape == (trace.response_len, 6)
        assert not (trace.tail_ids[:, :, None] == trace.topk_ids[:, None]).any()


def test_a_token_that_the_logged_settings_rule_out_keeps_a_finite_probability(
    decode: Decode, target: torch.nn.Module
) -> None:
    served = [f.trace for f in decode(tiny(7), 6, temperature=1.0) if f.trace]
    found = judge(target, [logged(t, top_k=1) for t in served])  # type: ignore[arg-type]
    assert all(np.isfinite(t.target_logprob).all() for t in found)
    assert any((t.topk_ids[:, 0] != t.response).any() for t in found), "some token was not the first choice"
    profiles(tiny(7), found, 3, max_tokens=96)


def test_a_hard_label_is_cross_entropy(decode: Decode, draft: torch.nn.Module) -> None:
    (trace,) = [logged(f.trace) for f in decode(tiny(7), 1, temperature=1.0) if f.trace]
    trace.validate()
    with torch.inference_mode():
        logits = draft(input_ids=torch.from_numpy(trace.tokens.astype(np.int64))[None]).logits[0, trace.judging_rows]
    ids = torch.from_numpy(trace.topk_ids.astype(np.int64))
    found = forward_kl(with_tail(torch.from_numpy(trace.topk_logprobs)), draft_with_tail(logits, ids))
    expected = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(trace.response.astype(np.int64)), reduction="none"
    )
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_request_that_names_no_temperature_has_the_deployments() -> None:
    trace = label(Record(), Rendered((1, 2), (3, 4)), "x", ABOUT)
    assert trace.temperature == 0.5
    assert np.isnan(trace.target_logprob).all()


def test_hidden_states_are_those_that_judge_each_answer_token(decode: Decode, target: torch.nn.Module) -> None:
    traces = [f.trace for f in decode(tiny(7), 3, temperature=1.0) if f.trace]
    found = hidden_states(target, traces)  # type: ignore[arg-type]
    for states, trace in zip(found, traces, strict=True):
        logits = torch.from_numpy(states) @ target.get_output_embeddings().weight.T  # type: ignore[operator]
        with torch.inference_mode():
            whole = target(input_ids=torch.from_numpy(trace.tokens.astype(np.int64))[None]).logits[0]
        assert torch.allclose(logits, whole[trace.judging_rows], atol=1e-4)


def test_scores_rank_what_there_is_to_learn(decode: Decode, target: torch.nn.Module, draft: torch.nn.Module) -> None:
    traces = [f.trace for f in decode(tiny(7), 12, temperature=1.0) if f.trace]
    # The draft's own text surprises it less than the target's does.
    easy = surprises(draft, traces[:6], "surprise", 1.0)  # type: ignore[arg-type]
    hard = surprises(tiny(9), traces[:6], "surprise", 1.0)
    assert np.mean(hard) > np.mean(easy)
    reference = fit_reference(target, traces[:8])  # type: ignore[arg-type]
    assert all(np.isfinite(shifts(target, reference, traces[8:])))  # type: ignore[arg-type]
