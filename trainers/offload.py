"""AdamW whose state is kept in the host's memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from opd.trainable import BUCKET_NUMEL


class OffloadedAdamW(torch.optim.AdamW):
    """The same steps as AdamW's to the last bit. Both moments lie on the CPU and visit the parameters' device, a bucket
    of parameters at a time, while those are stepped.

    The step stays on the device: its parameters and gradients are there already, and moving two moments once a step
    costs less than what FSDP2's own offload moves, parameters and gradients with every micro-batch.
    """

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "a step does not compute the loss again"
        groups: list[dict[str, Any]] = self.param_groups  # type: ignore[has-type]
        try:
            for group in groups:
                for bucket in _buckets(group["params"]):
                    self._move_state(bucket, to_host=False)
                    self.param_groups = [group | {"params": bucket}]
                    super().step()
                    self._move_state(bucket, to_host=True)
        finally:
            self.param_groups = groups

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # puts the state beside the parameters
        for group in self.param_groups:
            self._move_state(group["params"], to_host=True)

    def _move_state(self, parameters: list[torch.Tensor], *, to_host: bool) -> None:
        for parameter in parameters:
            state = self.state.get(parameter, {})
            for name, value in state.items():
                if name != "step":  # a number on the CPU in any case
                    state[name] = value.to("cpu" if to_host else parameter.device)


def _buckets(parameters: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    numel = 0
    for parameter in parameters:
        if bucket and numel + parameter.numel() > BUCKET_NUMEL:
            yield bucket
            bucket, numel = [], 0
        bucket.append(parameter)
        numel += parameter.numel()
    if bucket:
        yield bucket
