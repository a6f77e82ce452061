"""Hidden states in place of logits, from any causal model: what its output layer would be given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]


class OutputLayer:
    """The output layer of a causal model, to be run on those positions only whose logits are read."""

    def __init__(self, model: nn.Module) -> None:
        self.layer: nn.Module = model.get_output_embeddings()
        self.is_last = True

    def states(
        self, forward: Callable[..., Any], inputs: Inputs
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """States (B, L, D) at the positions that `forward(**inputs)` gives logits for, and their way to logits.

        The model itself computes the logits of each row's last position. Where they are not exactly the layer's, more
        follows on the layer (a cap, a factor): then the states are the model's logits (B, L, V).
        """
        if self.is_last:
            given: list[torch.Tensor] = []

            def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
                given.append(args[0])
                return (args[0][:, -1:], *args[1:])

            hook = self.layer.register_forward_pre_hook(keep)
            try:
                last_B1V = forward(**inputs, use_cache=False).logits
            finally:
                hook.remove()
            self.is_last = len(given) == 1 and torch.equal(self.layer(given[0][:, -1:]).to(last_B1V.dtype), last_B1V)
        if self.is_last:
            return given[0], self.layer
        return forward(**inputs, use_cache=False).logits, lambda logits_NV: logits_NV
