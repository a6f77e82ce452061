"""The encoder's part of a step: clips of like length together, since padding is work that nobody reads, and not twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from opd.schema import Config

ROWS = 8  # clips that are encoded together
FRAMES = 16  # their mel frames are a multiple of this
# (audios (B, M, F), audio_mask (B, F)) -> (encoded (B, E, D), mask (B, E))
Encode = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def serves_update(config: Config, num_rows: int) -> bool:
    """Whether what the encoder makes of a rank's rows for the rollout may serve the update too.

    A frozen encoder's frames always do. Those of one that is trained do where the weights stay as they are until the
    update, and where the rows are one micro-batch, so that no more is held for the backward than the update would.
    """
    train = config.train
    if "encoder" in config.student.freeze:
        return True
    is_one = num_rows <= train.micro_batch_size and not train.micro_batch_tokens
    return train.reuse_encoder and config.schedule == "sync" and is_one


def encode_by_length(
    encode: Encode, audios: torch.Tensor, audio_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the encoder makes of each clip, padded: (encoded (B, E, D), mask (B, E))."""
    frames_B = audio_mask.sum(1)
    order = frames_B.argsort(descending=True)
    encoded: list[torch.Tensor] = []
    masks: list[torch.Tensor] = []
    for rows in order.split(ROWS):
        # oneDNN prepares its convolutions for each length that it sees.
        frames = min(audios.shape[2], -(-int(frames_B[rows].max()) // FRAMES) * FRAMES)
        part_BED, mask_BE = encode(audios[rows, :, :frames], audio_mask[rows, :frames])
        missing = encoded[0].shape[1] - part_BED.shape[1] if encoded else 0  # the longest come first
        encoded.append(functional.pad(part_BED, (0, 0, 0, missing)))
        masks.append(functional.pad(mask_BE, (0, missing)))
    place = order.argsort()
    return torch.cat(encoded)[place], torch.cat(masks)[place]
