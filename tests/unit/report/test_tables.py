"""What a cell says where a figure is unknown."""

import numpy as np
import pytest

from adaptd.report.tables import gain, on_base, show
from policies.gate import Score, judge


def verdict(reserved: int) -> dict[str, object]:
    scores = [Score("math", "reserved", 10.0, 4.0 + i % 3) for i in range(reserved)]
    return judge(
        scores, scores, min_gain=0.01, max_regression=0.02, min_traces=2, rng=np.random.default_rng(0)
    ).as_dict()


@pytest.mark.parametrize(
    ("reserved", "cell"), [(0, "-"), (1, "+0.0% [-, -]"), (2, "+0.0% [+0.0%, +0.0%]")], ids=["none", "one", "two"]
)
def test_a_verdict_on_too_few_traces_has_unknown_bounds(reserved: int, cell: str) -> None:
    assert gain(verdict(reserved)) == cell


def test_no_verdict_is_a_dash() -> None:
    assert gain(None) == "-"


def test_domains_on_the_base_draft_are_listed_and_a_missing_label_has_a_name() -> None:
    assert on_base({"on_base": ["", "medical"]}) == "unlabelled, medical"
    assert on_base({}) == on_base(None) == ""


def test_a_pipe_is_wide_enough_for_tables(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    show("x" * 150)
    monkeypatch.setenv("COLUMNS", "60")
    show("y" * 60, "z" * 61)
    assert capsys.readouterr().out.splitlines() == ["x" * 150, "y" * 60, "z" * 60, "z"]
