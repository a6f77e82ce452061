"""Checkpoints of engine=deepspeed, read in one process without ranks."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import torch

STATE, FACTS = "state", "zero.json"  # DeepSpeed's own folder, and by how many ranks it was written at which stage


def is_zero_checkpoint(checkpoint: Path) -> bool:
    return (checkpoint / FACTS).is_file()


def consolidated(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole student as it is trained, in float32, from the parts that each rank wrote."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):  # it tells of every group of parameters
        trained = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=STATE)
    state = {name: tensor.detach() for name, tensor in trained.items()}
    if json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))["stage"] == 1:
        # There DeepSpeed finds what trains alone; what is frozen lies with the weights that every rank has.
        whole = torch.load(checkpoint / STATE / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        state |= {name: tensor.float() for name, tensor in whole["module"].items() if name not in state}
    return state
