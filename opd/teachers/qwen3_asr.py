"""Qwen3-ASR in its native transformers class (5.13 or newer), under the prompt that it was trained with."""

from __future__ import annotations

import numpy as np
import torch

from opd.rollout.decode import decode
from opd.teachers.causal import Inputs
from opd.teachers.hf import HfTeacher
from opd.teachers.languages import Spoken
from opd.types import Batch

PROMPT = (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
    "<|im_start|>assistant\n"
)
ASR_TEXT = "<asr_text>"
LANGUAGE_TAG = "language {name}" + ASR_TEXT
MAX_TAG_TOKENS = 16
NO_SPEECH = "None"  # the name that the model itself writes for audio without speech


class Qwen3AsrTeacher(HfTeacher):
    """Told the language, the model goes on with the transcript; else it first writes `language NAME<asr_text>` itself."""

    def end_ids(self) -> list[int]:
        """<|im_end|>, then <|endoftext|>."""
        ends = super().end_ids()
        own = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        return [own, *(index for index in ends if index != own)]

    def prompts_of(self, utterances: Batch, waveforms: list[np.ndarray]) -> list[tuple[list[int], Inputs]]:
        """One group: the encoder masks padded frames."""
        rows = self.prompt_rows(utterances, waveforms)
        if self.section["language"] == "auto":
            self._add_detected(rows)
        return [(list(range(len(rows))), self.join(rows))]

    def prompt_row(self, clip: np.ndarray, spoken: Spoken | None) -> Inputs:
        """The inputs of one clip, float32 (S,) at 16 kHz, as a batch of one; `spoken` None: the prompt names no language."""
        return self.read_prompt(PROMPT if spoken is None else PROMPT + LANGUAGE_TAG.format(name=spoken.name), clip)

    def _add_detected(self, rows: list[Inputs]) -> None:
        """Appends to each prompt the language tag that the model writes itself."""
        asr_text_id = self.tokenizer.convert_tokens_to_ids(ASR_TEXT)
        blocked_V = self.blocked_V.clone()
        blocked_V[self.eos_id], blocked_V[asr_text_id] = True, False
        tags = decode(
            self.forward, self.join(rows), eos_id=asr_text_id, pad_id=self.pad_id, blocked_V=blocked_V,
            max_new_tokens=MAX_TAG_TOKENS, top_k=1,
        )  # fmt: skip
        for index, row in enumerate(rows):
            tag = tags.response_ids_BT[index][tags.response_mask_BT[index]]
            if not tags.finished_B[index]:
                text = LANGUAGE_TAG.format(name=NO_SPEECH)
                tag = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            row["input_ids"] = torch.cat([row["input_ids"], tag[None]], dim=1)
            row["attention_mask"] = torch.cat([row["attention_mask"], torch.ones_like(tag)[None]], dim=1)
