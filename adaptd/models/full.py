"""Every parameter of the draft learned: the baseline that the parameter-efficient scopes are measured against."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaptd.models.load import cast_parameters
from adaptd.models.part import Part


class Full(Part):
    """All parameters, under the base model's names; tied ones once.

    Training form: the model itself, cast to float32. Serving form: float32 masters that `refresh` copies into it.
    """

    def __init__(self, model: PreTrainedModel, pristine: dict[str, Tensor], *, serving: bool) -> None:
        """`pristine` gets copies of the base values, in the base's precision, for `reset`."""
        super().__init__()
        # Tied parameters are one object under several names.
        self._names = {name: [n for n, t in pristine.items() if t is tensor] for name, tensor in pristine.items()}
        for name, tensor in list(pristine.items()):
            pristine[name] = tensor.detach().clone()
        self._pristine = pristine
        self._live: dict[str, Tensor] = {}
        if not serving:
            cast_parameters(model, torch.float32)
        for name, parameter in model.named_parameters():
            if serving:
                self._live[name] = parameter.detach()
                parameter = nn.Parameter(parameter.detach().float().clone(), requires_grad=False)
            self.add(name, parameter)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """The base's values; `seed` is not used."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self._pristine[name])

    @torch.no_grad()
    def refresh(self) -> None:
        """Serving form: copy the masters into the model."""
        for name, live in self._live.items():
            live.copy_(self.parameters[name])

    def fold_into(self, state: dict[str, Tensor], config: Any) -> None:
        """Replace the base's values; a tied head follows its embedding."""
        for name, parameter in self.parameters.items():
            value = parameter.detach().to(state[name].dtype)
            state.update(dict.fromkeys(self._names[name], value))
