"""Audio of a batch encoded a few clips of like length at a time: padding is work that nobody reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

ROWS = 8  # clips that are encoded together
FRAMES = 16  # their mel frames are a multiple of this
# (audios (B, M, F), audio_mask (B, F)) -> (encoded (B, E, D), mask (B, E))
Encode = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


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
