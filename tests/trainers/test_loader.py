"""Prompts made ahead of time are the prompts."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest
import torch
from ranks import run_ranks  # noqa: F401  sets the environment that verl is imported under

from data.audio import BadAudio
from data.collate import Collator
from data.manifest import read_manifest
from opd.arkasr import load_processor
from trainers.loader import PromptLoader


def test_prefetched_prompts_are_those_made_at_once(tiny_dir: Path, speech: dict[str, Path]) -> None:
    utterances = read_manifest(speech["eval"])
    missing = dataclasses.replace(utterances[2], id="missing", audio="/nowhere.wav")
    shard, other = [*utterances[:2], missing, *utterances[3:5]], utterances[5:7]
    processor = load_processor(tiny_dir)
    at_once = PromptLoader(Collator(on_bad_audio="skip"), processor, 0)
    at_once.prefetch(shard)  # nothing is begun without threads
    expected, bad = at_once.take(shard)
    for num_threads in (1, 3, 9):
        loader = PromptLoader(Collator(on_bad_audio="skip"), processor, num_threads)
        loader.prefetch(shard)
        found, found_bad = loader.take(shard)
        assert [error.utterance_id for error in found_bad] == [error.utterance_id for error in bad] == ["missing"]
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        loader.prefetch(other)  # another batch than the one that comes
        again, _ = loader.take(shard)
        assert all(torch.equal(again[name], value) for name, value in expected.items())
        assert loader.take_waited_s() > 0
        assert loader.take_waited_s() == 0


def test_bad_audio_stops_when_it_is_taken(tiny_dir: Path, speech: dict[str, Path]) -> None:
    utterances = read_manifest(speech["eval"])[:2]
    shard = [utterances[0], dataclasses.replace(utterances[1], audio="/nowhere.wav")]
    loader = PromptLoader(Collator(), load_processor(tiny_dir), 2)
    loader.prefetch(shard)
    with pytest.raises(BadAudio, match="nowhere"):
        loader.take(shard)


def test_audio_that_blocks_is_named(tiny_dir: Path, speech: dict[str, Path], tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.wav"
    os.mkfifo(pipe)  # opening it waits for a writer, as a dead network disk waits for its server
    utterances = read_manifest(speech["eval"])[:2]
    shard = [utterances[0], dataclasses.replace(utterances[1], audio=str(pipe))]
    loader = PromptLoader(Collator(), load_processor(tiny_dir), 2, timeout_s=3)
    loader.prefetch(shard)
    try:
        with pytest.raises(
            ValueError, match=rf"data\.read_timeout_s=3 s: .*{re.escape(utterances[1].id)} \(.*pipe\.wav\)"
        ):
            loader.take(shard)
    finally:
        writer = os.open(pipe, os.O_WRONLY)
        pipe.unlink()  # whoever opens it once more finds nothing, instead of waiting
        os.close(writer)
