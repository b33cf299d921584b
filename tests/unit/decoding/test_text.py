"""Text arrives in pieces that never have to be taken back."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from adaptd.decoding.text import TextStream


def as_bytes(ids: Sequence[int]) -> str:
    """A byte-level tokenizer: token = byte, incomplete characters print as U+FFFD."""
    return bytes(ids).decode("utf-8", errors="replace")


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def test_a_character_split_over_two_rounds_is_released_whole() -> None:
    stream = TextStream(as_bytes)
    first, second = ids_of("né")[:2], ids_of("né")[2:]
    assert stream.push(first) == ("", None)
    assert stream.push(second) == ("né", None)


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_decided() -> None:
    stream = TextStream(as_bytes, ["END"])
    assert stream.push(ids_of("the E")) == ("the ", None)
    assert stream.push(ids_of("N")) == ("", None)
    assert stream.push(ids_of("T rest")) == ("ENT rest", None)


def test_a_stop_string_ends_the_text_before_it_and_counts_the_tokens_needed() -> None:
    stream = TextStream(as_bytes, ["END", "###"])
    assert stream.push(ids_of("abE")) == ("ab", None)
    assert stream.push(ids_of("ND surplus")) == ("", 2)
    assert stream.text == "ab"


def test_the_earliest_of_several_stop_strings_wins() -> None:
    stream = TextStream(as_bytes, ["later", "so"])
    assert stream.push(ids_of("do so later")) == ("do ", 5)


def test_flush_releases_what_was_held_back() -> None:
    stream = TextStream(as_bytes, ["END"])
    stream.push(ids_of("an EN"))
    assert stream.flush() == "EN"
    assert stream.text == "an EN"


def test_flush_shows_a_character_that_never_became_whole() -> None:
    stream = TextStream(as_bytes)
    stream.push([ord("a"), 0xC3])
    assert stream.flush() == "a\ufffd"


@given(st.text(max_size=300), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_the_pieces_add_up_to_the_whole_text_however_it_is_cut(text: str, sizes: list[int]) -> None:
    """Longer than the window, so that it moves."""
    stream, ids, at, turn = TextStream(as_bytes), ids_of(text), 0, 0
    pieces = []
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(stream.push(ids[at : at + size])[0])
        at, turn = at + size, turn + 1
    pieces.append(stream.flush())
    assert "".join(pieces) == as_bytes(ids) == stream.text


@given(st.text(alphabet="ab", max_size=60), st.text(alphabet="ab", min_size=1, max_size=4), st.integers(1, 5))
def test_the_text_ends_where_the_first_stop_string_begins(text: str, stop: str, size: int) -> None:
    stream, ids = TextStream(as_bytes, [stop]), ids_of(text)
    used = 0
    for at in range(0, len(ids), size):
        _, needed = stream.push(ids[at : at + size])
        if needed is not None:
            used = at + needed
            break
    else:
        stream.flush()
    expected = text.find(stop)
    assert stream.text == (text if expected < 0 else text[:expected])
    assert used == (0 if expected < 0 else expected + len(stop))
