"""Encoding keeps every bit; decoding names what is wrong and raises nothing else."""

import dataclasses
import json
import math
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from buffers.codec import SCHEMA_VERSION, decode, encode
from buffers.errors import CorruptTrace, SchemaMismatch, TraceDecodeError, TruncatedTrace
from buffers.synthetic import synthetic_trace
from buffers.trace import Trace


def assert_same(a: Trace, b: Trace) -> None:
    assert a.arrays().keys() == b.arrays().keys()
    for name, array in a.arrays().items():
        other = b.arrays()[name]
        assert array.dtype == other.dtype, name
        assert array.shape == other.shape, name
        assert array.tobytes() == other.tobytes(), name
    for name, value in a.scalars().items():
        other = b.scalars()[name]
        assert value == other or (math.isnan(value) and math.isnan(other)), name


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n_prompt=st.integers(1, 9),
    n_response=st.integers(1, 12),
    n_top=st.integers(0, 5),
    n_draft_top=st.integers(0, 3),
    request_id=st.text(max_size=20),
    width=st.one_of(st.none(), st.integers(0, 4)),
    n_branch=st.integers(0, 4),
    shift=st.one_of(st.just(math.nan), st.floats(0, 1e6)),
)
def test_a_trace_of_any_shape_survives_the_round_trip(
    seed: int,
    n_prompt: int,
    n_response: int,
    n_top: int,
    n_draft_top: int,
    request_id: str,
    width: int | None,
    n_branch: int,
    shift: float,
) -> None:
    rng = np.random.default_rng(seed)
    features = None if width is None else rng.integers(0, 2**16, (n_prompt + n_response, width)).astype(np.uint16)
    trace = synthetic_trace(
        rng,
        request_id=request_id,
        n_prompt=n_prompt,
        n_response=n_response,
        n_top=n_top,
        n_draft_top=n_draft_top,
        n_branch=n_branch,
        features=features,
        shift=shift,
        target_logprob=np.full(n_response, np.nan, np.float16),
    )
    assert_same(trace, decode(encode(trace)))


def test_numpy_scalars_and_views_encode_as_what_they_hold() -> None:
    base = synthetic_trace(np.random.default_rng(0))
    wide = np.repeat(base.topk_ids, 2, axis=1)
    view = synthetic_trace(
        np.random.default_rng(0), topk_ids=wide[:, ::2], prompt_len=np.int64(16), shift=np.float32(2)
    )
    again = decode(encode(view))
    assert again.topk_ids.tolist() == base.topk_ids.tolist()
    assert (again.prompt_len, again.shift) == (16, 2.0)


def test_the_same_trace_always_gives_the_same_bytes() -> None:
    trace = synthetic_trace(np.random.default_rng(0))
    assert len({encode(trace) for _ in range(20)}) == 1


def test_a_payload_is_a_plain_safetensors_file() -> None:
    trace = synthetic_trace(np.random.default_rng(0))
    assert load(encode(trace))["tokens"].tolist() == trace.tokens.tolist()


def test_an_inconsistent_trace_is_not_encoded() -> None:
    with pytest.raises(ValueError, match="prompt_len"):
        encode(synthetic_trace(np.random.default_rng(0), prompt_len=0))


def test_every_cut_is_called_truncated() -> None:
    payload = encode(synthetic_trace(np.random.default_rng(0), n_response=4, n_top=2))
    for length in [*range(0, len(payload), 37), len(payload) - 1]:
        with pytest.raises(TruncatedTrace, match=rf"payload of {length} bytes refused \(truncated\)"):
            decode(payload[:length])


