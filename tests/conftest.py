"""Shared by all tests: a tiny, randomly initialised ARK-ASR folder and a few spoken digit strings."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "initializer_range": 0.1,
    "whisper": {
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "num_mel_bins": 80,
        "max_source_positions": 1500,
    },
}


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh ARK-ASR of 0.3 M parameters in arkasr layout."""
    from opd.seed import create_seed

    path = tmp_path_factory.mktemp("models") / "tiny"
    corpus = [" ".join(DIGITS[(i * 7 + j * 3) % 10] for j in range(2 + i % 4)) for i in range(60)]
    create_seed(path, sizes=SIZES, corpus=corpus, vocab_size=384, seed=1)
    return path


@pytest.fixture(scope="session")
def speech(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Manifests of real synthetic speech: 48 utterances to train on (with and without text), 12 to evaluate."""
    from data.manifest import read_manifest, write_manifest
    from data.synthetic import make_set

    folder = tmp_path_factory.mktemp("speech")
    train = make_set(folder, "train", 48, seed=5)
    evaluation = make_set(folder, "eval", 12, seed=6)
    unlabelled = folder / "unlabelled.jsonl"
    import dataclasses

    write_manifest(unlabelled, [dataclasses.replace(u, text=None) for u in read_manifest(train)])
    return {"train": train, "unlabelled": unlabelled, "eval": evaluation}


@pytest.fixture(scope="session")
def waveforms(speech: dict[str, Path]) -> list[np.ndarray]:
    """Six spoken digit strings of different lengths, 16 kHz."""
    from data.audio import load_audio
    from data.manifest import read_manifest

    return [load_audio(u) for u in read_manifest(speech["eval"])[:6]]
