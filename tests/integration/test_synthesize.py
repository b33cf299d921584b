"""`adaptd synthesize` on the pocket target, read back by the readers of `adaptd replay`."""

from pathlib import Path

import pytest

from adaptd.app import synthesize
from adaptd.app.synthesize import SynthesisOptions, run
from adaptd.config import Config
from adaptd.errors import AdaptdError
from adaptd.ingest.read import Reading, read_log
from adaptd.ingest.record import Record


def test_queries_and_answers_are_a_log_that_replay_reads(settings: Config, tmp_path: Path) -> None:
    out = tmp_path / "log.jsonl.gz"
    options = SynthesisOptions(
        n=2, domains=[("plain", ""), ("maths", "You ask about maths.")], max_query=96, max_tokens=8
    )
    found = run(settings, out, options)
    assert found["by_domain"] == {"plain": 2, "maths": 2}
    records = [f.item for f in read_log(str(out), Reading(domain_field="domain"))]
    assert len(records) == 4
    assert all(isinstance(r, Record) and r.model == "pocket" and r.answers() for r in records)
    asked = [r.messages for r in records if isinstance(r, Record)]
    assert len({str(m) for m in asked}) == 4, "no two alike"
    assert [len(m) for m in asked] == [1] * 2 + [2] * 2, "the system prompt is part of what was asked"
    assert [r.domain for r in records if isinstance(r, Record)] == ["plain"] * 2 + ["maths"] * 2
    with pytest.raises(AdaptdError, match="exists"):
        run(settings, out, options)


def test_a_domain_without_usable_queries_is_given_up(
    settings: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthesize, "_PATIENCE", 16)
    with pytest.raises(AdaptdError, match=r"of no use .*--max-query"):
        run(settings, tmp_path / "log", SynthesisOptions(n=8, query_temperature=0, max_query=16, max_tokens=4))
    assert not list(tmp_path.glob("log*")), "nothing half-written stays"
