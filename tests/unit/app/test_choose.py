"""How a budget is drawn."""

import hashlib
from typing import Any, cast

import numpy as np
import pytest

from adaptd.app.replay.choose import _drawn, _lot
from adaptd.ingest.spool import Queued


def record(number: int) -> Queued:
    digest = hashlib.blake2b(str(number).encode(), digest_size=16).digest()
    return Queued(number, number, digest, "a.jsonl:1", cast(Any, None))


def test_chances_follow_scores() -> None:
    """Of the first tenth drawn, records of three times the score are three times as many; none is left out for certain."""
    scores = np.where(np.arange(20_000) % 2, 3.0, 1.0)
    keys = np.array([_drawn(record(i), score) for i, score in enumerate(scores)])
    first = scores[np.argsort(keys)[::-1][:2000]]
    assert (first == 3).sum() / (first == 1).sum() == pytest.approx(3.0, rel=0.15)
    half = scores[np.argsort(keys)[::-1][:10_000]]
    assert (half == 1).sum() > 2500


def test_equal_scores_are_a_uniform_sample() -> None:
    """The order is that of the lots alone, whatever the score."""
    lots = [_lot(record(i)) for i in range(500)]
    for score in (0.0, 0.3, 40.0):
        keys = [_drawn(record(i), score) for i in range(500)]
        assert np.argsort(keys).tolist() == np.argsort(lots).tolist()
        assert np.isfinite(keys).all()
