"""Host side of one request while it is decoded: tokens, text, counts, and when to stop."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from adaptd.decoding.capture import Words
from adaptd.decoding.request import DecodeRequest, Detokenize, FinishReason, RequestStats
from adaptd.decoding.sampling import RowParams
from adaptd.decoding.text import TextStream


class Row:
    """A request in a slot of the decoder."""

    __slots__ = (
        "_features",
        "aborted",
        "accepted",
        "behind",
        "cached",
        "drafted",
        "generator",
        "last_emitted",
        "prompt_len",
        "request",
        "stream",
        "tokens",
        "version_max",
        "version_min",
        "words",
    )

    def __init__(self, request: DecodeRequest, detokenize: Detokenize | None) -> None:
        seed = request.params.seed
        self.request = request
        self.tokens = [int(token) for token in request.prompt_ids]
        self.prompt_len = len(self.tokens)
        self.generator = torch.Generator()
        # A generator of its own: what shares the batch cannot shift this request's random numbers. Any integer is a
        # seed; torch takes 63 bits of it.
        self.generator.manual_seed(secrets.randbits(63) if seed is None else seed % (1 << 63))
        self.stream = None if detokenize is None else TextStream(detokenize, request.params.stop)
        self.words: list[Words] = []
        self.accepted: list[int] = []
        self.drafted: list[int] = []
        self.behind = 0
        """Tokens that the draft's cache lacks: rounds without a draft since the last one with."""
        self.last_emitted = 0
        self.version_min = self.version_max = -1
        self.aborted = False
        self.cached = 0  # tokens of the prompt that the target had read for another one
        self._features: Tensor | None = None

    def prompt_features(self, compute: Callable[[Sequence[Sequence[int]]], Tensor]) -> Tensor:
        """What a request gate knows of this request, [H]; computed once. `compute`: prompts to [B, H]."""
        if self._features is None:
            self._features = compute([self.request.prompt_ids])[0]
        return self._features

    @property
    def emitted(self) -> int:
        """Response tokens so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def pinned(self) -> bool:
        """Whether its random numbers belong to rounds of the longest draft: a seed must mean the same every time."""
        return self.request.params.seed is not None and not self.request.params.greedy

    def commit(
        self, ids: list[int], drafted: int, max_length: int, eos_ids: Collection[int], version: int
    ) -> tuple[list[int], str, FinishReason | None]:
        """Takes the tokens of a round and cuts those behind the answer's end.

        Args:
          ids: the accepted proposals and the token after them.
          drafted: proposals of the round.
          max_length: tokens of prompt and answer together at most.
          eos_ids: tokens that end an answer.
          version: version of the draft that proposed.
        Returns: tokens kept, text released, and why the row ends (None: it goes on).
        """
        params = self.request.params
        self.accepted.append(len(ids) - 1)
        self.drafted.append(drafted)
        self.behind = 0 if drafted else self.behind + 1
        if self.version_min < 0:
            self.version_min = version
        self.version_max = version
        reason: FinishReason | None = None
        room = min(params.max_tokens - self.emitted, max_length - len(self.tokens))
        if len(ids) >= room:
            ids, reason = ids[:room], "length"
        shown = ids
        if not params.ignore_eos:
            end = next((at for at, token in enumerate(ids) if token in eos_ids), None)
            if end is not None:
                ids, shown, reason = ids[: end + 1], ids[:end], "stop"
        text = ""
        if self.stream is not None:
            text, needed = self.stream.push(shown)
            if needed is not None:
                ids, reason = ids[:needed], "stop"
            elif reason is not None:
                text += self.stream.flush()
        self.tokens += ids
        self.last_emitted = len(ids)
        return ids, text, reason

    @property
    def judged(self) -> tuple[int, int]:
        """Of the last round: proposals accepted and emitted, and proposals judged."""
        accepted, emitted = self.accepted[-1], self.last_emitted
        return min(accepted, emitted), min(accepted + 1, self.drafted[-1], emitted)

    def stats(self, k: int, further: Sequence[float] | None = None) -> RequestStats:
        """Counts as `policies.acceptance.Profile` defines them: the last round counts up to the last token emitted.

        Args:
          k: the longest draft.
          further: [k + 1] expected acceptances behind a draft of each length that was accepted as a whole; None where every
            round drafts k.
        """
        if not self.accepted:
            return RequestStats(0, 0, 0, 0, (0,) * k, (0,) * k, self.version_min, self.version_max)
        earlier = list(zip(self.accepted[:-1], self.drafted[:-1], strict=True))
        accepted_at, reached_at = [0] * k, [0] * k
        for n_accepted, n_reached in [*((a, min(a + 1, drafted)) for a, drafted in earlier), self.judged]:
            for depth in range(n_reached):
                reached_at[depth] += 1
                accepted_at[depth] += depth < n_accepted
        return RequestStats(
            rounds=len(self.accepted),
            proposed=sum(self.drafted[:-1]) + min(self.drafted[-1], self.last_emitted),
            accepted=sum(accepted_at),
            emitted=self.emitted,
            accepted_at=tuple(accepted_at),
            reached_at=tuple(reached_at),
            draft_version_min=self.version_min,
            draft_version_max=self.version_max,
            share_at_k=None if further is None else self._share(earlier, k, further),
        )

    def _share(self, earlier: Sequence[tuple[int, int]], k: int, further: Sequence[float]) -> float | None:
        """Share accepted, had every round with a draft proposed k: what was cut short is continued as it is expected to be.

        None without such a round.
        """
        accepted, judged = self.judged[0], min(self.drafted[-1], self.last_emitted)
        full = [a + (further[a] if a == drafted else 0.0) for a, drafted in earlier if drafted]
        proposed = judged + len(full) * k
        return (accepted + sum(full)) / proposed if proposed else None


def draw_uniforms(rows: Sequence[Row], size: int, params: RowParams) -> Tensor:
    """Random numbers of a round, float32 [B, size] on the CPU, each row's from its own generator; 0 for greedy rows.

    On the CPU, so that a seed means the same on every device.
    """
    drawn = torch.zeros(len(rows), size)
    if params.any_sampled:
        for at, row in enumerate(rows):
            if not row.request.params.greedy:
                torch.rand(size, generator=row.generator, out=drawn[at])
    return drawn
