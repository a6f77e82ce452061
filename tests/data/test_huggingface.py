"""Hugging Face data sets without an import: rows by position and as a stream, in real files that `datasets` writes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile

from data.audio import BadAudio, audio_seconds, load_audio
from data.huggingface import HuggingFaceRows, parse_name
from data.import_huggingface import read_huggingface
from data.index import ids_digest, open_manifest
from data.manifest import read_manifest, write_manifest
from data.sound import shown
from data.stream import StreamFeed
from opd.types import Utterance

NUM = 40


def clip(index: int) -> np.ndarray:
    return np.full(1_600 + index, (index + 1) / 100, np.float32)


def flac(index: int) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, clip(index), 16_000, format="FLAC")
    return content.getvalue()


def rows(num: int = NUM, **columns: Any) -> dict[str, Any]:
    return {
        "audio": [{"bytes": flac(i), "path": None} for i in range(num)],
        "sentence": [f"text {i}" for i in range(num)],
        "utt_id": [f"u{i}" for i in range(num)],
        "locale": [("en", "nl")[i % 2] for i in range(num)],
        "speaker": [i % 3 for i in range(num)],
    } | columns


def typed(values: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(values).cast_column("audio", datasets.Audio(decode=False))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same rows as `save_to_disk` writes them, and as a folder of parquet files."""
    folder = tmp_path_factory.mktemp("sets")
    data = typed(rows())
    datasets.DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(str(folder / "disk"))
    (folder / "parquet").mkdir()
    for shard in range(4):
        part = data.select(range(shard * 10, shard * 10 + 10))
        part.to_parquet(str(folder / "parquet" / f"train-{shard:05d}-of-00004.parquet"))
    return {"disk": str(folder / "disk"), "parquet": str(folder / "parquet")}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def number_of(utterance: Utterance) -> int:
    """Which clip an utterance's sound is."""
    samples = load_audio(utterance)
    index = len(samples) - 1_600
    np.testing.assert_allclose(samples, clip(index), atol=1e-4)
    return index


@pytest.mark.parametrize("kind", ["disk", "parquet"])
def test_rows_are_utterances_by_position(stored: dict[str, str], kind: str) -> None:
    data = open_manifest(f"hf:{stored[kind]}?split=train", require_text=True)
    assert isinstance(data, HuggingFaceRows)
    assert len(data) == NUM
    for index in (17, 0, NUM - 1):
        utterance = data[index]
        assert (utterance.id, utterance.text, utterance.language) == (
            f"u{index}",
            f"text {index}",
            ("en", "nl")[index % 2],
        )
        assert utterance.extra == {"speaker": index % 3}
        assert number_of(utterance) == index
        assert audio_seconds(utterance) == (1_600 + index) / 16_000
    assert data[-1] == data[NUM - 1]
    assert [u.id for u in data[3:6]] == ["u3", "u4", "u5"]
    assert (data.facts.num_texts, data.facts.languages) == (NUM, [("en", 0), ("nl", 1)])
    assert ids_digest(data) == ids_digest(list(data))


def test_columns_can_be_named_and_rows_have_ids_of_their_own(stored: dict[str, str]) -> None:
    data = HuggingFaceRows(f"hf:{stored['disk']}?split=test&audio=audio&text=utt_id&id=&language=Dutch")
    assert [(u.id, u.text, u.language) for u in data] == [(f"row-{i:08d}", f"u{i}", "nl") for i in range(3)]


