"""ARK-ASR: the remote code that every export carries, and how this project loads a checkpoint.

The five modules (CODE_FILES) are copied unchanged into exports; they import torch, transformers, numpy and each other
only. The two loaders here use the classes of this package, so a folder needs no remote code to be loaded by them.
"""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from .configuration_arkasr import ArkasrConfig, num_audio_tokens
from .modeling_arkasr import ArkasrForConditionalGeneration
from .processing_arkasr import ArkasrProcessor, blocked_token_ids

CODE_FILES = (
    "audio_arkasr.py",
    "configuration_arkasr.py",
    "modeling_arkasr.py",
    "modeling_audio.py",
    "processing_arkasr.py",
)


def load_model(
    path: str | os.PathLike, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> ArkasrForConditionalGeneration:
    """The model of a folder (or Hub id) in `dtype`, in eval mode, on the CPU.

    attn_implementation  of the decoder: sdpa (default), eager, flash_attention_2; the encoder always uses SDPA

    Raises ValueError naming the tensors that are missing, unexpected or of another shape, and for a stored lm_head that
    differs from the embedding it is tied to.
    """
    name = os.fspath(path)
    config = ArkasrConfig.from_pretrained(name)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model, info = ArkasrForConditionalGeneration.from_pretrained(
        name, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    problems = [
        f"{what}: {', '.join(sorted(key if isinstance(key, str) else key[0] for key in info[kind]))}"
        for what, kind in (
            ("missing", "missing_keys"),
            ("unexpected", "unexpected_keys"),
            ("wrong shape", "mismatched_keys"),
        )
        if info[kind]
    ]
    if problems:
        raise ValueError(
            f"{name}: weights do not fit config.json ({'; '.join(problems)}); is this an ARK-ASR checkpoint?"
        )
    if config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        raise ValueError(
            f"{name}: lm_head.weight differs from model.embed_tokens.weight; set tie_word_embeddings to false"
        )
    return model.eval()


def load_processor(path: str | os.PathLike) -> ArkasrProcessor:
    """The processor of a folder (or Hub id)."""
    name = os.fspath(path)
    # Not ArkasrProcessor.from_pretrained: on its way through the Auto classes transformers would ask for
    # trust_remote_code, although no code of the folder is wanted here.
    settings, _ = ArkasrProcessor.get_processor_dict(name)
    return ArkasrProcessor(
        WhisperFeatureExtractor.from_pretrained(name),
        PreTrainedTokenizerFast.from_pretrained(name),
        **{
            key: settings[key]
            for key in ("audio_token", "merge_factor", "audio_dtype", "chat_template")
            if key in settings
        },
    )


__all__ = [
    "CODE_FILES",
    "ArkasrConfig",
    "ArkasrForConditionalGeneration",
    "ArkasrProcessor",
    "blocked_token_ids",
    "load_model",
    "load_processor",
    "num_audio_tokens",
]
