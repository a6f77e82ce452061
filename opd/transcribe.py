"""Transcription with an ARK-ASR checkpoint: waveforms in, text out. Long audio is cut at silences into windows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers.utils import is_flash_attn_2_available

from opd.arkasr import (
    ArkasrConfig,
    blocked_token_ids,
    cut_at_silences,
    join_transcripts,
    load_model,
    load_processor,
)
from opd.cpu_linear import use_faster_linears
from opd.types import DTYPES

SAMPLING_RATE = 16_000
ATTENTION = ("auto", "sdpa", "eager", "flash_attention_2")


@dataclass(frozen=True)
class DecodeSettings:
    """How transcripts are written; all of it changes the text, and so belongs to a result's identity.

    max_new_tokens       tokens per window at most
    do_sample            draw tokens at `temperature`; else greedy, or beam search with num_beams > 1
    repetition_penalty   above 1 makes tokens that occurred less likely
    max_audio_seconds    longest window; longer audio is cut at silences, transcribed in parts and joined
    audio_gain           factor on the samples, which are then limited to [-1, 1]
    block_token_id_from  ids from here on are never written, as codec tokens; negative: only control tokens are blocked
    seed                 of the draws
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 0.5
    num_beams: int = 1
    repetition_penalty: float = 1.0
    max_audio_seconds: float = 40.0
    audio_gain: float = 1.0
    block_token_id_from: int = 151_670
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams", "temperature", "repetition_penalty", "audio_gain"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be above 0")
        if self.max_audio_seconds < 1:
            raise ValueError(f"max_audio_seconds={self.max_audio_seconds}: must be at least 1 second")

    def to_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


class Transcript(NamedTuple):
    """text: as a user reads it; raw: as decoded, with control tokens (windows one after the other)."""

    text: str
    raw: str


@dataclass(frozen=True)
class PreparedBatch:
    """Model inputs of the windows of some clips; parts[i] is (clip, window) of row i."""

    inputs: dict[str, torch.Tensor]
    parts: list[tuple[int, int]]


class Transcriber:
    """A checkpoint on one device.

    model_path      an ARK-ASR folder or Hub id; processor_path by default the same
    device          a torch device: cpu, cuda, cuda:1
    dtype           float32, bfloat16, float16, or auto: float32 on the CPU, the stored type elsewhere
    attn_implementation  sdpa, eager, flash_attention_2, or auto: the last where it is installed, else sdpa

    Raises ValueError for an unknown dtype or attention, and for a checkpoint that cannot be loaded.
    """

    def __init__(
        self,
        model_path: str | os.PathLike,
        processor_path: str | os.PathLike | None = None,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        attn_implementation: str = "auto",
        settings: DecodeSettings | None = None,
    ) -> None:
        self.settings = settings or DecodeSettings()
        self.device = torch.device(device)
        self.processor = load_processor(processor_path or model_path)
        attention = _resolve_attention(attn_implementation, self.device)
        torch_dtype = _resolve_dtype(dtype, self.device, model_path)
        self.model = load_model(model_path, torch_dtype, attention).to(self.device)
        use_faster_linears(self.model)
        self.generate_options = self._generate_options()

    def transcribe(self, waveforms: Sequence[np.ndarray], batch_size: int = 40) -> list[Transcript]:
        """A transcript of each mono float waveform at 16 kHz.

        Windows are decoded `batch_size` at a time, those of like length together. Raises ValueError as `prepare`.
        """
        batches = self.prepare(waveforms, batch_size)
        return self.decode(batches, len(waveforms))

    def prepare(self, waveforms: Sequence[np.ndarray], batch_size: int) -> list[PreparedBatch]:
        """The CPU's part: windows and features. Raises ValueError for samples that are too few or not finite."""
        windows = []
        for clip, samples in enumerate(waveforms):
            if self.settings.audio_gain != 1:
                samples = np.clip(samples * self.settings.audio_gain, -1.0, 1.0).astype(np.float32)
            bounds = cut_at_silences(samples, SAMPLING_RATE, self.settings.max_audio_seconds)
            windows += [((clip, n), samples[start:stop]) for n, (start, stop) in enumerate(bounds)]
        windows.sort(key=lambda item: -len(item[1]))
        return [
            PreparedBatch(
                self.processor.build_inputs([samples for _, samples in windows[i : i + batch_size]]),
                [part for part, _ in windows[i : i + batch_size]],
            )
            for i in range(0, len(windows), batch_size)
        ]

    @torch.inference_mode()
    def decode(self, batches: Sequence[PreparedBatch], num_clips: int) -> list[Transcript]:
        """The device's part: a transcript of each clip from the windows that `prepare` made of them."""
        raw: dict[tuple[int, int], str] = {}
        if self.settings.do_sample:
            torch.manual_seed(self.settings.seed)  # here, so that a continued job draws what an unbroken one does
        for batch in batches:
            inputs = {name: tensor.to(self.device) for name, tensor in batch.inputs.items()}
            ids_BL = self.model.generate(**inputs, **self.generate_options)
            responses = ids_BL[:, inputs["input_ids"].shape[1] :].tolist()
            texts = self.processor.tokenizer.batch_decode(self._cut(responses), skip_special_tokens=False)
            raw.update(zip(batch.parts, texts, strict=True))
        transcripts = []
        for clip in range(num_clips):
            parts = [raw[part] for part in sorted(raw) if part[0] == clip]
            text = join_transcripts([self.processor.clean_text(part) for part in parts])
            transcripts.append(Transcript(text, "".join(parts)))
        return transcripts

    def _cut(self, responses: list[list[int]]) -> list[list[int]]:
        """Responses up to the end token, included: what follows is the padding of a batch."""
        end = self.processor.tokenizer.eos_token_id
        return [ids[: ids.index(end) + 1] if end in ids else ids for ids in responses]

    def _generate_options(self) -> dict[str, Any]:
        settings, tokenizer = self.settings, self.processor.tokenizer
        vocab_size = self.model.config.vocab_size
        blocked = set(blocked_token_ids(tokenizer, vocab_size, tokenizer.eos_token_id))
        if settings.block_token_id_from >= 0:
            blocked |= set(range(settings.block_token_id_from, vocab_size)) - {tokenizer.eos_token_id}
        options: dict[str, Any] = {
            "max_new_tokens": settings.max_new_tokens,
            "do_sample": settings.do_sample,
            "num_beams": settings.num_beams,
            "repetition_penalty": settings.repetition_penalty,
            "suppress_tokens": sorted(blocked),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        return options | ({"temperature": settings.temperature, "top_k": 0} if settings.do_sample else {})


def default_devices() -> list[str]:
    """Every CUDA device, else the CPU."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]


def _resolve_dtype(name: str, device: torch.device, model_path: str | os.PathLike) -> torch.dtype:
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype={name!r}: must be auto or one of {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    stored = ArkasrConfig.from_pretrained(os.fspath(model_path)).dtype
    return stored if isinstance(stored, torch.dtype) else torch.bfloat16


def _resolve_attention(name: str, device: torch.device) -> str:
    if name not in ATTENTION:
        raise ValueError(f"attn_implementation={name!r}: must be one of {', '.join(ATTENTION)}")
    if name != "auto":
        return name
    return "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"
