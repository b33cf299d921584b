"""Errors keep what they say wherever they go."""

from __future__ import annotations

import pickle

import pytest

from checkpoints.errors import CheckpointError, CorruptCheckpoint, IncompatibleCheckpoint


@pytest.mark.parametrize("kind", [CorruptCheckpoint, IncompatibleCheckpoint])
def test_a_refusal_keeps_reason_and_message_on_its_way_out_of_an_actor(
    kind: type[CorruptCheckpoint | IncompatibleCheckpoint],
) -> None:
    """Ray pickles what an actor raises; an exception whose arguments differ from its constructor's would be lost there."""
    arrived = pickle.loads(pickle.dumps(kind("shape", "w is (2,)")))
    assert isinstance(arrived, CheckpointError)
    assert (type(arrived), arrived.reason, str(arrived)) == (kind, "shape", "w is (2,)")
