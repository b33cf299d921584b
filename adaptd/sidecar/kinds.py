"""The kinds of draft that vLLM runs, and how their tensors are named when they travel.

One entry per `method` of `--speculative-config`. `draft_model` is an independent small LM under its own Hugging Face
names. The EAGLE kinds have their names ready; adapting them is not built yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from adaptd.errors import ConfigError

#: Modules that an engine may bind to the target's own: they never travel, whatever the kind.
NEVER = frozenset({"embed_tokens", "lm_head", "wte", "wpe", "word_embeddings", "embed_in", "embed_out"})


@dataclass(frozen=True, kw_only=True)
class DraftKind:
    """How one kind's tensors travel."""

    method: str
    #: Prefix of the model's own names that the checkpoint's names lack: vLLM's EAGLE loaders add it, and twice would
    #: be a name nobody has.
    dropped_prefix: str = ""
    #: Module names, anywhere in a name, that never travel. Vocabulary maps are cached once by engines.
    never: frozenset[str] = NEVER
    #: Whether adaptd can adapt this kind.
    supported: bool = False

    def travelling(self, names: Iterable[str]) -> dict[str, str]:
        """Names under which tensors travel, by the model's own; those that never travel are left out."""
        return {name: name.removeprefix(self.dropped_prefix) for name in names if not self.never & set(name.split("."))}


KINDS = {
    kind.method: kind
    for kind in (
        DraftKind(method="draft_model", supported=True),
        DraftKind(method="eagle", dropped_prefix="model."),
        DraftKind(method="eagle3", dropped_prefix="model.", never=NEVER | {"d2t", "t2d"}),
    )
}


def draft_kind(method: str) -> DraftKind:
    """The kind of a `method`.

    Raises:
      ConfigError: adaptd cannot adapt such a draft.
    """
    kind = KINDS.get(method)
    if kind is None or not kind.supported:
        known = ", ".join(k.method for k in KINDS.values() if k.supported)
        raise ConfigError(
            f"the server drafts with method {method!r}, which adaptd cannot adapt yet: start it with method {known}"
        )
    return kind
