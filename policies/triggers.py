"""When a learning tick is due. Counts and durations are passed in: no clock here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LearnTrigger:
    """Learn after a drift, after enough new traces, or after enough time; None switches one of the last two off."""

    #: New traces after which to learn, at least 1.
    min_new_traces: int | None
    #: Seconds since the last tick after which to learn, if there is any new trace at all.
    interval_s: float | None

    def __post_init__(self) -> None:
        if self.min_new_traces is not None and self.min_new_traces < 1:
            raise ValueError(f"min_new_traces ({self.min_new_traces}) must be at least 1, or None to switch it off")
        if self.interval_s is not None and not self.interval_s > 0.0:
            raise ValueError(f"interval_s ({self.interval_s}) must be above 0 s, or None to switch it off")

    def due(self, new_traces: int, seconds_since_last: float, drifted: bool) -> str | None:
        """Why to learn now: "drift", "traces" or "time", the first that holds; None if nothing is due.

        Args:
          new_traces: traces written since the last tick. Without any, nothing is due: there is nothing new to learn.
          seconds_since_last: seconds since the last tick ended; infinity if there was none.
          drifted: a domain drifted since the last tick.
        """
        if new_traces < 1:
            return None
        if drifted:
            return "drift"
        if self.min_new_traces is not None and new_traces >= self.min_new_traces:
            return "traces"
        if self.interval_s is not None and seconds_since_last >= self.interval_s:
            return "time"
        return None
