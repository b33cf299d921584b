"""vLLM's own Prometheus counters of speculation: the figures of record for what a draft achieves in that server."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_PREFIX = "vllm:spec_decode_num_"


@dataclass(frozen=True, slots=True)
class SpecCounters:
    """Cumulative counts over all engines of a server; the difference of two is a window."""

    #: Verification steps, one a request: rounds.
    drafts: float = 0.0
    #: Proposed tokens.
    draft_tokens: float = 0.0
    #: Accepted proposals, without the bonus token.
    accepted: float = 0.0

    def __sub__(self, earlier: SpecCounters) -> SpecCounters:
        return SpecCounters(
            self.drafts - earlier.drafts,
            self.draft_tokens - earlier.draft_tokens,
            self.accepted - earlier.accepted,
        )

    @property
    def mal(self) -> float | None:
        """Mean acceptance length, bonus included; None without a round."""
        return 1.0 + self.accepted / self.drafts if self.drafts > 0 else None


@dataclass(frozen=True, slots=True)
class ServerMetrics:
    """What one scrape says."""

    counters: SpecCounters
    #: Unix time at which the server's process started, seconds; None where it does not say (several API servers).
    started_at: float | None
    #: Whether the server drafts at all, as far as its metrics show.
    speculates: bool


def parse_metrics(text: str) -> ServerMetrics:
    """Read a scrape of vLLM's `/metrics`.

    Raises:
      ValueError: it is no Prometheus text.
    """
    sums = {"drafts": 0.0, "draft_tokens": 0.0, "accepted_tokens": 0.0}
    started: float | None = None
    speculates = False
    for family in text_string_to_metric_families(text):
        if family.name == "process_start_time_seconds":
            started = family.samples[0].value
        if family.name.startswith(_PREFIX):
            speculates = True
            key = family.name.removeprefix(_PREFIX)
            if key in sums:
                sums[key] += sum(s.value for s in family.samples if s.name.endswith("_total"))
    counters = SpecCounters(sums["drafts"], sums["draft_tokens"], sums["accepted_tokens"])
    return ServerMetrics(counters, started, speculates)
