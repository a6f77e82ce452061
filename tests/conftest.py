"""Shared by all tests: a tiny, randomly initialised ARK-ASR folder and a few spoken digit strings."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny import CORPUS, SIZES

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that run the main job come first, so that two processes (make test) do not end with one waiting for a long file."""
    long = {item.path for item in items if "cluster" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh ARK-ASR of 0.3 M parameters in arkasr layout."""
    from opd.seed import create_seed

    path = tmp_path_factory.mktemp("models") / "tiny"
    create_seed(path, sizes=SIZES, corpus=CORPUS, vocab_size=384, seed=1)
    return path


@pytest.fixture(scope="session")
def speech(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Manifests of real synthetic speech: 48 utterances to train on, 24 of them without text, 12 to evaluate."""
    from data.manifest import read_manifest, write_manifest
    from data.synthetic import make_set

    folder = tmp_path_factory.mktemp("speech")
    train = make_set(folder, "train", 48, seed=5)
    evaluation = make_set(folder, "eval", 12, seed=6)
    unlabelled = folder / "unlabelled.jsonl"
    write_manifest(unlabelled, [dataclasses.replace(u, text=None) for u in read_manifest(train)[:24]])
    return {"train": train, "unlabelled": unlabelled, "eval": evaluation}


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[Path]:
    """A pipe that nobody writes to: opening it waits, as a dead network disk waits for its server."""
    path = tmp_path / "pipe.wav"
    os.mkfifo(path)
    yield path
    both_ends = os.open(path, os.O_RDWR)  # whoever waits goes on; until then soundfile opens no other file either
    path.unlink()
    os.close(both_ends)


@pytest.fixture(scope="session")
def waveforms(speech: dict[str, Path]) -> list[np.ndarray]:
    """Six spoken digit strings of different lengths, 16 kHz."""
    from data.audio import load_audio
    from data.manifest import read_manifest

    return [load_audio(u) for u in read_manifest(speech["eval"])[:6]]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of clients of a Ray head that is started for the tests."""
    from main_job import ray_head

    with ray_head(tmp_path_factory.mktemp("head")) as client:
        yield client
