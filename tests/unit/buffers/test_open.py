"""The URL decides the implementation."""

import pytest

from buffers.memory_table import MemoryTable
from buffers.open import open_table
from buffers.redis_table import RedisTable

SIZES = {"max_bytes": 1000, "ttl_s": 60.0, "anchors": 3, "reserved_max_bytes": 100}


def test_the_scheme_chooses_the_table_without_connecting() -> None:
    assert isinstance(open_table("memory://", "d", **SIZES), MemoryTable)
    for url in ("redis://127.0.0.1:1/0", "rediss://h", "unix:///nowhere.sock", "redis+cluster://h"):
        table = open_table(url, "d", **SIZES)
        assert isinstance(table, RedisTable)
        assert (table.limits.max_bytes, table.limits.anchors) == (1000, 3)


def test_an_unknown_url_is_refused_with_the_remedy_and_without_its_password() -> None:
    with pytest.raises(ValueError, match="start_embedded"):
        open_table("embedded", "d", **SIZES)
    with pytest.raises(ValueError, match="memory://, redis://") as error:
        open_table("mysql://u:hunter2@h", "d", **SIZES)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"), [("max_bytes", 0), ("reserved_max_bytes", 0), ("anchors", -1), ("ttl_s", 0.0)]
)
def test_a_limit_that_makes_no_sense_is_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        open_table("memory://", "d", **(SIZES | {name: value}))
