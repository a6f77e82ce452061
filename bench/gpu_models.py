"""Models of ARK-ASR's sizes with random weights, and inputs for them: what bench.gpu runs without any checkpoint."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from opd.arkasr import ArkasrConfig, ArkasrForConditionalGeneration, num_audio_tokens

WHISPER_LARGE = {
    "d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120, "num_mel_bins": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """A student and the teacher that would score it. Fields are those of ArkasrConfig and WhisperConfig."""

    decoder: dict[str, int]
    whisper: dict[str, int]
    teacher_decoder: dict[str, int]
    teacher_whisper: dict[str, int]
    batch_size: int
    seconds: float  # of audio
    tokens: int  # of a response
    positions: int  # of the loss measured alone


def decoder(width: int, layers: int, heads: int, kv_heads: int, inner: int, vocab_size: int) -> dict[str, int]:
    return {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocab_size,
    }  # fmt: skip


def whisper(width: int, layers: int, heads: int, num_mel_bins: int) -> dict[str, int]:
    return {
        "d_model": width, "encoder_layers": layers, "encoder_attention_heads": heads, "encoder_ffn_dim": 4 * width,
        "num_mel_bins": num_mel_bins,
    }  # fmt: skip


# About Qwen3-ASR-1.7B: a decoder 2048 wide with 28 layers behind an encoder 1024 wide with 24.
TEACHER_WHISPER = whisper(1024, 24, 16, 128)
SIZES = {
    "tiny": Size(
        decoder(64, 2, 4, 2, 128, 384), whisper(32, 2, 2, 16), decoder(96, 2, 4, 2, 192, 384), whisper(48, 2, 2, 16),
        batch_size=4, seconds=1.0, tokens=12, positions=40,
    ),
    "06b": Size(
        decoder(896, 24, 14, 2, 4864, 163_958), WHISPER_LARGE,
        decoder(2048, 28, 16, 8, 6144, 163_958), TEACHER_WHISPER,
        batch_size=16, seconds=10.0, tokens=64, positions=1536,
    ),
    "3b": Size(
        decoder(2048, 36, 16, 2, 11_008, 151_936), WHISPER_LARGE,
        decoder(2048, 28, 16, 8, 6144, 151_936), TEACHER_WHISPER,
        batch_size=16, seconds=10.0, tokens=64, positions=1536,
    ),
}  # fmt: skip


def make_model(
    decoder_sizes: dict[str, int], whisper_sizes: dict[str, int], device: torch.device, dtype: torch.dtype
) -> ArkasrForConditionalGeneration:
    """Random weights, made on the device. What is written depends on what was: a fresh model would repeat one token."""
    vocab_size = decoder_sizes["vocab_size"]
    config = ArkasrConfig(
        whisper_config=whisper_sizes | {"max_source_positions": 1500}, audio_token_id=vocab_size - 1,
        eos_token_id=vocab_size - 2, pad_token_id=vocab_size - 3, bos_token_id=vocab_size - 3, **decoder_sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = ArkasrForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.eval()  # not .to(dtype): rotary frequencies stay in float32, as in a checkpoint that is loaded
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=3.0 / decoder_sizes["hidden_size"] ** 0.5)
        # Input and output embedding are one matrix: without the signs each token would be followed by itself.
        norm = model.model.norm.weight
        norm.copy_(torch.randint(2, norm.shape, device=norm.device) * 2 - 1)
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
    return model


def make_inputs(size: Size, device: torch.device, dtype: torch.dtype, num_mel_bins: int) -> dict[str, torch.Tensor]:
    """Prompts with random mel features: input_ids, attention_mask (B, P), audios (B, M, F), audio_mask (B, F)."""
    frames = int(size.seconds * 100)
    audio_id = size.decoder["vocab_size"] - 1
    ids_P = torch.tensor([3, 4, *[audio_id] * num_audio_tokens(frames), 5, 6, 7, 8, 9, 10, 11, 12])
    generator = torch.Generator().manual_seed(0)
    audios = torch.randn(size.batch_size, num_mel_bins, frames, generator=generator)
    inputs = {
        "input_ids": ids_P.expand(size.batch_size, -1),
        "attention_mask": torch.ones(size.batch_size, len(ids_P), dtype=torch.int64),
        "audios": audios.to(dtype),
        "audio_mask": torch.ones(size.batch_size, frames, dtype=torch.int64),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def decoding_arguments(size: Size, device: torch.device) -> dict[str, Any]:
    """What both kinds of decoding share. Nothing is blocked: `generate` would need more time for it."""
    vocab_size = size.decoder["vocab_size"]
    return {
        "eos_id": vocab_size - 2,
        "pad_id": vocab_size - 3,
        "blocked_V": torch.zeros(vocab_size, dtype=torch.bool, device=device),
        "max_new_tokens": size.tokens,
        "top_k": 32 if vocab_size > 1000 else 8,
    }


def with_errors(rows: list[list[int]], rate: float, vocab_size: int) -> list[list[int]]:
    """Ids with substitutions, deletions and insertions, each as often, at a rate."""
    rng = random.Random(0)
    out = []
    for ids in rows:
        out.append([])
        for token in ids:
            kind = rng.choice("sdi") if rng.random() < rate else ""
            out[-1] += [] if kind == "d" else [rng.randrange(vocab_size // 2)] if kind == "s" else [token]
            out[-1] += [rng.randrange(vocab_size // 2)] if kind == "i" else []
    return out
