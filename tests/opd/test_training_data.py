"""What a run trains on: the same from a list as from an index, checked at start as far as it can be, logged on demand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile

from data.feed import MixedFeed
from data.index import IndexedManifest
from opd.config import Config, load_config
from opd.evaluation import Evaluation
from opd.teachers.routing import Router
from opd.training_data import TrainingData

ROUTES = "teacher.routes={dutch: {match: {language: nl}, path: a}, calls: {match: {domain: call}, path: b}}"
BY_LANGUAGE = "teacher.routes={dutch: {match: {language: nl}, path: a}, english: {match: {language: [en]}, path: b}}"


def config(manifest: Path | str, *overrides: str) -> Config:
    return load_config(["recipe=tiny", f"data.train_manifest={manifest}", *overrides])


def write(folder: Path, num: int = 30, **last: Any) -> Path:
    """Lines in two languages; `last` changes the last one."""
    rows = [
        {
            "id": f"u{i}",
            "audio": f"{i}.wav",
            "language": ("nl", "en")[i % 2],
            "duration": 1 + i * 7 % 11,
            "domain": "call",
        }
        for i in range(num)
    ]
    rows[-1] |= last
    path = folder / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def always_indexed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.index.INDEX_ABOVE_BYTES", 0)


def test_each_manifest_has_a_default_language_of_its_own(tmp_path: Path) -> None:
    paths = {}
    for name in ("a", "b", "c"):
        paths[name] = tmp_path / f"{name}.jsonl"
        paths[name].write_text('{"id": "u", "audio": "u.wav", "text": "x"}\n')
    sources = {name: {"path": str(paths[name])} for name in ("a", "b")}
    plan = load_config([
        "recipe=tiny", "data.train_manifest=null", f"data.train_manifests={json.dumps(sources)}",
        f"data.eval_manifests={{held_out: {paths['c']}}}", "data.default_language=English",
        "data.default_languages={a: German, held_out: French}",
    ])  # fmt: skip
    data = TrainingData(plan)
    assert [data.sources[name][0].language for name in ("a", "b")] == ["German", "English"]
    assert [u.language for u in Evaluation(plan).sets["held_out"]] == ["French"]


@pytest.mark.parametrize("overrides", [[], ["data.sorted_epochs=1"]])
def test_an_index_changes_nothing_in_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    path = write(tmp_path)
    listed = TrainingData(config(path, *overrides))
    monkeypatch.setattr("data.index.INDEX_ABOVE_BYTES", 0)
    indexed = TrainingData(config(path, *overrides))
    assert isinstance(indexed.utterances(), IndexedManifest)
    assert isinstance(listed.utterances(), list)
    assert listed.feed.next_batch(70) == indexed.feed.next_batch(70)
    assert listed.feed.state_dict() == indexed.feed.state_dict()
    assert listed.num_texts() == indexed.num_texts() == 0


def test_lengths_that_a_large_manifest_lacks_are_read_from_the_files(tmp_path: Path, always_indexed: None) -> None:
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(16_000 * (6 - i)), 16_000)
    lines = [{"audio": f"{i}.wav"} | ({"duration": 0.5} if i == 2 else {}) for i in range(6)]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = TrainingData(config(tmp_path / "set.jsonl", "data.sorted_epochs=1"))
    assert [u.id for u in data.feed.next_batch(6)] == ["2.wav", "5.wav", "4.wav", "3.wav", "1.wav", "0.wav"]


def test_a_length_that_blocks_is_named(tmp_path: Path, pipe: Path) -> None:
    (tmp_path / "set.jsonl").write_text(json.dumps({"audio": pipe.name}) + "\n")
    with pytest.raises(ValueError, match=r"data\.read_timeout_s=0\.5 s: .*pipe\.wav"):
        TrainingData(config(tmp_path / "set.jsonl", "data.sorted_epochs=1", "data.read_timeout_s=0.5"))


def test_languages_are_checked_without_reading_all_lines(
    tmp_path: Path, always_indexed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = config(write(tmp_path, 500), BY_LANGUAGE)
    data = TrainingData(plan)
    read = []
    get = IndexedManifest.__getitem__
    monkeypatch.setattr(IndexedManifest, "__getitem__", lambda self, i: (read.append(i), get(self, i))[1])
    data.check_routes(Router(plan), is_new=True)
    assert read == [0, 1]
    plan = config(write(tmp_path, 500, language="fr"), BY_LANGUAGE)
    with pytest.raises(ValueError, match=r"utterance 'u499' \(language fr\) has no teacher"):
        TrainingData(plan).check_routes(Router(plan), is_new=False)


def test_other_fields_are_checked_in_all_lines_when_a_run_begins(tmp_path: Path, always_indexed: None) -> None:
    plan = config(write(tmp_path, 500), ROUTES)
    TrainingData(plan).check_routes(Router(plan), is_new=True)
    plan = config(write(tmp_path, 500, domain="web", language="en"), ROUTES)
    with pytest.raises(ValueError, match="utterance 'u499' .* has no teacher"):
        TrainingData(plan).check_routes(Router(plan), is_new=True)
    TrainingData(plan).check_routes(Router(plan), is_new=False)  # a run that goes on was checked when it began


@pytest.mark.parametrize("overrides", ["domain: [web, 0]", "language: fr"])
def test_a_route_that_takes_no_line_is_named_when_a_run_begins(tmp_path: Path, overrides: str) -> None:
    plan = config(write(tmp_path), f"teacher.routes={{one: {{match: {{{overrides}}}}}, rest: {{}}}}")
    data = TrainingData(plan)
    (warning,) = data.check_routes(Router(plan), is_new=True)
    assert warning.startswith("teacher.routes.one has no utterance to score: no line of the training manifest has ")
    assert overrides.partition(":")[0] in warning and "\n" not in warning
    assert data.check_routes(Router(plan), is_new=False) == []
    plan = config(
        write(tmp_path, domain=0, language="fr"), f"teacher.routes={{one: {{match: {{{overrides}}}}}, rest: {{}}}}"
    )
    assert TrainingData(plan).check_routes(Router(plan), is_new=True) == []


def test_several_sources_and_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    columns = {"audio": [b"some sound", b"other sound"], "id": ["a", "b"], "locale": ["en", "fr"]}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "s.parquet")
    sources: dict[str, dict[str, Any]] = {
        "list": {"path": str(write(tmp_path)), "weight": 3},
        "stream": {"path": f"hf:{tmp_path}/s.parquet?split=train&stream=true"},
    }
    several = ["data.train_manifest=null", f"data.train_manifests={json.dumps(sources)}", BY_LANGUAGE]
    plan = load_config(["recipe=tiny", *several])
    data, router = TrainingData(plan), Router(plan)
    assert isinstance(data.feed, MixedFeed)
    data.check_routes(router, is_new=True)
    batch = data.feed.next_batch(40)
    counts = {name: sum(u.id.startswith(f"{name}/") for u in batch) for name in sources}
    assert counts["list"] > 20 > counts["stream"] > 2
    data.check_streamed(router, [u for u in batch if u.language != "fr"])
    with pytest.raises(ValueError, match=r"utterance 'stream/b' \(language fr\) has no teacher"):
        data.check_streamed(router, batch)
    with pytest.raises(ValueError, match=r"s\.parquet:row . of epoch 1: this set needs a transcript"):
        TrainingData(config(sources["stream"]["path"], "stage=sft")).feed.next_batch(2)
