"""Checkpoints of engine=deepspeed, read in one process without ranks."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import torch

STATE, FACTS = "state", "zero.json"  # DeepSpeed's own folder, and by how many ranks it was written at which stage
FLAT = "single_partition_of_fp32_groups"  # DeepSpeed's name of a rank's share


def is_zero_checkpoint(checkpoint: Path) -> bool:
    return (checkpoint / FACTS).is_file()


def consolidated(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The whole student as it is trained, in float32, from the parts that each rank wrote."""
    facts = json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))
    parts = [
        checkpoint / STATE / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(facts["ranks"])
    ]
    if facts["stage"] > 1:
        return _by_deepspeed(checkpoint)
    whole = torch.load(checkpoint / STATE / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    state = _trained_in_bfloat16(parts, whole["param_shapes"]) if parts[0].is_file() else _by_deepspeed(checkpoint)
    state |= {alias: state[name] for alias, name in whole["shared_params"].items() if name in state}
    # What is frozen lies with the weights that every rank has.
    return state | {name: tensor.float() for name, tensor in whole["module"].items() if name not in state}


def _by_deepspeed(checkpoint: Path) -> dict[str, torch.Tensor]:
    """By DeepSpeed's own reader; at stage 1 it finds what trains alone."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):  # it tells of every group of parameters
        trained = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=STATE)
    return {name: tensor.detach() for name, tensor in trained.items()}


def _trained_in_bfloat16(parts: list[Path], shapes: list[dict[str, torch.Size]]) -> dict[str, torch.Tensor]:
    """The master weights of stage 1 with compute in bfloat16, which DeepSpeed's reader does not know.

    parts    one file for each rank, in order; each has an even share of every group of parameters, which lie one after
             another in the group, the padding last
    shapes   of the parameters by name, for each group
    """
    ranks = [
        torch.load(part, map_location="cpu", mmap=True, weights_only=False)["optimizer_state_dict"][FLAT]
        for part in parts
    ]
    state = {}
    for shares, group in zip(zip(*ranks, strict=True), shapes, strict=True):
        flat, offset = torch.cat([share.detach() for share in shares]), 0
        for name, shape in group.items():
            state[name] = flat[offset : offset + shape.numel()].view(shape)
            offset += shape.numel()
    return state
