"""Who teaches, and what is said of it."""

import pytest

from adaptd.ingest.record import Record
from adaptd.ingest.teacher import Teacher, Wanted, decide, wrote

ANSWER = {"role": "assistant", "content": "4"}
ASKED = ({"role": "user", "content": "2+2"},)


@pytest.mark.parametrize(
    ("model", "assume", "found"),
    [
        ("meta-llama/Llama-3-8B", False, True),
        ("hosted_vllm/llama-3-8b", False, True),
        ("gpt-4", False, False),
        ("", False, None),
        ("", True, True),
        ("gpt-4", True, False),
    ],
)
def test_who_wrote_an_answer_is_known_by_name_alone(model: str, assume: bool, found: bool | None) -> None:
    assert wrote(Record(model=model), ["/models/Llama-3-8B/", "prod"], assume) is found


@pytest.mark.parametrize(
    ("wanted", "own", "answered", "has_target", "teacher", "reason"),
    [
        ("target", True, True, True, "target", "names the target"),
        ("target", False, True, True, None, "another model"),
        ("target", None, True, True, None, "does not say who"),
        ("regenerate", False, True, True, "regenerate", "asked for"),
        ("black-box", False, True, False, "black-box", "asked for"),
        ("black-box", None, False, False, None, "no answer"),
        ("auto", True, True, True, "target", "names the target"),
        ("auto", False, True, True, "regenerate", "another model"),
        ("auto", None, True, True, "regenerate", "does not say who"),
        ("auto", True, False, True, "regenerate", "no answer"),
        ("auto", True, True, False, "black-box", "no target at hand"),
        ("auto", None, True, False, "black-box", "no target at hand"),
        # Another model's answers without a target to correct them are worse than nothing.
        ("auto", False, True, False, None, "another model"),
    ],
)
def test_the_teacher_of_a_record_and_why(
    wanted: Wanted, own: bool | None, answered: bool, has_target: bool, teacher: Teacher | None, reason: str
) -> None:
    record = Record(messages=ASKED, answer=ANSWER if answered else None)
    found = decide(wanted, record, own, has_target=has_target)
    assert found.teacher == teacher
    assert reason in found.reason
