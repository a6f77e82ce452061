"""ARK-ASR: the remote code that every export carries, and how this project loads a checkpoint.

The modules of CODE_FILES are copied unchanged into exports; they import torch, transformers, numpy and each other
only. `load_model` and `load_processor` use the classes of this package, so a folder needs no remote code for them.
"""

from __future__ import annotations

from .configuration_arkasr import ArkasrConfig, num_audio_tokens
from .loading import load_model, load_processor
from .modeling_arkasr import ArkasrForConditionalGeneration
from .processing_arkasr import ArkasrProcessor, blocked_token_ids
from .windows_arkasr import cut_at_silences, join_transcripts

CODE_FILES = (
    "audio_arkasr.py",
    "chat_arkasr.py",
    "configuration_arkasr.py",
    "modeling_arkasr.py",
    "modeling_audio.py",
    "pipeline_arkasr.py",
    "processing_arkasr.py",
    "windows_arkasr.py",
)

__all__ = [
    "CODE_FILES",
    "ArkasrConfig",
    "ArkasrForConditionalGeneration",
    "ArkasrProcessor",
    "blocked_token_ids",
    "cut_at_silences",
    "join_transcripts",
    "load_model",
    "load_processor",
    "num_audio_tokens",
]
