"""The one contract of all log readers. Each format's fixture, written by hand from its layout, holds the same two answers:

    user: What is 2 + 2?                            assistant: It is 4.
    system: Be brief.  user: Name a colour.         assistant: Blue.

and beside them whatever must be left out. Files are given names that say nothing.
"""

import gzip
import json
import math
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from adaptd.errors import LogRefused
from adaptd.ingest.files import expand
from adaptd.ingest.read import Reading, read_log, unusable
from adaptd.ingest.record import Half, Record, Refused, unpack
from adaptd.ingest.spool import Spool

LOGS = Path(__file__).parent / "logs"
AT = 1767323045.0  # 2026-01-02T03:04:05Z
SUM = ({"role": "user", "content": "What is 2 + 2?"},)
COLOUR = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a colour."})
PARQUET = {
    "lmsys_chat": [
        {
            "conversation_id": "c1",
            "model": "pocket",
            "conversation": [{"content": m["content"], "role": m["role"]} for m in (*asked, said)],
            "turn": 1,
            "language": "English",
            "openai_moderation": [],
            "redacted": False,
        }
        for asked, said in (
            (SUM, {"role": "assistant", "content": "It is 4."}),
            (COLOUR, {"role": "assistant", "content": "Blue."}),
        )
    ],
    "wildchat": [
        {
            "conversation_hash": f"h{i}",
            "model": "pocket",
            "timestamp": f"2026-01-02T03:04:0{5 + i}+00:00",
            "conversation": [{**m, "language": "English", "redacted": False, "toxic": False} for m in (*asked, said)],
        }
        for i, (asked, said) in enumerate(
            ((SUM, {"role": "assistant", "content": "It is 4."}), (COLOUR, {"role": "assistant", "content": "Blue."}))
        )
    ],
}


class Case(NamedTuple):
    """A format: its files, and what its layout can say."""

    files: tuple[str, ...]
    model: bool = True
    time: bool = True
    sampling: bool = True
    system: bool = True
    text: bool = False
    """The question is text as the model saw it, not a chat."""
    refused: tuple[str, ...] = ()


CASES = {
    "openai": Case(("openai_pair.jsonl",), refused=("failed: error response",)),
    "responses": Case(("responses_api.jsonl",)),
    "batch": Case(("batch_input.jsonl", "batch_output.jsonl"), refused=("failed: error response",)),
    "batch, output first": Case(("batch_output.jsonl", "batch_input.jsonl"), refused=("failed: error response",)),
    "fine-tuning": Case(("fine_tune.jsonl",), model=False, time=False, sampling=False),
    "ShareGPT": Case(("sharegpt.json",), model=False, time=False, sampling=False),
    "vLLM": Case(("vllm.log",), time=False),
    "SGLang": Case(("sglang.jsonl",), model=False, system=False, text=True, refused=("failed: aborted",)),
    "LiteLLM": Case(("litellm.jsonl",), refused=("answered from a cache", "failed: failed call")),
    "Langfuse export": Case(
        ("langfuse_export.jsonl",), refused=("failed: failed call", "observation that is not a generation")
    ),
    "Langfuse API": Case(("langfuse_api.json",)),
    "Phoenix": Case(("phoenix.jsonl",), refused=("span that is not a call of a model",)),
    "OTel GenAI": Case(("otel_genai.jsonl",), refused=("span that is not a call of a model",)),
    "OTel GenAI, older": Case(("otel_events.jsonl",)),
    "OpenInference over OTLP": Case(("openinference_otlp.jsonl",)),
    "plain": Case(("plain.jsonl",), model=False, time=False, sampling=False, system=False),
    "CSV": Case(("plain.csv",), time=False, system=False),
    "lmsys": Case(("lmsys_chat",), time=False, sampling=False),
    "WildChat": Case(("wildchat",), sampling=False),
}


def nameless(folder: Path, case: Case) -> list[str]:
    """Copies of the case's files under names that say nothing."""
    paths = []
    for i, name in enumerate(case.files):
        path = folder / f"{i}"
        if name in PARQUET:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PARQUET[name]), path)
        else:
            shutil.copy(LOGS / name, path)
        paths.append(str(path))
    return paths


def collect(paths: list[str], how: Reading | None = None, **options: Any) -> tuple[list[Record], dict[str, Any]]:
    """What a replay would learn from, in its order, and what it would not."""
    spool = Spool(
        Path(paths[0]).parent / "spool.sqlite",
        with_answer=True,
        unusable=lambda r: unusable(r, since=None, need_answer=True),
        **options,
    )
    for path in paths:
        spool.start_file()
        for found in read_log(path, how or Reading()):
            spool.add(found)
    spool.settle()
    spool.order()
    records = [q.record for batch in spool.walk() for q in batch]
    refusals = spool.refusals()
    spool.close()
    return records, refusals