def test_no_flipped_bit_goes_unnoticed() -> None:
    """safetensors alone would hand on changed log-probabilities; the checksum is for those."""
    payload = encode(synthetic_trace(np.random.default_rng(0), n_prompt=2, n_response=3, n_top=2))
    rng = np.random.default_rng(1)
    for position in range(len(payload)):
        damaged = bytearray(payload)
        damaged[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(TraceDecodeError):
            decode(bytes(damaged))


def test_a_flipped_bit_in_an_array_is_called_corrupt() -> None:
    payload = bytearray(encode(synthetic_trace(np.random.default_rng(0))))
    payload[-5] ^= 1
    with pytest.raises(CorruptTrace, match="checksum"):
        decode(bytes(payload))


def test_bytes_after_the_end_are_corrupt() -> None:
    with pytest.raises(CorruptTrace):
        decode(encode(synthetic_trace(np.random.default_rng(0))) + b"x")


def test_a_trace_from_before_branches_is_read() -> None:
    trace = synthetic_trace(np.random.default_rng(0))
    payload = encode(trace)
    # The same number of digits: lengths in the header stay as they are.
    written = payload.replace(b'\\"schema\\": 4', b'\\"schema\\": 1')
    assert written != payload
    assert_same(decode(written), trace)


def test_draws_come_back() -> None:
    trace = synthetic_trace(np.random.default_rng(0), n_branch=3, n_tail=5)
    assert_same(decode(encode(trace)), trace)
    assert trace.tail_ids is not None
    without = dataclasses.replace(trace, tail_ids=trace.tail_ids[1:])
    with pytest.raises(ValueError, match="tail_ids has shape"):
        encode(without)


def test_branches_from_before_they_said_where_they_begin_are_read() -> None:
    """Of schema 2: one for each correction, in order."""
    trace = synthetic_trace(np.random.default_rng(0), n_branch=3)
    arrays = trace.arrays()
    del arrays["branch_at"]
    text = json.dumps({n: None if v != v else v for n, v in trace.scalars().items()})
    crc = zlib.crc32(text.encode())
    for name in sorted(arrays):
        crc = zlib.crc32(arrays[name].tobytes(), crc)
    about = json.dumps({"schema": 2, "crc32": crc, "scalars": text})
    assert_same(decode(save(arrays, {"adaptd_trace": about})), trace)


def test_another_schema_version_is_named() -> None:
    about = json.dumps({"schema": SCHEMA_VERSION + 1})
    other = save({"tokens": np.zeros(3, np.uint32)}, {"adaptd_trace": about})
    with pytest.raises(
        SchemaMismatch, match=rf"schema {SCHEMA_VERSION + 1}, this version reads \(1, 2, 3, {SCHEMA_VERSION}\)"
    ):
        decode(other)


@pytest.mark.parametrize("payload", [save({"x": np.zeros(2)}), b"\x80\x04\x95 not safetensors at all, a pickle"])
def test_what_is_no_trace_is_a_schema_mismatch(payload: bytes) -> None:
    with pytest.raises(SchemaMismatch):
        decode(payload)


@pytest.mark.parametrize("change", [{"prompt_len": "1"}, {"prompt_len": True}, {"domain": None}, {"surprise": 7.0}])
def test_scalars_of_a_wrong_type_or_value_are_corrupt_even_with_a_right_checksum(
    change: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trace.scalars
    monkeypatch.setattr(Trace, "scalars", lambda self: original(self) | change)
    payload = encode(synthetic_trace(np.random.default_rng(0)))
    with pytest.raises(CorruptTrace):
        decode(payload)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_raise_anything_but_a_decode_error(data: bytes, framed: bool) -> None:
    payload = len(data).to_bytes(8, "little") + b"{" + data if framed else data
    with pytest.raises(TraceDecodeError):
        decode(payload)


def test_a_header_nested_without_end_is_a_decode_error() -> None:
    text = b'{"a":' + b"[" * 200_000
    with pytest.raises(TraceDecodeError):
        decode(len(text).to_bytes(8, "little") + text)


def test_error_messages_hold_no_content_of_the_trace() -> None:
    """Prompt text must not reach a log, and the request id belongs to the caller."""
    payload = bytearray(encode(synthetic_trace(np.random.default_rng(0), request_id="secret-request")))
    payload[-1] ^= 1
    with pytest.raises(CorruptTrace) as caught:
        decode(bytes(payload))
    assert "secret" not in str(caught.value)
    assert json.dumps(caught.value.reason) == '"corrupt"'
