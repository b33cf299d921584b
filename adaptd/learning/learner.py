"""One optimiser over the draft's private tensors: a step turns sampled traces into a smaller divergence and new priorities."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from adaptd.learning.batch import Batch, collate, draft_logits
from adaptd.learning.branches import BranchRows, Choice, reads_branches
from adaptd.learning.muon import Muon
from adaptd.models.request_gate import request_gate
from buffers.table import ReplaySample
from buffers.trace import Source, Trace
from policies.divergence import draft_with_draws, draft_with_tail, forward_kl, tail_cross_entropy, with_tail
from policies.objectives import compute_objective, get_objective
from policies.priority import Measure, Priority, is_measure, measured_priorities
from policies.surprise import Mode, surprise_priority, surprise_ratio

#: Steps since a restart that the average is taken back to where traffic changes: it is then of the last ten or so.
_SHORTENED = 90

#: Draft probabilities averaged in the SurpriseRatio's denominator.
_SURPRISE_TOP = 8


class Adapted(Protocol):
    """What the learner needs of a draft: `adaptd.models.scope.AdaptedDraft` has it."""

    @property
    def model(self) -> PreTrainedModel:
        """The draft, Hugging Face forward."""

    @property
    def gates_requests(self) -> bool:
        """Whether one request can have the base while another has what was learned."""

    def trainable(self) -> dict[str, nn.Parameter]:
        """The only tensors that may change, by name."""

    def matrices(self) -> set[str]:
        """Names of those that Muon is made for."""

    def state(self) -> dict[str, Tensor]:
        """Copies of them."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values in place; an empty mapping means day 0."""

    def prove_frozen(self) -> None:
        """Raise if anything else requires gradients."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did."""

    loss: float
    """Mean divergence of the batch, in the objective's unit per position, draws of the tail left out; NaN when skipped."""
    skipped: bool
    """The loss or a gradient was not finite: nothing was changed."""
    tokens: int
    positions: int
    seconds: float
    priorities: dict[int, float] = field(default_factory=dict)


