"""Streams of requests with changing traffic, as YAML, and the plan that one seed makes of them.

A phase draws its requests from a mixture of domains that is fixed or moves linearly from `mix` to `to`. Every request
of a stream is another answer of the target: nothing is served twice. Where a phase has another target, the same prompt may
come again, with that target's answer.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from adaptd.errors import ConfigError

#: More answers are kept a domain than one seed uses, so that seeds differ in their requests too.
_SPARE = 1.2

Spec = TypeVar("Spec", bound=BaseModel)


class Phase(BaseModel):
    """Traffic between two switches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mix: dict[str, float]
    """Share of each domain; shares are normalised."""
    to: dict[str, float] | None = None
    """Mixture at the phase's end; None: it does not move."""
    requests: int = Field(ge=1)
    target: str | None = Field(None, min_length=1)
    """Who answers, as `target.model` names it; None: the configuration's target."""

    @field_validator("mix", "to")
    @classmethod
    def _shares(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value is not None and (not value or min(value.values()) < 0 or sum(value.values()) <= 0):
            raise ValueError(f"a mixture ({value}) must have shares of at least 0 with a sum above 0")
        return value

    def share(self, domain: str, progress: float) -> float:
        """Normalised share at `progress`, 0 to 1 within the phase."""
        end = self.mix if self.to is None else self.to
        first = self.mix.get(domain, 0.0) / sum(self.mix.values())
        return (1 - progress) * first + progress * end.get(domain, 0.0) / sum(end.values())

    @property
    def label(self) -> str:
        """For tables: `math`, `medical > math` where it moves, `math (pocket-math)` from another target."""

        def names(mix: dict[str, float]) -> str:
            return "+".join(name for name, share in mix.items() if share > 0)

        traffic = names(self.mix) if self.to is None else f"{names(self.mix)} > {names(self.to)}"
        return traffic if self.target is None else f"{traffic} ({self.target})"


class Source(NamedTuple):
    """Where an answer comes from."""

    target: str | None
    """As in `Phase.target`."""
    domain: str


class Stream(BaseModel):
    """A named stream."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    about: str = ""
    temperature: float = Field(0.8, ge=0)
    max_tokens: int = Field(64, ge=1)
    phases: tuple[Phase, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _named(self) -> Stream:
        if not self.name.isidentifier():
            raise ValueError(f"name ({self.name!r}) must be letters, digits and underscores")
        return self

    @property
    def domains(self) -> list[str]:
        """Every domain, in order of appearance."""
        found = {d: None for p in self.phases for mix in (p.mix, p.to or {}) for d, share in mix.items() if share > 0}
        return list(found)

    @property
    def targets(self) -> list[str | None]:
        """Every target, in order of appearance."""
        return list(dict.fromkeys(p.target for p in self.phases))

    def scaled(self, factor: float) -> Stream:
        """The same stream with phases of `factor` times the length, at least 8 requests each."""
        phases = tuple(p.model_copy(update={"requests": max(8, round(p.requests * factor))}) for p in self.phases)
        return self.model_copy(update={"phases": phases})

    def at(self, temperature: float) -> Stream:
        """The same stream, answered at another temperature.

        Raises:
          ConfigError: below 0.
        """
        if not temperature >= 0:
            raise ConfigError(f"temperature ({temperature}) must be at least 0")
        return self.model_copy(update={"temperature": temperature})

    def pool(self) -> dict[Source, int]:
        """Answers to keep of each target to each domain: enough for any seed, with some to spare."""
        expected: dict[Source, float] = {}
        for target, domain in itertools.product(self.targets, self.domains):
            phases = [p for p in self.phases if p.target == target]
            expected[Source(target, domain)] = sum(
                p.requests * (p.share(domain, 0.0) + p.share(domain, 1.0)) / 2 for p in phases
            )
        # A random mixture strays from its expectation by the square root of it, at most.
        return {source: math.ceil(_SPARE * n + 4 * math.sqrt(n)) for source, n in expected.items() if n > 0}


class Slot(NamedTuple):
    """One request of a plan: the `draw`-th answer of its source."""

    phase: int
    source: Source
    draw: int


def plan(stream: Stream, seed: int) -> list[Slot]:
    """The requests of a stream in order; the same for every learner of a seed.

    Raises:
      ConfigError: the random mixture of this seed asked for more answers than the pool holds.
    """
    rng = np.random.default_rng([seed, 0x5EED])
    order = {source: rng.permutation(n) for source, n in stream.pool().items()}
    used: Counter[Source] = Counter()
    slots: list[Slot] = []
    for index, phase in enumerate(stream.phases):
        for i in range(phase.requests):
            progress = i / max(1, phase.requests - 1)
            shares = np.array([phase.share(d, progress) for d in stream.domains])
            domain = stream.domains[int(rng.choice(len(shares), p=shares / shares.sum()))]
            source = Source(phase.target, domain)
            if used[source] >= len(order[source]):
                raise ConfigError(
                    f"stream {stream.name}, seed {seed}: more than {used[source]} {domain} requests drawn"
                )
            slots.append(Slot(index, source, int(order[source][used[source]])))
            used[source] += 1
    return slots


def read_spec(kind: type[Spec], folder: str, name: str) -> Spec:
    """A YAML file by path, or by name in `configs/<folder>` of the working folder or of the checkout.

    Raises:
      ConfigError: there is no such file, or it does not fit; the message names what there is or what is wrong.
    """
    checkout = Path(__file__).parents[2] / "configs" / folder
    places = [Path(name), Path("configs") / folder / f"{name}.yaml", checkout / f"{name}.yaml"]
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        known = ", ".join(sorted(p.stem for p in checkout.glob("*.yaml"))) or "none here: they are in the repository"
        raise ConfigError(f"{folder[:-1]} ({name}) must be a YAML file, or one of: {known}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        return kind.model_validate({"name": path.stem, **(found if isinstance(found, dict) else {})})
    except (yaml.YAMLError, UnicodeDecodeError, ValidationError) as error:
        raise ConfigError(f"{path} is not a {folder[:-1]}: {error}") from error