@pytest.fixture(params=CASES, ids=lambda n: n)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def test_a_format_gives_the_two_answers_and_nothing_else(case: Case, tmp_path: Path) -> None:
    records, refusals = collect(nameless(tmp_path, case))
    assert len(records) == 2, refusals
    by_answer = {r.answer["content"]: r for r in records if r.answer}
    assert set(by_answer) == {"It is 4.", "Blue."}
    four, blue = by_answer["It is 4."], by_answer["Blue."]
    if case.text:
        assert (four.prompt, blue.prompt) == ("What is 2 + 2?", "Name a colour.")
    else:
        assert tuple(four.messages) == SUM
        assert tuple(blue.messages)[-1] == COLOUR[-1]
    if case.system:
        assert blue.messages[0] == COLOUR[0]
    assert sorted(refusals) == sorted(case.refused)


def test_what_a_layout_says_about_an_answer_is_kept(case: Case, tmp_path: Path) -> None:
    records, _ = collect(nameless(tmp_path, case))
    four = next(r for r in records if r.answer and r.answer["content"] == "It is 4.")
    assert four.model == ("pocket" if case.model else "")
    assert four.at == AT if case.time else math.isnan(four.at)
    assert four.temperature == (0.7 if case.sampling else None)
    if case.sampling and "plain.csv" not in case.files:
        assert four.max_tokens == 32


def test_records_come_in_the_order_of_time(case: Case, tmp_path: Path) -> None:
    if case.time:
        records, _ = collect(nameless(tmp_path, case))
        assert [r.at for r in records] == [AT, AT + 1]


@pytest.mark.parametrize("name", ["gzip", "zstandard", "both"])
def test_compression_is_seen_through(name: str, tmp_path: Path) -> None:
    content = (LOGS / "litellm.jsonl").read_bytes()
    if name != "zstandard":
        content = gzip.compress(content)
    if name != "gzip":
        content = zstandard.compress(content)
    (tmp_path / "log").write_bytes(content)
    records, _ = collect([str(tmp_path / "log")])
    assert len(records) == 2


def test_a_conversation_becomes_one_record_a_turn_with_the_context_of_that_turn(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    turns += [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}]
    (tmp_path / "log").write_text(json.dumps([{"id": "x", "conversations": turns}]))
    records, _ = collect([str(tmp_path / "log")])
    assert [[m["content"] for m in r.messages] for r in records] == [["a"], ["a", "b", "c"]]
    assert [r.answer and r.answer["content"] for r in records] == ["b", "d"]
    assert [r.id for r in records] == ["x-0", "x-1"]


def test_requests_of_one_conversation_have_their_last_answer_only(tmp_path: Path) -> None:
    """Earlier turns of a request are its context: the client sent them, and they may be anybody's words."""
    before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    row = {"request": {"messages": before}, "response": {"choices": [{"message": {"content": "d"}}]}}
    (tmp_path / "log").write_text(json.dumps(row))
    (record,), _ = collect([str(tmp_path / "log")])
    assert [m["content"] for m in record.messages] == ["a", "b", "c"]
    assert record.answer == {"role": "assistant", "content": "d"}


def test_tool_calls_and_tools_are_kept(tmp_path: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    pieces = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": ""}}]
    pieces += [{"function": {"arguments": text}} for text in ('{"a": ', "2}")]
    chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"tool_calls": [{"index": 0, **p}]}}]} for p in pieces]
    chunks[-1]["choices"][0]["finish_reason"] = "tool_calls"
    asked = {"messages": [{"role": "user", "content": "add"}], "tools": tools}
    whole = {"choices": [{"message": {"role": "assistant", "content": None, "tool_calls": [call]}}]}
    (tmp_path / "log").write_text(
        "\n".join(json.dumps({"request": asked, "response": answer}) for answer in (whole, chunks))
    )
    records, refusals = collect([str(tmp_path / "log")])
    (record,) = records  # streamed and whole are the same answer
    assert refusals["a duplicate"]["count"] == 1
    assert record.tools == tools
    assert record.answer == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_columns_of_any_table_are_mapped_and_domains_named(tmp_path: Path) -> None:
    rows = [{"meta": {"team": "shop"}, "q": "What is 2 + 2?", "a": "It is 4.", "when": "2026-01-02T03:04:05Z"}]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, rows)))
    how = Reading({"prompt": "q", "response": "a", "time": "when"}, domain_field="meta.team")
    (record,), _ = collect([str(tmp_path / "log")], how)
    assert (tuple(record.messages), record.at, record.domain) == (SUM, AT, "shop")


