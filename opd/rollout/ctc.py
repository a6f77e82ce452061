"""Drafts of responses from the encoder alone: the greedy output of the CTC aid that fine-tuning trained, where it is kept.

So audio without a text, heard for the first time, has a draft too. It costs one matrix product over the encoder's frames,
which the rollout computes anyway.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

CTC_FILE = "ctc_head.safetensors"  # in the folder of an export, beside its weights


class CtcHead:
    """weight (V, D) and bias (V,) over the frames that the adapter reads; `blank_id` ends a run of equal tokens."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, blank_id: int) -> None:
        self.weight, self.bias, self.blank_id = weight, bias, blank_id

    @classmethod
    def load(
        cls, folder: str | Path, blank_id: int, device: torch.device, shape: tuple[int, int] | None = None
    ) -> CtcHead | None:
        """The head of an arkasr folder; None where it has none.

        Raises ValueError for a file that is something else, or that belongs to a model of another `shape` (V, D).
        """
        path = Path(folder) / CTC_FILE
        if not path.is_file():
            return None
        try:
            tensors = load_file(path, device=str(device))
            found = tensors["weight"].shape
            if tuple(found) != (shape or tuple(found)) or tensors["bias"].shape != found[:1]:
                raise ValueError(f"shapes {list(found)} and {list(tensors['bias'].shape)}, the model has {shape}")
            return cls(tensors["weight"].float(), tensors["bias"].float(), blank_id)
        except Exception as error:  # safetensors has no common base of its errors
            raise ValueError(
                f"{path}: no CTC head of this model ({' '.join(str(error).split())}); remove the file or set rollout.draft=earlier"
            ) from error

    @torch.no_grad()
    def drafts(self, frames_BED: torch.Tensor, mask_BE: torch.Tensor) -> list[list[int]]:
        """The most likely token of each frame, runs taken as one and blanks left out, by row."""
        ids_BE = functional.linear(frames_BED.float(), self.weight, self.bias).argmax(-1)
        rows = []
        for ids_E, mask_E in zip(ids_BE, mask_BE, strict=True):
            once = torch.unique_consecutive(ids_E[mask_E.bool()])
            rows.append(once[once != self.blank_id].tolist())
        return rows


def save_ctc_head(folder: Path, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype) -> None:
    """Writes weight (V, D) and bias (V,) into the folder of an export, in `dtype`, for `CtcHead.load`."""
    save_file({"weight": weight.to(dtype).contiguous(), "bias": bias.to(dtype).contiguous()}, folder / CTC_FILE)
