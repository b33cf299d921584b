"""Who teaches from a record, and why: the target over its recorded answer, the target anew, or the record alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple, get_args

from adaptd.ingest.record import Record

#: target      a teacher-forced pass of the target over the recorded answer; its K most likely tokens are kept
#: regenerate  the target answers again
#: black-box   the recorded answer as hard labels, without a target
Teacher = Literal["target", "regenerate", "black-box"]
Wanted = Literal["target", "regenerate", "black-box", "auto"]
WANTED: tuple[str, ...] = get_args(Wanted)


class Decision(NamedTuple):
    """`teacher` is None for a record that is not learned from; `reason` in a few words."""

    teacher: Teacher | None
    reason: str


def wrote(record: Record, names: Collection[str], assume: bool) -> bool | None:
    """Whether the target wrote the recorded answer; None: the log does not say.

    Args:
      names: under which the target is known; compared without case and without what stands in front of the last `/`.
      assume: what to take it for where the log does not say.
    """
    if not record.model:
        return True if assume else None
    return _name(record.model) in {_name(name) for name in names}


def _name(model: str) -> str:
    return model.rstrip("/").rpartition("/")[2].lower()


def decide(wanted: Wanted, record: Record, own: bool | None, *, has_target: bool) -> Decision:
    """The teacher of one record.

    Training on answers that are not the target's own is worse than none (reference: answers of people lost a third of the
    speed-up), so such answers are never a white-box lesson.

    Args:
      own: as `wrote` says.
      has_target: whether the target's weights are at hand.
    """
    answered = record.answers()
    if wanted == "regenerate":
        return Decision("regenerate", "asked for")
    if wanted == "black-box":
        return Decision("black-box", "asked for") if answered else Decision(None, "no answer")
    if own and answered:
        if has_target:
            return Decision("target", "the log names the target")
        return Decision("black-box", "no target at hand")
    if not answered:
        why = "no answer is logged"
    else:
        why = "another model wrote the answer" if own is False else "the log does not say who wrote the answer"
    if wanted == "auto" and has_target:
        return Decision("regenerate", why)
    if wanted == "auto" and own is None and answered:
        return Decision("black-box", "no target at hand")
    return Decision(None, why)
