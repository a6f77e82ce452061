"""ARK-ASR teaching ARK-ASR."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from opd.arkasr import load_model, load_processor
from opd.teachers.causal import CausalTeacher, Inputs
from opd.types import Batch


class ArkasrTeacher(CausalTeacher):
    """An ARK-ASR checkpoint. Its prompt names no language."""

    def load(self, path: str, dtype: torch.dtype, attn_implementation: str) -> tuple[Any, Any]:
        return load_model(path, dtype=dtype, attn_implementation=attn_implementation), load_processor(path)

    def prompts_of(self, utterances: Batch, waveforms: list[np.ndarray]) -> list[tuple[list[int], Inputs]]:
        """One group: the encoder masks padding."""
        return [(list(range(len(utterances))), self.to_model(self.processor.build_inputs(waveforms)))]

    def read_text(self, ids: list[int]) -> str:
        return self.processor.clean_text(ids)