def test_the_same_answer_logged_twice_is_one_record(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copy(LOGS / "litellm.jsonl", tmp_path / name)
    records, refusals = collect([str(tmp_path / "a"), str(tmp_path / "b")])
    assert len(records) == 2
    assert refusals["a duplicate"]["count"] == 2
    assert refusals["a duplicate"]["first"] == f"{tmp_path / 'b'}, line 1"


def test_a_uniform_sample_of_a_number_or_a_share(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("".join(json.dumps({"prompt": f"p{i}", "response": "r"}) + "\n" for i in range(400)))
    records, refusals = collect([str(tmp_path / "log")], share=0.25)
    assert 60 < len(records) < 140
    assert refusals["left out by --sample"]["count"] == 400 - len(records)
    spool = Spool(tmp_path / "other", with_answer=True)
    for found in read_log(str(tmp_path / "log"), Reading()):
        spool.add(found)
    spool.keep_lowest(50, "left out by --sample")
    spool.order()
    assert [q.rank for batch in spool.walk(batch=16) for q in batch] == list(range(50))
    assert [q.rank for batch in spool.walk(start=20, batch=16) for q in batch] == list(range(20, 50))


def _pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"requests": [("a", "b")]}))


def _old_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps([1, 2], protocol=0))


def _cut_line(path: Path) -> None:
    path.write_text((LOGS / "litellm.jsonl").read_text()[:-20])


def _cut_array(path: Path) -> None:
    path.write_text((LOGS / "sharegpt.json").read_text()[:-40])


def _cut_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress((LOGS / "litellm.jsonl").read_bytes())[:-200])


def _cut_zstandard(path: Path) -> None:
    path.write_bytes(zstandard.compress((LOGS / "litellm.jsonl").read_bytes())[:-200])


def _cut_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PARQUET["wildchat"]), path)
    path.write_bytes(path.read_bytes()[:-30])


def _spans_without_content(path: Path) -> None:
    attribute = {"key": "gen_ai.request.model", "value": {"stringValue": "pocket"}}
    span = {"spanId": "1", "name": "chat", "startTimeUnixNano": "1767323045000000000", "attributes": [attribute]}
    path.write_text(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}))


def _redacted(path: Path) -> None:
    row = json.loads((LOGS / "litellm.jsonl").read_text().splitlines()[0])
    row |= {"messages": "redacted-by-litellm", "response": "redacted-by-litellm"}
    path.write_text(json.dumps(row))


def _arrivals(path: Path) -> None:
    path.write_text('{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n')


def _foreign(path: Path) -> None:
    path.write_text('{"height": 3, "secret": "do not show"}\n')


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _not_a_log(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 20)


@pytest.mark.parametrize(
    ("write", "line", "rule", "remedy"),
    [
        (_pickle, "", "is a pickle", "JSON Lines"),
        (_old_pickle, "", "is a pickle", "JSON Lines"),
        (_cut_line, ", line 4", "ends in the middle of a record", "--skip-bad"),
        (_cut_array, ", line 2", "ends in the middle of a record", "--skip-bad"),
        (_cut_gzip, "", "is cut off", "--skip-bad"),
        (_cut_zstandard, "", "is cut off", "--skip-bad"),
        (_cut_parquet, "", "is damaged", "--skip-bad"),
        (_spans_without_content, ", line 1", "has no message content", "switch content capture on"),
        (_redacted, ", line 1", "has no message content", "switch content capture on"),
        (_arrivals, ", line 1", "arrival times", "no text to learn from"),
        (_foreign, ", line 1", "is of no known format", "--map"),
        (_empty, "", "is empty", "nothing to replay"),
        (_not_a_log, ", line", "is neither JSON nor valid CSV", "--skip-bad"),
    ],
    ids=lambda p: p.__name__.lstrip("_") if callable(p) else "",
)
def test_what_cannot_be_replayed_is_refused_by_file_line_rule_and_remedy(
    write: Callable[[Path], None], line: str, rule: str, remedy: str, tmp_path: Path
) -> None:
    write(tmp_path / "log")
    with pytest.raises(LogRefused) as refused:
        collect([str(tmp_path / "log")])
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'log'}{line}")
    assert rule in message
    assert remedy in message
    assert "do not show" not in message
    assert "\n" not in message