def test_sound_is_found_again_after_a_manifest_was_written(stored: dict[str, str], tmp_path: Path) -> None:
    write_manifest(tmp_path / "a.jsonl", HuggingFaceRows(f"hf:{stored['disk']}?split=test"))
    assert [number_of(utterance) for utterance in read_manifest(tmp_path / "a.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("split=dev", "there is no split 'dev'"),
        ("", "there are several splits"),
        ("split=train&audoi=x", "unknown option audoi; write hf:"),
        ("split=train&audio=sound", "there is no column 'sound'"),
        ("split=train&text=words", "there is no column 'words'"),
        ("split=train&stream=yes", "stream must be true or false, not 'yes'"),
        ("split=train&buffer=0", "buffer must be a whole number above 0"),
        ("split=train&language=xx", "xx"),
        ("split=train&stream=true", "stream=true: a stream can only be trained on"),
    ],
)
def test_bad_names(stored: dict[str, str], options: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        open_manifest(f"hf:{stored['disk']}?{options}")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sentence": ["a", " ", "c"]}, ":row 1: this set needs a transcript: its `sentence` is empty"),
        ({"utt_id": ["a", "b", "a"]}, ":row 2: id 'a' is already that of row 0"),
        ({"locale": ["en", "en", "xx"]}, ":row 2: "),
    ],
)
def test_bad_rows_are_named_when_the_set_is_opened(tmp_path: Path, changed: dict, message: str) -> None:
    typed(rows(3, **changed)).save_to_disk(str(tmp_path / "set"))
    with pytest.raises(ValueError) as error:
        HuggingFaceRows(f"hf:{tmp_path / 'set'}", require_text=True)
    assert message in str(error.value)


def test_languages_and_texts_are_counted_over_all_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.huggingface._BATCH", 3)
    languages = ["en", "en", None, "nl", None, "fr", "en", "fr"]
    texts = ["a", None, "", "b", "c", None, "d", "e"]
    typed(rows(8, locale=languages, sentence=texts)).save_to_disk(str(tmp_path / "set"))
    data = HuggingFaceRows(f"hf:{tmp_path / 'set'}")
    assert data.facts.languages == [("en", 0), (None, 2), ("nl", 3), ("fr", 5)]
    assert data.facts.num_texts == 6
    for number, text in enumerate((None, "\u3000 \n")):
        folder = tmp_path / f"other{number}"
        typed(rows(8, sentence=["a"] * 7 + [text])).save_to_disk(str(folder))
        with pytest.raises(ValueError, match=":row 7: this set needs a transcript: its `sentence` is empty"):
            HuggingFaceRows(f"hf:{folder}", require_text=True)


def test_a_row_without_sound_is_bad_audio(tmp_path: Path) -> None:
    sounds = [{"bytes": b"no sound", "path": None}, {"bytes": None, "path": None}]
    datasets.Dataset.from_dict({"audio": sounds}).save_to_disk(str(tmp_path / "set"))
    data = HuggingFaceRows(f"hf:{tmp_path / 'set'}")
    for utterance, reason in zip(data, ("cannot be read", "the row has no audio"), strict=True):
        with pytest.raises(BadAudio, match=reason):
            load_audio(utterance)


def test_rows_may_name_files(tmp_path: Path) -> None:
    (tmp_path / "a.flac").write_bytes(flac(5))
    datasets.Dataset.from_dict({"file": ["a.flac", "b.flac"]}).save_to_disk(str(tmp_path / "set"))
    found, missing = HuggingFaceRows(f"hf:{tmp_path / 'set'}?audio=file")
    assert found.audio == str(tmp_path / "set" / "a.flac"), "counts from the folder of the set"
    (tmp_path / "a.flac").rename(found.audio)
    assert number_of(found) == 5
    with pytest.raises(BadAudio, match="No such file"):
        load_audio(missing)


def stream(stored: dict[str, str], kind: str = "parquet", seed: int = 3, buffer: int = 7) -> StreamFeed:
    return StreamFeed(f"hf:{stored[kind]}?split=train&stream=true&buffer={buffer}", seed, require_text=True)


def drawn(feed: StreamFeed, total: int, batch_size: int) -> list[str]:
    found: list[str] = []
    while len(found) < total:
        found += [u.id for u in feed.next_batch(min(batch_size, total - len(found)))]
    return found


