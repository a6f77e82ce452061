"""ARK-ASR teaching ARK-ASR."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from opd.arkasr import load_model, load_processor
from opd.arkasr.loading import named_by
from opd.encoding import encode_by_length
from opd.teachers.causal import CausalTeacher, Inputs
from opd.types import Batch


class ArkasrTeacher(CausalTeacher):
    """An ARK-ASR checkpoint. Its prompt names no language."""

    def load(self, path: str, dtype: torch.dtype, attn_implementation: str) -> tuple[Any, Any]:
        with named_by("teacher.path=", path):
            return load_model(path, dtype=dtype, attn_implementation=attn_implementation), load_processor(path)

    def prompts_of(self, utterances: Batch, waveforms: list[np.ndarray]) -> list[tuple[list[int], Inputs]]:
        """One group: the encoder masks padding."""
        return [(list(range(len(utterances))), self.encoded(self.to_model(self.processor.build_inputs(waveforms))))]

    @torch.no_grad()
    def encoded(self, inputs: Inputs) -> Inputs:
        """Prompts with the encoder's frames in place of their audio."""
        prompts: dict[str, Any] = dict(inputs)
        encode = self.model.audio_encoder.encode_frames
        prompts["audio_frames"] = encode_by_length(encode, prompts.pop("audios"), prompts.pop("audio_mask"))
        return prompts

    def read_text(self, ids: list[int]) -> str:
        return self.processor.clean_text(ids)