def test_what_can_be_read_of_a_bad_log_is_used_on_request(tmp_path: Path) -> None:
    rows = (LOGS / "litellm.jsonl").read_text().splitlines()
    (tmp_path / "log").write_text("\n".join([rows[0], "{broken", '{"height": 3}', rows[1][:-5]]))
    records, refusals = collect([str(tmp_path / "log")], Reading(skip_bad=True))
    assert len(records) == 1
    reasons = {"is not valid JSON": 2, "of no known format": 3, "the file ends in the middle of a record": 4}
    assert {r: v["first"] for r, v in refusals.items()} == {
        r: f"{tmp_path / 'log'}, line {n}" for r, n in reasons.items()
    }


def test_an_image_is_counted_and_the_rest_goes_on(tmp_path: Path) -> None:
    image = [{"type": "image_url", "image_url": {"url": "data:..."}}]
    rows = [
        {"messages": [{"role": "user", "content": image}, {"role": "assistant", "content": "A cat."}]},
        {"messages": [*SUM, {"role": "assistant", "content": "It is 4."}]},
    ]
    (tmp_path / "log").write_text("\n".join(map(json.dumps, rows)))
    records, refusals = collect([str(tmp_path / "log")])
    assert len(records) == 1
    assert refusals == {"content that is not text": {"count": 1, "first": f"{tmp_path / 'log'}, line 1"}}


def test_text_that_the_log_level_shortened_is_not_learned_from(tmp_path: Path) -> None:
    row = json.loads((LOGS / "sglang.jsonl").read_text().splitlines()[1])
    row["out"]["text"] = "x" * 1022 + " ... " + "x" * 1022
    (tmp_path / "log").write_text(json.dumps(row))
    records, refusals = collect([str(tmp_path / "log")])
    assert not records
    assert "text shortened by the log level" in next(iter(refusals))


def test_a_batch_identifier_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copy(LOGS / "batch_input.jsonl", tmp_path / name)
    with pytest.raises(LogRefused, match="one batch at a time"):
        collect([str(tmp_path / "a"), str(tmp_path / "b")])


@pytest.mark.parametrize("name", sorted(p.name for p in LOGS.iterdir()))
def test_reading_goes_on_where_it_was_interrupted(name: str, tmp_path: Path) -> None:
    whole = [(f.place.number, f.item) for f in read_log(str(LOGS / name), Reading())]
    for stop in range(len(whole)):
        rest = [(f.place.number, f.item) for f in read_log(str(LOGS / name), Reading(), skip=whole[stop][0])]
        assert rest == [entry for entry in whole if entry[0] > whole[stop][0]]


@pytest.mark.parametrize("name", sorted(p.name for p in LOGS.iterdir()))
def test_no_row_whatever_its_types_breaks_a_reader(name: str, tmp_path: Path) -> None:
    """Each value of each fixture replaced by one of another type: an answer, a refusal, never another error."""
    text = (LOGS / name).read_text()
    rows = [json.loads(line) for line in text.splitlines()] if name.endswith(".jsonl") else None
    if rows is None:
        return
    (tmp_path / "log").write_text("\n".join(json.dumps(variant) for row in rows for variant in _variants(row)))
    found = list(read_log(str(tmp_path / "log"), Reading(skip_bad=True)))
    assert {type(each.item) for each in found} <= {Record, Half, Refused}
    assert any(isinstance(each.item, Refused) for each in found)
    packed = [each.item.pack() for each in found if isinstance(each.item, Record)]
    assert [unpack(payload).pack() for payload in packed] == packed


def _variants(row: Any) -> Iterator[Any]:
    """The row with one value, however deep, replaced."""
    if isinstance(row, dict):
        for key, value in row.items():
            yield from ({**row, key: other} for other in (None, 3, "x", [], {}, [None], {"a": 1}))
            yield from ({**row, key: inner} for inner in _variants(value))
    elif isinstance(row, list) and row:
        yield from ([inner, *row[1:]] for inner in _variants(row[0]))


def test_paths_globs_and_folders_are_expanded_once_each(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("b", "a", ".hidden"):
        (tmp_path / "in" / name).write_text("x")
    files = [str(tmp_path / "in" / "a"), str(tmp_path / "in" / "b")]
    assert expand([str(tmp_path)]) == files
    assert expand([str(tmp_path / "in" / "*"), files[1]]) == files
    with pytest.raises(LogRefused, match="there is no such file"):
        expand([str(tmp_path / "nothing")])