@pytest.mark.parametrize("kind", ["disk", "parquet"])
def test_a_stream_holds_every_row_once_an_epoch_with_its_sound(stored: dict[str, str], kind: str) -> None:
    utterances = stream(stored, kind).next_batch(2 * NUM)
    epochs = [[u.id for u in utterances[:NUM]], [u.id for u in utterances[NUM:]]]
    assert all(sorted(epoch) == sorted(f"u{i}" for i in range(NUM)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != [f"u{i}" for i in range(NUM)]
    for utterance in utterances[::9]:
        assert utterance.id == f"u{number_of(utterance)}"
        assert utterance.text == f"text {number_of(utterance)}"
    if kind == "parquet":
        assert (
            len({epoch[0][:2] for epoch in epochs} | {drawn(stream(stored, seed=s), 1, 1)[0][:2] for s in range(9)}) > 2
        ), "the files come in another order, too"


@pytest.mark.parametrize("kind", ["disk", "parquet"])
@pytest.mark.parametrize("buffer", [1, 7, 100])
def test_a_stream_goes_on_exactly_with_another_batch_size(stored: dict[str, str], kind: str, buffer: int) -> None:
    expected = drawn(stream(stored, kind, buffer=buffer), 130, batch_size=8)
    for position in (0, 1, 7, 8, 14, 39, 40, 41, 79, 80, 93):
        first = stream(stored, kind, buffer=buffer)
        before = drawn(first, position, batch_size=8) if position else []
        first.peek_batch(20)  # what was read ahead does not count
        state = json.loads(json.dumps(first.state_dict()))
        second = stream(stored, kind, buffer=buffer)
        second.next_batch(11)  # what it did before is forgotten
        second.load_state_dict(state)
        assert second.position == position
        assert before + drawn(second, 130 - position, batch_size=12) == expected


def test_a_look_ahead_changes_nothing(stored: dict[str, str]) -> None:
    feed, other = stream(stored), stream(stored)
    for size in (4, 40, 7, 31):
        ahead = feed.peek_batch(size)
        assert feed.state_dict() == other.state_dict()
        assert feed.next_batch(size) == ahead == other.next_batch(size)


def test_state_of_another_stream_is_refused(stored: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="has seed 4, but this run has 3"):
        stream(stored).load_state_dict(stream(stored, seed=4).state_dict())
    with pytest.raises(ValueError, match="has buffer 9, but this run has 7"):
        stream(stored).load_state_dict(stream(stored, buffer=9).state_dict())


def test_a_stream_names_bad_rows_and_has_ids_by_content(tmp_path: Path) -> None:
    typed(rows(3, sentence=["a", "b", None])).to_parquet(str(tmp_path / "a.parquet"))
    name = f"hf:{tmp_path / 'a.parquet'}?split=train&stream=true&id="
    with pytest.raises(ValueError, match=r"a\.parquet:row 2 of epoch 1: this set needs a transcript"):
        StreamFeed(name, 0, require_text=True).next_batch(3)
    utterances = StreamFeed(name, 0).next_batch(6)
    assert sorted(u.id for u in utterances[:3]) == sorted(u.id for u in utterances[3:])
    assert len({u.id for u in utterances}) == 3
    assert all(len(shown(u.audio)) < 100 < len(u.audio) for u in utterances)


def test_a_damaged_shard_is_named(stored: dict[str, str], tmp_path: Path) -> None:
    folder = shutil.copytree(stored["parquet"], tmp_path / "damaged")
    shard = folder / "train-00001-of-00004.parquet"
    shard.write_bytes(shard.read_bytes()[:-500])
    named = rf"cannot be read \({shard}: Could not open Parquet.*: fetch the data set again"
    with pytest.raises(ValueError, match=rf"{folder}:row \d+ of epoch 1: the stream {named}"):
        stream({"parquet": str(folder)}).next_batch(NUM)
    with pytest.raises(
        ValueError, match=rf"{folder}: is no .* can be read \({shard}: Could not open Parquet.*: check it"
    ):
        open_manifest(f"hf:{folder}?split=train")
    with pytest.raises(ValueError, match=rf"{folder}\[train\]:row 10: {named}"):
        list(read_huggingface(folder, split="train", audio=None).rows)


def test_what_a_name_says() -> None:
    name = parse_name("hf:org/set?split=train%5B%3A10%5D&subset=clean&begin=from&buffer=9")
    assert (name.path, name.split, name.subset, name.columns.begin) == ("org/set", "train[:10]", "clean", "from")
    assert (name.stream, name.buffer) == (False, 9)
    with pytest.raises(ValueError, match="names no data set"):
        parse_name("hf:?split=train")