class DraftLearner:
    """AdamW, or Muon and AdamW, on the trainable tensors of one adapted draft; owns nothing else.

    Args:
      draft: the training instance.
      objective: name in `policies.objectives.OBJECTIVES`.
      k: tokens that the decoders propose a round; only an objective over blocks needs it.
      rejection_weight: weight of corrections in the loss, against 1 for every other position.
      branch_weight: of each position of a branch; 0 leaves them out. They are left out as well where the objective looks
        along an answer or at what was emitted, and where the draft's attention takes no mask (`reads_branches`).
      branch_share: of the branches of a trace, read in one step; other ones in the next.
      optimizer: "muon": Muon on the private expert's matrices, AdamW on everything else; "adamw": AdamW on all.
      lr: peak learning rate; rises linearly over `warmup_steps`.
      weight_decay: decoupled.
      clip: largest gradient norm.
      max_tokens: longest sequence in a batch.
      prompt_gradient: also learn through what a prompt's tokens leave behind for the answer; dearer (`draft_logits`).
      priority: what makes a trace worth replaying, after each step; tau: threshold of the SurpriseRatio.
      average_decay: of the moving average that is judged and published; 0 publishes the weights of the last step.
    """

    #: Keyword arguments of the constructor, the names of section `learn` of the configuration.
    OPTIONS = (
        "objective",
        "rejection_weight",
        "branch_weight",
        "branch_share",
        "optimizer",
        "lr",
        "weight_decay",
        "warmup_steps",
        "clip",
        "max_tokens",
        "prompt_gradient",
        "priority",
        "tau",
        "average_decay",
    )

    def __init__(
        self,
        draft: Adapted,
        *,
        objective: str,
        lr: float,
        k: int | None = None,
        rejection_weight: float = 1.0,
        branch_weight: float = 1.0,
        branch_share: float = 1.0,
        optimizer: Literal["muon", "adamw"] = "adamw",
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        clip: float = 1.0,
        max_tokens: int = 384,
        prompt_gradient: bool = False,
        priority: Priority = "surprise",
        tau: float = 1.0,
        average_decay: float = 0.985,
    ) -> None:
        draft.prove_frozen()
        self._blocks, self._draws = get_objective(objective).blocks, get_objective(objective).draws
        at_one_position = get_objective(objective).soft and not self._blocks
        self._branch_weight = branch_weight if at_one_position and reads_branches(draft.model) else 0.0
        if self._blocks and k is None:
            raise ValueError(f"objective {objective!r} needs k, the tokens that the decoders propose a round")
        self._branch_share, self._measured = branch_share, is_measure(priority)
        self.draft, self._k, self._rejection_weight = draft, k, rejection_weight
        self._objective, self._lr, self._warmup, self._clip = objective, lr, warmup_steps, clip
        self._max_tokens, self._priority, self._tau = max_tokens, priority, tau
        self._prompt_gradient = prompt_gradient
        self._weight_decay, self._average_decay, self._optimizer = weight_decay, average_decay, optimizer
        self._parameters = draft.trainable()
        self.steps = 0
        self.skipped_in_a_row = 0
        self._reference: Mapping[str, Tensor] | None = None
        self._new_optimiser()

    def _new_optimiser(self) -> None:
        matrices = self.draft.matrices() if self._optimizer == "muon" else set()
        orthogonal = [p for name, p in self._parameters.items() if name in matrices]
        plain = [p for name, p in self._parameters.items() if name not in matrices]
        self._optimisers: list[torch.optim.Optimizer] = []
        if plain:
            self._optimisers.append(
                torch.optim.AdamW(plain, lr=self._lr, weight_decay=self._weight_decay, betas=(0.9, 0.98))
            )
        if orthogonal:
            self._optimisers.append(Muon(orthogonal, lr=self._lr, weight_decay=self._weight_decay))
        self._since_restart = 0
        self._average = self.draft.state()

    def centre(self, traces: Sequence[Trace]) -> None:
        """Let the request gate, if there is one and it has no centre yet, tell prompts apart by how they differ from these."""
        gate = request_gate(self.draft.model)
        if gate is not None and not gate.centred and traces:
            gate.centre_on([t.tokens[: max(1, t.prompt_len)].astype(np.int64) for t in traces])
            self._average["request_gate.centre"] = gate.centre.detach().clone()

    def step(self, samples: Sequence[ReplaySample], weights: np.ndarray | None = None) -> StepReport:
        """One update on `samples`; `weights` [len(samples)] multiply each trace's positions (importance weights)."""
        started = time.perf_counter()
        self.centre([s.trace for s in samples])
        device = next(iter(self._parameters.values())).device
        weights = np.ones(len(samples)) if weights is None else np.asarray(weights)
        # By length: what is split into short and long then needs no reordering of [N, V] behind it.
        order = sorted(range(len(samples)), key=lambda i: len(samples[i].trace.tokens))
        samples, weights = [samples[i] for i in order], weights[order]
        read = Choice(self._branch_share, self.steps) if self._branch_weight else None
        batch = collate(self._read(samples), self._max_tokens, device, branches=read)
        kept = torch.tensor([s.info.stratum == "anchors" for s in samples], device=device)[batch.row[batch.judged]]
        rows = batch.judged[kept] if self._reference is not None else batch.judged[:0]
        # In front of the forward pass that learns: it needs the weights as they are when gradients are taken.
        reference = self._reference_logprobs([s.trace for s in samples if s.info.stratum == "anchors"], device)
        logits = draft_logits(self.draft.model, batch, prompt_gradient=self._prompt_gradient)
        logits, aside = logits.split([len(batch.row), len(logits) - len(batch.row)])
        # Where every position was captured there is nothing to pick, and a copy of [N, V] and of its gradient to save.
        judged = logits if len(batch.judged) == len(logits) else logits[batch.judged]
        p, q, beyond = self._compared(judged, batch.topk_logprobs, batch.topk_ids, batch.tail_ids)
        divergence = compute_objective(
            self._objective,
            p=p,
            q=q,
            draft_logits=judged,
            token_ids=batch.token_ids[batch.judged],
            lengths=batch.lengths,
            k=self._k,
        )
        measured = self._measured_priorities(samples, p, q, divergence, batch) if self._measured else None
        if len(rows):
            moved = functional.kl_div(logits[rows].log_softmax(-1), reference, reduction="none", log_target=True).sum(
                -1
            )
            divergence, beyond = divergence.masked_scatter(kept, moved), beyond.masked_fill(kept, 0.0)
        importance = torch.from_numpy(weights).float().to(device)
        weight = importance[batch.row[batch.judged]]
        weight = weight.where(batch.source != Source.CORRECTION, self._rejection_weight * weight)
        summed, tail, mass = (divergence * weight).sum(), (beyond * weight).sum(), weight.sum()
        if batch.branches is not None:
            beside, more, added = self._branch_loss(aside, batch.branches, importance)
            summed, tail, mass = summed + beside, tail + more, mass + added
        loss, tail = summed / mass, tail / mass
        applied = bool(torch.isfinite(loss + tail)) and self._apply(loss + tail)
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        if not applied:
            priorities = {}
        elif measured is not None:
            priorities = measured
        else:
            priorities = self._surprise_priorities(samples, logits.detach(), batch)
        return StepReport(
            loss=loss.item() if applied else math.nan,
            skipped=not applied,
            tokens=batch.tokens,
            positions=len(batch.judged) + len(aside),
            seconds=time.perf_counter() - started,
            priorities=priorities,
        )

    def _read(self, samples: Sequence[ReplaySample]) -> list[Trace]:
        """The traces; anchors that follow a draft without what they say of the target beside the answer."""
        follows = self._reference is not None
        return [s.trace.without_branches() if follows and s.info.stratum == "anchors" else s.trace for s in samples]

    def _compared(
        self, logits: Tensor, topk_logprobs: Tensor, topk_ids: Tensor, tail_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Target and draft with tail, [N, K+1] each, and what the objective has within the tail, [N] (0 without draws)."""
        p = with_tail(topk_logprobs)
        if not self._draws or not tail_ids.shape[1]:
            return p, draft_with_tail(logits, topk_ids), p.new_zeros(len(p))
        # A target's vocabulary may be padded to more tokens than the draft has.
        size = logits.shape[-1]
        known = (tail_ids >= 0) & (tail_ids < size)
        q, within = draft_with_draws(logits, topk_ids, tail_ids.clamp(0, size - 1))
        return p, q, tail_cross_entropy(p, within, known)

    def _branch_loss(self, logits: Tensor, branches: BranchRows, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums over the branches' positions, `logits` [U, V], of divergence, of its tail, and of weights; `weights` [B]."""
        p, q, beyond = self._compared(logits, branches.topk_logprobs, branches.topk_ids, branches.tail_ids)
        divergence = compute_objective(self._objective, p=p, q=q, draft_logits=None, token_ids=None)
        weight = self._branch_weight * weights[branches.row]
        return (divergence * weight).sum(), (beyond * weight).sum(), weight.sum()

    @torch.no_grad()
    def _reference_logprobs(self, anchors: Sequence[Trace], device: torch.device) -> Tensor:
        """log q_ref at every captured position of the anchors, [M, V]: of each trace's better teacher."""
        if self._reference is None or not anchors:
            return torch.empty(0)
        batch = collate(anchors, self._max_tokens, device)
        p, row = with_tail(batch.topk_logprobs), batch.row[batch.judged]
        current = self.draft.state()
        found: list[Tensor] = []
        distances: list[Tensor] = []
        try:
            for teacher in ({}, self._reference) if self._reference else ({},):
                self.draft.load(teacher)
                logits = draft_logits(self.draft.model, batch)[batch.judged]
                distance = forward_kl(p, draft_with_tail(logits, batch.topk_ids))
                distances.append(torch.zeros(len(anchors), device=device).index_add_(0, row, distance))
                found.append(logits.log_softmax(-1))
        finally:
            self.draft.load(current)
        if len(found) == 1:
            return found[0]
        return torch.where((distances[1] < distances[0])[row, None], found[1], found[0])

    def set_reference(self, tensors: Mapping[str, Tensor] | None) -> None:
        """The version whose behaviour anchors preserve, beside day 0 (empty: day 0 alone); None: they follow the target.

        Learning without forgetting (Li and Hoiem 2017): on anchors the loss is KL(q_ref || q) over the vocabulary. The
        teacher of a trace is this version or day 0, whichever is nearer to the target on it (forward KL): a chain of
        versions that each teach the next would pass its losses on. The target could be the teacher there too, but on
        few anchors its samples are learned by heart and held-out acceptance of old traffic falls.
        """
        self._reference = tensors

    def _apply(self, loss: Tensor) -> bool:
        self._forget_gradients()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), self._clip)
        if not bool(torch.isfinite(norm)):
            self._forget_gradients()
            return False
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self._lr * min(1.0, (self._since_restart + 1) / max(1, self._warmup))
            optimiser.step()
        self.steps += 1
        self._since_restart += 1
        # Its memory is a tenth of the steps at first, so that the average does not cling to where it started.
        keep = min(self._average_decay, self._since_restart / (self._since_restart + 9))
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._average[name].lerp_(parameter, 1 - keep)
        return True

    def _forget_gradients(self) -> None:
        for parameter in self._parameters.values():
            parameter.grad = None

    def _surprise_priorities(self, samples: Sequence[ReplaySample], logits: Tensor, batch: Batch) -> dict[int, float]:
        mode = cast(Mode, self._priority)
        logprobs = logits.log_softmax(-1)
        token = logprobs.gather(-1, batch.token_ids[:, None])[:, 0].numpy(force=True)
        top = logprobs.topk(_SURPRISE_TOP, dim=-1).values.numpy(force=True)
        ratios = np.split(surprise_ratio(token, top), np.cumsum(batch.lengths)[:-1])
        return {
            s.info.key: surprise_priority(r, mode, self._tau) for s, r in zip(samples, ratios, strict=True) if len(r)
        }

    def _measured_priorities(
        self, samples: Sequence[ReplaySample], p: Tensor, q: Tensor, divergence: Tensor, batch: Batch
    ) -> dict[int, float]:
        found = measured_priorities(
            cast(Measure, self._priority),
            p=p,
            q=q,
            # Over blocks it is minus the accepted tokens, from -k on: what is missing to k is at least 0.
            loss=divergence + (self._k or 0) if self._blocks else divergence,
            row=batch.row[batch.judged],
            traces=len(samples),
        )
        return {s.info.key: value for s, value in zip(samples, found, strict=True) if value is not None}

    def average(self) -> dict[str, Tensor]:
        """The candidate: an exponential moving average of the weights (Polyak and Juditsky 1992), without a step's noise."""
        return {name: tensor.clone() for name, tensor in self._average.items()}

    def restart(self, tensors: Mapping[str, Tensor]) -> None:
        """Go back to `tensors` (empty: day 0) with a fresh optimiser and a new warm-up."""
        self.draft.load(tensors)
        self._new_optimiser()
        self.skipped_in_a_row = 0

    def shorten_average(self) -> None:
        """Traffic changed: the average grows anew from a memory of ten steps, and leaves where the weights were behind it."""
        self._since_restart = min(self._since_restart, max(_SHORTENED, self._warmup))

    def state(self) -> dict[str, Tensor]:
        """Weights, moments and counters as flat tensors, ready for safetensors."""
        tensors = {f"weight/{name}": t for name, t in self.draft.state().items()}
        for name, parameter in self._parameters.items():
            for optimiser in self._optimisers:
                for key, value in optimiser.state.get(parameter, {}).items():
                    tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().clone()
        tensors |= {f"average/{name}": t for name, t in self.average().items()}
        return tensors | {"steps": torch.tensor([self.steps, self._since_restart])}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave.

        Raises:
          ValueError: the tensors belong to other parameters than this learner trains.
        """
        weights = {n.removeprefix("weight/"): t for n, t in tensors.items() if n.startswith("weight/")}
        if {n: t.shape for n, t in weights.items()} != {n: p.shape for n, p in self._parameters.items()}:
            raise ValueError("the saved learner state belongs to another adaptation scope; delete it to start afresh")
        self.draft.load(weights)
        self._new_optimiser()
        for name, parameter in self._parameters.items():
            for optimiser, keys in zip(self._optimisers, map(_moments, self._optimisers), strict=True):
                known = {key: tensors[f"{key}/{name}"].clone() for key in keys if f"{key}/{name}" in tensors}
                if len(known) == len(keys) and any(parameter is p for g in optimiser.param_groups for p in g["params"]):
                    optimiser.state[parameter] = known
        self._average = {name: tensors[f"average/{name}"].clone() for name in weights}
        self.steps, self._since_restart = (int(v) for v in tensors["steps"])


def _moments(optimiser: torch.optim.Optimizer) -> tuple[str, ...]:
    """What an optimiser keeps of a parameter."""
    return ("momentum_buffer",) if isinstance(optimiser, Muon) else ("step", "exp_avg", "exp_avg_sq")
