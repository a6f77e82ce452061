"""The student's module as the engines wrap it: one forward for the loss, the encoder alone and generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Head = Callable[[torch.Tensor, torch.Tensor], Any]


class TrainedStudent(nn.Module):
    """The student as it is trained: the ARK-ASR model and, for the CTC aid, a head that is never exported."""

    def __init__(self, model: nn.Module, num_ctc_tokens: int = 0) -> None:
        super().__init__()
        self.model = model
        self.ctc_head = nn.Linear(model.config.whisper_config.d_model, num_ctc_tokens) if num_ctc_tokens else None

    def forward(
        self, head: Head | None = None, with_ctc: bool = False, encode_only: bool = False, **inputs: Any
    ) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
        """(model output or what `head` makes of it, CTC logits (B, F', V) or None, frame mask (B, F') or None).

        head         takes the decoder's hidden states (B, L, D) and the output matrix (V, D), in place of the output layer
        encode_only  what the encoder makes of `audios` and `audio_mask`, and its frame mask: later forwards take the two
                     as `encoded_BED` and `encoded_mask_BE` in place of the audio

        Everything goes through this one forward, the loss too: FSDP2 gathers the parameters of the root here.
        """
        encoder = self.model.audio_encoder
        if encode_only:
            encoded_BED, mask_BE = encoder.whisper(inputs["audios"], inputs["audio_mask"].bool())
            return encoded_BED, None, mask_BE
        if "encoded_BED" in inputs:
            mask_BE = inputs.pop("encoded_mask_BE")
            frames_BED = encoder.layer_norm(inputs.pop("encoded_BED")) * mask_BE[..., None]
            inputs["audio_frames"] = (frames_BED, mask_BE)
        if not with_ctc:
            return self._decode(head, inputs), None, None
        assert self.ctc_head is not None, "built without a CTC head"
        frames_BFD, mask_BF = encoder.encode_frames(inputs.pop("audios"), inputs.pop("audio_mask"))
        out = self._decode(head, inputs | {"audio_frames": (frames_BFD, mask_BF)})
        return out, self.ctc_head(frames_BFD), mask_BF

    def _decode(self, head: Head | None, inputs: dict[str, Any]) -> Any:
        if head is None:
            return self.model(**inputs)
        decoder_inputs = self.model.decoder_inputs(**inputs)
        hidden_BLD = self.model.model(**decoder_inputs, use_cache=False).last_hidden_state
        return head(hidden_BLD, self.model.lm_head.weight)
