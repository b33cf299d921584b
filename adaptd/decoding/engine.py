"""The speculative decoder: k proposals, one target pass over k+1 positions, an exact accept rule, rows of any length.

Invariants
----------
* Output follows the target alone. The accept test uses the draft's distribution as it was when the proposal was drawn,
  so draft weights may change between any two `step`s: acceptance changes, output does not.
* For a row with n known tokens the target's cache holds positions < n-1, the draft's at least positions < n-2. A round
  feeds the draft the last two known tokens at n-2, n-1 and then its own proposals; writing a position again with the
  same token is harmless, and so the shape of a round does not depend on how much was accepted. The target is fed the
  last token and the proposals at n-1 .. n+k-1.
* Rolling back is nothing but a row's n: what a rejected proposal wrote lies behind it and is overwritten.
* A round may have any k from 0 to the longest. Without proposals it is plain decoding: the draft does not run, its cache
  falls behind by one position, and before the next proposals it reads what it has missed.
* Active rows are slots [0, n_active); rows that are still reading their prompt follow them (`Prefill`). When a row leaves,
  the last active row is copied into its slot.
* A round makes one device-to-host copy (`RoundPacker.pack`).
* While there is no request, `ask` reads into slots what it likes, and says what they hold (`Prefill.fetch`).

Not safe for threads: one owner calls everything (`DecodeLoop`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from adaptd.decoding.alternatives import AlternativesReader, Asking
from adaptd.decoding.capture import CaptureConfig, Round, RoundPacker, Words
from adaptd.decoding.drafting import Drafter
from adaptd.decoding.graphs import Capture
from adaptd.decoding.prefill import Prefill
from adaptd.decoding.recall import RecallRound, observe_trace
from adaptd.decoding.request import DecodeRequest, Delta, Detokenize, Finished, FinishReason
from adaptd.decoding.row import Row, draw_uniforms
from adaptd.decoding.runner import ModelRunner, columns
from adaptd.decoding.sampling import RowParams
from adaptd.decoding.verify import verify
from adaptd.errors import ContextLengthExceeded, Overloaded
from adaptd.models.cache import round_up
from buffers.trace import Trace
from policies.draft_length import DraftLength
from policies.recall import Recall


class SpeculativeDecoder:
    """Continues requests with a target and a draft model; requests join and leave between rounds.

    Args:
      target, draft: Hugging Face causal LMs in eval mode with one tokenizer (`adaptd.models` checks that). The logits
        of one may be padded wider than the other's.
      k: proposals a round; with `draft_length`, at most.
      max_batch: rows decoded together.
      max_length: tokens of prompt and answer together.
      eos_ids: tokens that end an answer.
      detokenize: token ids to text; None: no text, and no stop strings.
      capture: what to keep for traces; None keeps nothing.
      recall: what was served before, mixed into the proposals and fed from the captured answers; None: the draft alone.
      draft_length: chooses each round's k, up to `k`; None: always `k`. Rounds with a sampled row that has a seed have `k`
        in any case: its random numbers, and so its tokens, would change with it.
      prefill_tokens: most prompt tokens read a step, over all rows that join together.
      prefix_caching: whether what a prompt has in common with an earlier one is not read again by the target.
      capture_passes: how the draft's passes and the target's are captured (`adaptd.decoding.graphs`); None: they are not.
      compiled: whether passes over few positions run in compiled code on a CPU (`adaptd.models.native`).
      draft_version: version of the draft's weights; its owner sets the attribute after a swap.
      clock: unix seconds, for `Trace.created_at`.
    Raises: ValueError: a number is out of range, or a model cannot be decoded this way.
    """

    def __init__(
        self,
        target: nn.Module,
        draft: nn.Module,
        *,
        k: int,
        max_batch: int,
        max_length: int,
        eos_ids: Collection[int] = (),
        detokenize: Detokenize | None = None,
        capture: CaptureConfig | None = None,
        recall: Recall | None = None,
        draft_length: DraftLength | None = None,
        prefill_tokens: int = 1024,
        prefix_caching: bool = True,
        capture_passes: Capture | None = None,
        compiled: bool = True,
        draft_version: int = 0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        for name, value, least in (
            ("k", k, 1),
            ("max_batch", max_batch, 1),
            ("max_length", max_length, 2),
            ("prefill_tokens", prefill_tokens, 1),
        ):
            if value < least:
                raise ValueError(f"{name} ({value}) must be at least {least}")
        if draft_length is not None and draft_length.k_max != k:
            raise ValueError(f"draft_length (k_max {draft_length.k_max}) must choose up to k ({k})")
        self.k, self.max_batch, self.max_length = k, max_batch, max_length
        self.eos_ids = frozenset(eos_ids)
        self.draft_version = draft_version
        self._lengths = draft_length
        self._detokenize, self._clock = detokenize, clock
        # A round of a row one token short of the end writes up to k positions behind it.
        capacity = round_up(max_length + k)
        self._target, self._draft = (
            ModelRunner(
                model,
                slots=max_batch,
                capacity=capacity,
                max_length=max_length,
                capture=capture_passes,
                compiled=compiled,
            )
            for model in (target, draft)
        )
        self.vocab_size = self._target.vocab_size
        shared = min(self._target.vocab_size, self._draft.vocab_size)
        self.device = self._target.device
        on_cpu = compiled and self.device.type == "cpu"
        self._packer = RoundPacker(k, shared, capture, compiled=on_cpu)
        # What is captured has to be operations that a capture sees.
        looks = on_cpu and capture_passes is None
        self._recall = None if recall is None else RecallRound(recall, capacity, self.device, compiled=looks)
        self._drafter = Drafter(self._draft, self.vocab_size, self._recall)
        self._offsets = torch.arange(-2, k, device=self.device)
        self._rows: list[Row] = []
        self._prefill = Prefill(
            self._target,
            self._draft,
            self._drafter.known,
            slots=max_batch,
            tokens=prefill_tokens,
            reuse=prefix_caching,
        )
        self._alternatives = AlternativesReader(
            self._target,
            self._prefill,
            n=0 if capture is None else capture.alternatives,
            k_branch=0 if capture is None else capture.k_branch,
            k_tail=0 if capture is None or capture.k_branch != capture.k_top else capture.k_tail,
            rng=np.random.default_rng(),
        )
        self.rounds = 0
        """Rounds so far, each over all active rows."""
        # Device-side state of the active rows; `_rebuild` fills it when rows have joined or left.
        self._stale = True
        self._n: Tensor
        self._last_two: Tensor
        self._params: RowParams
        self._observe: bool
        self._classes: list[str]
        self._pinned: bool

    # -- requests ------------------------------------------------------------------------------------------------

    @property
    def active(self) -> int:
        """Requests that have been added and have not ended."""
        return len(self._rows) + len(self._prefill)

    @property
    def recalled(self) -> int:
        """Contexts that are remembered; 0 without recall."""
        return 0 if self._recall is None else len(self._recall.recall)

    @property
    def draft_lengths(self) -> dict[str, int]:
        """The k chosen last, by domain; empty where it is fixed. Any thread may ask."""
        return {} if self._lengths is None else self._lengths.chosen

    def can_add(self) -> bool:
        """Whether there is a slot for one more request."""
        return self.active < self.max_batch

    def check(self, request: DecodeRequest) -> None:
        """Refuses what can never be served. Reads no state; any thread may call it.

        Raises:
          ContextLengthExceeded: no room for an answer behind the prompt.
          ValueError: a token id outside the vocabulary, or stop strings without a detokenizer.
        """
        size = len(request.prompt_ids)
        if size >= self.max_length:
            raise ContextLengthExceeded(
                f"the prompt has {size} tokens and the context {self.max_length}; shorten it by at least "
                f"{size - self.max_length + 1}"
            )
        low, high = min(request.prompt_ids), max(request.prompt_ids)
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"prompt_ids ({low if low < 0 else high}) must lie in 0..{self.vocab_size - 1}, the target's vocabulary"
            )
        if request.params.stop and self._detokenize is None:
            raise ValueError("stop needs text, and this decoder was built without a detokenizer; leave stop empty")

    def add(self, request: DecodeRequest) -> None:
        """Takes a request; it joins at the next `step`.

        Raises: Overloaded: no free slot; what `check` raises.
        """
        self.check(request)
        if not self.can_add():
            raise Overloaded(f"all {self.max_batch} slots are taken; wait for one to leave")
        self._prefill.waiting.append(Row(request, self._detokenize))

    def abort(self, request_id: str) -> Finished | None:
        """Ends a request now; None if it is not here. Its tokens so far come back, its trace does not."""
        for at, row in enumerate(self._rows):
            if row.request.request_id == request_id:
                self._remove({at})
                return self._finished(row, "abort")
        for row in self._prefill.group:
            if row.request.request_id == request_id and not row.aborted:
                # Its slot is between others that are being filled; it is dropped when they become active.
                row.aborted = True
                self._prefill.drop_aborted()
                return self._finished(row, "abort")
        for row in self._prefill.waiting:
            if row.request.request_id == request_id:
                self._prefill.waiting.remove(row)
                return self._finished(row, "abort")
        return None

    # -- the round -----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        """Reads one chunk of the joining prompts, then plays one round over the active rows.

        Returns: one Delta a row that was active; the last one of a request carries its `Finished`.
        """
        self._activate(*self._prefill.step(self._rows))
        if not self._rows:
            return []
        if self._stale:
            self._rebuild()
        k = self.k
        if self._lengths is not None and not self._pinned:
            k = self._lengths.choose(self._classes, self.draft_version)
        if k and self._lengths is not None:
            self._prefill.catch_up(self._rows)
        started = time.perf_counter()
        words = self._play(k)
        seconds = time.perf_counter() - started
        self._prefill.played(seconds)
        return self._commit(words, k, seconds)

    def _play(self, k: int) -> Words:
        """Propose, verify, advance: everything on the device; returns the round's words on the host."""
        params = self._params
        length = round_up(max(len(row.tokens) for row in self._rows) + k)
        # A row with one token has no token before it: it feeds that one twice, at the same place.
        positions = (self._n[:, None] + self._offsets[: k + 2]).clamp_(min=0)
        target_masks = self._target.masks(positions, length)
        same = self._target.dtype == self._draft.dtype and self._target.windows == self._draft.windows
        draft_masks = target_masks if same else self._draft.masks(positions, length)
        # k proposals, k accept tests, the last token.
        uniforms = draw_uniforms(self._rows, 2 * k + 1, params).to(self.device, non_blocking=True)

        drafted, proposals = None, self._n.new_empty(len(self._rows), 0)
        if k:
            self._draft.open_to(self._rows)
            drafted = self._drafter.propose(
                k, self._n, self._last_two, positions, draft_masks, length, uniforms, self._params
            )
            proposals = drafted.tokens
        fed = torch.cat((self._last_two[:, 1:], proposals), 1)
        logits = self._target.forward(
            fed, positions[:, 1:], columns(target_masks, 1, k + 2), 0, length, last_only=False, of_round=True
        )
        n_accepted, final, p = verify(
            logits, None if drafted is None else drafted.q, proposals, uniforms[:, k:], params
        )

        # The token before the final one is the last accepted proposal, or the token this round began with.
        self._last_two = torch.cat((fed.gather(1, n_accepted[:, None]), final[:, None]), 1)
        tokens = torch.cat((proposals, final[:, None]), 1).scatter_(1, n_accepted[:, None], final[:, None])
        if self._recall is not None:
            own, recalled = (None, None) if drafted is None else (drafted.own, drafted.recalled)
            self._recall.settle(self._n, p, tokens, n_accepted, params, own, recalled)
        self._n = self._n + n_accepted + 1
        played = Round(logits, None if drafted is None else drafted.logits, p, proposals, n_accepted, tokens)
        self.rounds += 1
        return self._packer.pack(played, params, self._observe)

    def _commit(self, words: Words, drafted: int, seconds: float) -> list[Delta]:
        """Gives each row its tokens and ends the rows that are done."""
        deltas, leaving = [], set[int]()
        for at, (row, head) in enumerate(zip(self._rows, words[:, : self.k + 2].tolist(), strict=True)):
            ids = head[: head[-1] + 1]
            ids, text, reason = row.commit(ids, drafted, self.max_length, self.eos_ids, self.draft_version)
            if self._observe and row.request.store:
                row.words.append(words[at])
            finished = None
            if reason is not None:
                finished = self._finished(row, reason)
                leaving.add(at)
            deltas.append(Delta(row.request.request_id, tuple(ids), text, finished))
        if self._lengths is not None:
            self._lengths.observe(self._classes, drafted, [row.judged for row in self._rows], seconds)
        self._remove(leaving)
        return deltas

    def _finished(self, row: Row, reason: FinishReason) -> Finished:
        trace = None
        if row.words and reason != "abort":
            trace = self._packer.assemble(
                row.request, row.tokens, row.words, row.drafted, row.version_max, self._clock()
            )
            if self._recall is not None:
                observe_trace(self._recall.recall, trace)
        further = None if self._lengths is None else self._lengths.further(row.request.domain)
        return Finished(
            request_id=row.request.request_id,
            token_ids=tuple(row.tokens[row.prompt_len :]),
            text=None if row.stream is None else row.stream.text,
            finish_reason=reason,
            stats=row.stats(self.k, further),
            trace=trace,
            prompt_tokens=row.prompt_len,
            cached_tokens=row.cached,
        )

    # -- while there is no request -------------------------------------------------------------------------------

    def asking(self, trace: Trace) -> Asking | None:
        """What there is to ask the target about beside an answer; None: nothing."""
        return self._alternatives.begin(trace)

    def ask(self, asking: Asking) -> bool:
        """One short pass of the target over that; whether it was the last. Writes into slots: there must be no request.

        Raises: RuntimeError: there is one.
        """
        if self.active:
            raise RuntimeError(f"{self.active} requests are here, and their slots would be written")
        return self._alternatives.step(asking)

    # -- rows ----------------------------------------------------------------------------------------------------

    def _activate(self, rows: Sequence[Row], first: int) -> None:
        """Lets rows whose prompts are read, in slots from `first` on, play, closing the gaps that rows have left meanwhile."""
        moves = []
        for slot, row in enumerate(rows, first):
            if not row.aborted:
                moves.append((slot, len(self._rows)))
                self._rows.append(row)
                self._stale = True
        self._move(moves)

    def _remove(self, leaving: Collection[int]) -> None:
        """Takes rows out of the active ones; the last ones fill the gaps."""
        if not leaving:
            return
        rows, left = self._rows, len(self._rows) - len(leaving)
        gaps = [at for at in leaving if at < left]
        fillers = [at for at in range(left, len(rows)) if at not in leaving]
        moves = list(zip(fillers, gaps, strict=True))
        for slot in (*leaving, *fillers):
            self._prefill.left(slot, rows[slot])
        for source, destination in moves:
            rows[destination] = rows[source]
        del rows[left:]
        self._stale = True
        self._move(moves)

    @torch.inference_mode()
    def _move(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copies cache rows (source, destination); `_rows` names the new places already."""
        moves = [move for move in moves if move[0] != move[1]]
        if moves:
            sources, destinations = zip(*moves, strict=True)
            length = max(len(self._rows[at].tokens) for at in destinations) - 1
            for runner in (self._target, self._draft):
                runner.cache.move(sources, destinations, length)

    def _rebuild(self) -> None:
        """Device-side state of the active rows; only needed when rows joined or left."""
        rows, device = self._rows, self.device
        self._n = torch.tensor([len(row.tokens) for row in rows], device=device)
        self._last_two = torch.tensor(
            [[row.tokens[max(0, len(row.tokens) - 2)], row.tokens[-1]] for row in rows], device=device
        )
        self._params = RowParams.build([row.request.params for row in rows], self.vocab_size, device)
        if self._recall is not None:
            self._recall.start(rows)
        self._observe = self._packer.config is not None and any(row.request.store for row in rows)
        self._classes = [row.request.domain for row in rows]
        self._pinned = any(row.pinned for row in rows)
        self._stale = False
