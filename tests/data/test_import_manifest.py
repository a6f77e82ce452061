"""Imports: small real data sets of every format, read back through the manifest and compared sample by sample."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import soundfile

from data.audio import load_audio
from data.import_manifest import ImportSummary, import_manifest, main, parse_options
from data.manifest import read_manifest
from opd.types import Utterance

RATE = 16_000
ROOT = Path(__file__).resolve().parents[2]


def sound(seed: int, seconds: float = 0.5) -> np.ndarray:
    """int16 [samples] of noise, another one for each seed."""
    return np.random.default_rng(seed).integers(-8_000, 8_000, size=round(RATE * seconds)).astype(np.int16)


def encoded(samples: np.ndarray, format: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format=format)
    return file.getvalue()


def write_sound(path: Path, seed: int, seconds: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(sound(seed, seconds), path.suffix[1:].upper()))
    return path


def write_kaldi(folder: Path, **lists: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in lists.items():
        (folder / name.replace("wav_scp", "wav.scp")).write_text(content, encoding="utf-8")
    return folder


def run(source: Path, out: Path, **values: str) -> tuple[list[Utterance], ImportSummary]:
    summary = import_manifest(source, out, parse_options(values))
    return read_manifest(out), summary


def error_of(source: Path, out: Path, **values: str) -> str:
    with pytest.raises(ValueError) as error:
        run(source, out, **values)
    assert not out.exists()
    return str(error.value)


def assert_sounds_like(utterance: Utterance, samples: np.ndarray) -> None:
    np.testing.assert_array_equal(load_audio(utterance) * 2**15, samples)


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def make_dataset(*formats: str) -> datasets.Dataset:
    rows = {
        "audio": [{"bytes": encoded(sound(i), format), "path": None} for i, format in enumerate(formats)],
        "sentence": [f"Satz {i}" for i in range(len(formats))],
        "lang_id": [i % 2 for i in range(len(formats))],
        "age": list(range(30, 30 + len(formats))),
        "words": [["a", "b"] for _ in formats],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(sampling_rate=RATE))
    return data.cast_column("lang_id", datasets.ClassLabel(names=["de_de", "en_us"]))


def test_saved_dataset_keeps_the_encoded_bytes(tmp_path: Path) -> None:
    data = make_dataset("WAV", "FLAC", "MP3", "OGG")
    data.save_to_disk(tmp_path / "set")
    contents = [row["audio"]["bytes"] for row in data.cast_column("audio", datasets.Audio(decode=False))]
    utterances, summary = run(tmp_path / "set", tmp_path / "train.jsonl", language_column="lang_id")
    assert [Path(u.audio).suffix for u in utterances] == [".wav", ".flac", ".mp3", ".ogg"]
    for i, (utterance, content) in enumerate(zip(utterances, contents, strict=True)):
        assert Path(utterance.audio).is_relative_to(tmp_path / "train_audio")
        assert Path(utterance.audio).read_bytes() == content
        assert utterance.text == f"Satz {i}"
    assert_sounds_like(utterances[0], sound(0))
    assert_sounds_like(utterances[1], sound(1))
    assert [u.id for u in utterances] == [f"train-{i:08d}" for i in range(4)]
    assert [u.language for u in utterances] == ["de", "en", "de", "en"], "labels become codes"
    assert utterances[0].extra == {"age": 30, "duration": 0.5}, "lists are left out"
    assert (summary.utterances, summary.timed, summary.languages) == (4, 4, {"de": 2, "en": 2})
    assert summary.seconds == pytest.approx(2.0, abs=0.2), "lossy formats may pad"


def test_split_is_chosen_by_name(tmp_path: Path) -> None:
    splits = datasets.DatasetDict(train=make_dataset("WAV", "WAV"), test=make_dataset("FLAC"))
    splits.save_to_disk(tmp_path / "set")
    message = error_of(tmp_path / "set", tmp_path / "a.jsonl")
    assert "there are several splits: choose with split= from train, test" in message
    assert "there is no split 'dev'" in error_of(tmp_path / "set", tmp_path / "a.jsonl", split="dev")
    assert len(run(tmp_path / "set", tmp_path / "train.jsonl", split="train")[0]) == 2
    assert len(run(tmp_path / "set", tmp_path / "test.jsonl", split="test")[0]) == 1
    make_dataset("WAV").save_to_disk(tmp_path / "one")
    assert "has no splits: leave it out" in error_of(tmp_path / "one", tmp_path / "a.jsonl", split="train")


def test_parquet_files(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    make_dataset("WAV", "FLAC").to_parquet(tmp_path / "set" / "train-00000-of-00001.parquet")
    make_dataset("WAV").to_parquet(tmp_path / "set" / "test-00000-of-00001.parquet")
    utterances, _ = run(tmp_path / "set", tmp_path / "a.jsonl", split="train", id="age", text="", language="de")
    assert [u.id for u in utterances] == ["30", "31"]
    assert [u.text for u in utterances] == [None, None]
    assert utterances[0].extra["sentence"] == "Satz 0"
    for i, utterance in enumerate(utterances):
        assert_sounds_like(utterance, sound(i))
    one, _ = run(tmp_path / "set" / "train-00000-of-00001.parquet", tmp_path / "b.jsonl")
    assert [u.text for u in one] == ["Satz 0", "Satz 1"]


def test_column_of_audio_is_the_typed_one_and_times_are_not_guessed(tmp_path: Path) -> None:
    rows = {
        "file": ["/somewhere/else.wav"],
        "speech": [{"bytes": encoded(sound(1)), "path": None}],
        "begin_time": [100.0],
        "end_time": [100.5],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("speech", datasets.Audio())
    data.save_to_disk(tmp_path / "set")
    (utterance,), _ = run(tmp_path / "set", tmp_path / "a.jsonl")
    assert_sounds_like(utterance, sound(1))
    assert utterance.extra["source_begin_time"] == 100.0
    assert "there is no column 'x'" in error_of(tmp_path / "set", tmp_path / "b.jsonl", audio="x")
    data.select_columns(["speech"]).save_to_disk(tmp_path / "alone")
    (utterance,), _ = run(tmp_path / "alone", tmp_path / "c.jsonl")
    assert_sounds_like(utterance, sound(1))


def test_decoded_samples_become_flac(tmp_path: Path) -> None:
    rows = {
        "audio": [
            {"array": (sound(1) / 2**15).tolist(), "sampling_rate": RATE},
            {"array": (sound(1) / 2**15).tolist(), "sampling_rate": 8_000},
        ]
    }
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    utterances, _ = run(tmp_path / "set", tmp_path / "a.jsonl")
    assert [soundfile.info(u.audio).subtype for u in utterances] == ["PCM_16", "PCM_16"]
    assert [Path(u.audio).suffix for u in utterances] == [".flac", ".flac"]
    assert_sounds_like(utterances[0], sound(1))
    assert [u.extra["duration"] for u in utterances] == [0.5, 1.0]
    assert [soundfile.info(u.audio).samplerate for u in utterances] == [RATE, 8_000]


@pytest.mark.parametrize("samples", [[], [0.1, float("nan")], [70_000, 1], ["a", "b"], [[0.1, 0.2], [0.3, 0.4]]])
def test_samples_that_are_no_sound(tmp_path: Path, samples: list[Any]) -> None:
    rows = {"audio": [{"array": samples, "sampling_rate": RATE}]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    assert "row 0: audio cannot be read" in error_of(tmp_path / "set", tmp_path / "a.jsonl")


def test_local_files_stay_where_they_are(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "sounds" / "a.wav", 3)
    data = datasets.Dataset.from_dict({"audio": [{"path": str(path), "bytes": None}], "text": ["x"]})
    data.save_to_disk(tmp_path / "set")
    (utterance,), summary = run(tmp_path / "set", tmp_path / "a.jsonl")
    assert utterance.audio == str(path)
    assert summary.timed == 0
    assert not (tmp_path / "a_audio").exists()


def test_audio_that_cannot_be_read_or_is_not_there(tmp_path: Path) -> None:
    audio = [encoded(sound(1)), b"no sound", None]
    rows = {"audio": [{"bytes": content, "path": None} for content in audio], "text": ["a", "b", "c"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "set")
    assert "row 1: audio cannot be read: 8 bytes" in error_of(tmp_path / "set", tmp_path / "a.jsonl")
    utterances, summary = run(tmp_path / "set", tmp_path / "a.jsonl", missing="skip")
    assert [u.text for u in utterances] == ["a"]
    assert summary.skipped == {"audio cannot be read": 1, "no audio": 1}
    assert summary.lines()[-1] == "skipped: 1 audio cannot be read, 1 no audio"


def test_damaged_data_set_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.parquet").write_bytes(b"PAR1 this is not parquet")
    assert "is no Hugging Face data set that can be read" in error_of(tmp_path / "set", tmp_path / "a.jsonl")
    make_dataset("WAV").save_to_disk(tmp_path / "cut")
    arrow = next((tmp_path / "cut").glob("*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:100])
    assert str(tmp_path / "cut") in error_of(tmp_path / "cut", tmp_path / "a.jsonl")


def test_audio_folder(tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    write_sound(folder / "a.wav", 1)
    write_sound(folder / "b.flac", 2)
    (folder / "metadata.csv").write_text('file_name,transcription\na.wav,"one, two"\nb.flac,three\n')
    utterances, _ = run(folder, tmp_path / "a.jsonl", language="English")
    assert [(u.id, u.text, u.language) for u in utterances] == [("a.wav", "one, two", "en"), ("b.flac", "three", "en")]
    assert_sounds_like(utterances[1], sound(2))

    for split, seed in (("train", 3), ("test", 4)):
        write_sound(tmp_path / "splits" / split / "c.wav", seed)
        line = {"file_name": "c.wav", "transcription": split, "speaker": 7, "tags": ["x"]}
        (tmp_path / "splits" / split / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    assert "choose with split= from test, train" in error_of(tmp_path / "splits", tmp_path / "b.jsonl")
    (utterance,), _ = run(tmp_path / "splits", tmp_path / "b.jsonl", split="test")
    assert_sounds_like(utterance, sound(4))
    assert (utterance.text, utterance.extra) == ("test", {"speaker": 7})


# -- Kaldi -------------------------------------------------------------------------------------------------------------


def test_kaldi_with_segments(tmp_path: Path) -> None:
    write_sound(tmp_path / "r1.wav", 1, 2.0)
    write_sound(tmp_path / "far" / "r 2.flac", 2, 1.0)
    folder = write_kaldi(
        tmp_path / "data",
        wav_scp=f"r1 {tmp_path}/r1.wav\nr2\t{tmp_path}/far/r 2.flac\n",
        segments="u1 r1 0.25 0.75\nu2 r1 0.75 1.5\nu3 r2 0.5 -1\n",
        text="u1 één  twee\nu2\nu3 drie\n",
        utt2spk="u1 s1\nu2 s1\nu3 s2\n",
        utt2lang="u1 nl\nu2 Dutch\nu3 nl-BE\n",
        utt2dur="u1 0.5\nu2 0.75\nu3 0.5\n",
    )
    utterances, summary = run(folder, tmp_path / "a.jsonl")
    assert [(u.id, u.text, u.language) for u in utterances] == [
        ("u1", "één  twee", "nl"),
        ("u2", "", "nl"),
        ("u3", "drie", "nl"),
    ]
    assert [u.extra for u in utterances] == [
        {"speaker": "s1", "duration": 0.5},
        {"speaker": "s1", "duration": 0.75},
        {"speaker": "s2", "duration": 0.5},
    ]
    assert_sounds_like(utterances[0], sound(1, 2.0)[4_000:12_000])
    assert_sounds_like(utterances[1], sound(1, 2.0)[12_000:24_000])
    assert_sounds_like(utterances[2], sound(2, 1.0)[8_000:])
    assert summary.seconds == 1.25, "the end of the last is not known"


def test_kaldi_without_segments_and_with_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sound(tmp_path / "egs" / "wavs" / "a.wav", 1)
    write_sound(tmp_path / "data" / "b.wav", 2)
    write_sound(tmp_path / "root" / "a.wav", 3)
    monkeypatch.chdir(tmp_path / "egs")  # Kaldi's paths count from the working directory
    folder = write_kaldi(tmp_path / "data", wav_scp="u1 wavs/a.wav\nu2 b.wav\n")
    utterances, _ = run(folder, tmp_path / "a.jsonl")
    assert_sounds_like(utterances[0], sound(1))
    assert_sounds_like(utterances[1], sound(2))
    assert [u.text for u in utterances] == [None, None]
    write_kaldi(tmp_path / "data", wav_scp="u1 a.wav\n")
    (utterance,), _ = run(folder, tmp_path / "b.jsonl", audio_root="../root")
    assert_sounds_like(utterance, sound(3))


def test_kaldi_commands_are_run_only_when_asked(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a b.wav", 1, 2.0)
    content = bytearray(path.read_bytes())
    size = content.index(b"data") + 4
    content[size : size + 4] = b"\xff" * 4  # as a program writes it that does not know the length
    (tmp_path / "stream.wav").write_bytes(content)
    log = tmp_path / "log"
    folder = write_kaldi(
        tmp_path / "data",
        wav_scp=f"r1 echo run >> '{log}'; cat '{path}' | cat |\nr2 cat {tmp_path}/stream.wav |\n",
        segments="u1 r1 0.0 0.5\nu2 r1 0.5 1.0\nu3 r2 1.0 2.0\n",
    )
    message = error_of(folder, tmp_path / "a.jsonl")
    assert f"{folder / 'wav.scp'}:1: the audio of 'r1' is what a command prints" in message
    assert "pipes=run" in message
    assert not log.exists()

    utterances, _ = run(folder, tmp_path / "a.jsonl", pipes="run", audio_dir=str(tmp_path / "kept"))
    assert_sounds_like(utterances[0], sound(1, 2.0)[:8_000])
    assert_sounds_like(utterances[1], sound(1, 2.0)[8_000:16_000])
    assert_sounds_like(utterances[2], sound(1, 2.0)[16_000:])
    assert "duration" not in utterances[0].extra, "the recording's length is not the segment's"
    assert {Path(u.audio).suffix for u in utterances} == {".wav"}
    assert log.read_text() == "run\n", "once a recording"
    run(folder, tmp_path / "a.jsonl", pipes="run", audio_dir=str(tmp_path / "kept"), overwrite="true")
    assert log.read_text() == "run\n", "the second import finds what the first has written"


@pytest.mark.parametrize("subtype", ["PCM_24", "FLOAT", "ULAW", "PCM_U8"])
def test_kaldi_commands_keep_the_resolution(tmp_path: Path, subtype: str) -> None:
    samples = np.random.default_rng(0).normal(scale=0.1, size=RATE)
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype=subtype)
    folder = write_kaldi(tmp_path / "data", wav_scp=f"u1 cat {tmp_path}/a.wav |\n")
    (utterance,), _ = run(folder, tmp_path / "a.jsonl", pipes="run")
    assert soundfile.info(utterance.audio).subtype == subtype
    original = load_audio(Utterance(id="1", audio=str(tmp_path / "a.wav")))
    np.testing.assert_array_equal(load_audio(utterance), original)
    assert utterance.extra == {"duration": 1.0}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("false", "status 1"),
        ("echo wrong file >&2; exit 3", "status 3"),
        ("echo hello", "printed no sound that can be read"),
        ("cat {folder}/empty.wav", "printed no sound"),
        ("head -c 9000 {folder}/noise.flac", "printed no sound that can be read"),
        ("head -c 5000 {folder}/noise.mp3", "of 32000 samples"),
    ],
)
def test_kaldi_command_that_fails(tmp_path: Path, command: str, message: str) -> None:
    write_sound(tmp_path / "a.wav", 1)
    (tmp_path / "empty.wav").write_bytes(encoded(np.empty(0)))
    for name in ("noise.flac", "noise.mp3"):
        write_sound(tmp_path / name, 2, 2.0)
    command = command.format(folder=tmp_path)
    folder = write_kaldi(tmp_path / "data", wav_scp=f"u1 {tmp_path}/a.wav\nu2 {command} |\n")
    error = error_of(folder, tmp_path / "a.jsonl", pipes="run")
    assert "wav.scp:2: command failed" in error
    assert message in error
    assert ("wrong file" in error) == ("wrong file" in command)
    assert not [path for path in (tmp_path / "a_audio").rglob("*") if path.is_file()]
    utterances, summary = run(folder, tmp_path / "a.jsonl", pipes="run", missing="skip")
    assert [u.id for u in utterances] == ["u1"]
    assert summary.skipped == {"command failed": 1}


@pytest.mark.parametrize(
    ("lists", "message", "kept"),
    [
        ({"text": "u1 a\nu2 b\nu3 c\nu9 d\n"}, "text:4: in text but not in segments: utterance u9", "u1 u2 u3"),
        ({"text": "u1 a\nu3 c\n"}, "segments:2: in segments but not in text: utterance u2", "u1 u3"),
        ({"utt2spk": "u1 a\nu2 b\nu4 c\n"}, "utt2spk:3: in utt2spk but not in segments: utterance u4", "u1 u2"),
        ({"utt2lang": "u2 de\nu3 de\n"}, "segments:1: in segments but not in utt2lang: utterance u1", "u2 u3"),
        (
            {"segments": "u1 r1 0 0.1\nu2 r7 0 0.1\n"},
            "segments:2: in segments but not in wav.scp: recording r7 of utterance u2",
            "u1",
        ),
        ({"wav_scp": "r1 r1.wav\nr2 no.wav\n"}, "segments:3: audio file not found: no.wav", "u1 u2"),
    ],
)
def test_kaldi_lists_that_do_not_agree(tmp_path: Path, lists: dict[str, str], message: str, kept: str) -> None:
    write_sound(tmp_path / "data" / "r1.wav", 1)
    write_sound(tmp_path / "data" / "r2.wav", 2)
    standard = {"wav_scp": "r1 r1.wav\nr2 r2.wav\n", "segments": "u1 r1 0 0.2\nu2 r1 0.2 0.4\nu3 r2 0 0.5\n"}
    folder = write_kaldi(tmp_path / "data", **{**standard, **lists})
    assert message in error_of(folder, tmp_path / "a.jsonl")
    utterances, summary = run(folder, tmp_path / "a.jsonl", missing="skip")
    assert " ".join(u.id for u in utterances) == kept
    assert message.split(": ")[1] in summary.skipped


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"wav_scp": "r1 a.wav\nr1 b.wav\n"}, "wav.scp:2: 'r1' is already used"),
        ({"wav_scp": "r1 a.wav\n\nr2 b.wav\n"}, "wav.scp:2: the line is empty"),
        ({"wav_scp": "r1\n"}, "wav.scp:1: 'r1' needs the path of a sound file"),
        ({"wav_scp": "r1 raw.ark:123\n"}, "wav.scp:1: 'r1' needs the path of a sound file, found 'raw.ark:123'"),
        ({"segments": "u1 r1 0.0\n"}, "segments:1: expected an utterance, a recording"),
        ({"segments": "u1 r1 0.0 0.5 A\n"}, "segments:1: expected an utterance, a recording"),
        ({"segments": "u1 r1 zero 0.5\n"}, "segments:1: expected an utterance, a recording"),
        ({"segments": "u1 r1 0.4 0.2\n"}, "segments:1: `begin_time` 0.4 is not before `end_time` 0.2"),
        ({"utt2dur": "r1 long\n"}, "wav.scp:1: `duration` must be seconds, found 'long'"),
        ({"utt2lang": "r1 tlh\n"}, "wav.scp:1: unknown language 'tlh'"),
    ],
)
def test_kaldi_bad_lines(tmp_path: Path, lists: dict[str, str], message: str) -> None:
    write_sound(tmp_path / "data" / "a.wav", 1)
    folder = write_kaldi(tmp_path / "data", **{"wav_scp": "r1 a.wav\n", **lists})
    assert message in error_of(folder, tmp_path / "a.jsonl")


# -- Tables and JSON lines ---------------------------------------------------------------------------------------------


def test_common_voice(tmp_path: Path) -> None:
    """Its own layout and header; sentences hold quotes, which are no quoting."""
    release = tmp_path / "de"
    sentences = ['"Wie geht es?", fragte er.', '"Nein', "Ein\u00a0Satz"]
    rows = ["client_id\tpath\tsentence\tup_votes\tage\tlocale\tsegment"]
    for i, sentence in enumerate(sentences):
        write_sound(release / "clips" / f"common_voice_de_{i}.mp3", i)
        rows.append(f"c{i}\tcommon_voice_de_{i}.mp3\t{sentence}\t2\t\tde\t")
    (release / "validated.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert "audio_root=" in error_of(release / "validated.tsv", release / "a.jsonl")
    utterances, summary = run(release / "validated.tsv", release / "a.jsonl", audio_root="clips")
    assert [u.text for u in utterances] == sentences
    assert utterances[0].id == "common_voice_de_0.mp3"
    assert utterances[0].language == "de"
    assert utterances[0].extra == {"client_id": "c0", "up_votes": "2"}, "empty cells are left out"
    assert json.loads((release / "a.jsonl").read_text().split("\n")[0])["audio"] == "clips/common_voice_de_0.mp3"
    direct = Utterance(id="x", audio=str(release / "clips" / "common_voice_de_1.mp3"))
    np.testing.assert_array_equal(load_audio(utterances[1]), load_audio(direct))
    assert summary.lines()[0] == "3 utterances, length not known"


def test_csv_with_times_and_named_columns(tmp_path: Path) -> None:
    write_sound(tmp_path / "long.wav", 1, 2.0)
    path = tmp_path / "set.csv"
    path.write_text(
        "\ufeffID,File,text,raw,from,to,task\r\n"
        'a,long.wav,"one, ""two""","multi\nline",0.5,1.0,read\r\n'
        "\r\n"
        "b,long.wav,three,x,1.0,,read\r\n",
        encoding="utf-8",
        newline="",
    )
    utterances, summary = run(path, tmp_path / "a.jsonl", begin="from", end="to", language="French")
    assert [(u.id, u.text, u.language) for u in utterances] == [("a", 'one, "two"', "fr"), ("b", "three", "fr")]
    assert_sounds_like(utterances[0], sound(1, 2.0)[8_000:16_000])
    assert_sounds_like(utterances[1], sound(1, 2.0)[16_000:])
    assert utterances[0].extra == {"raw": "multi\nline", "source_task": "read"}
    assert summary.lines()[0] == "2 utterances, 0.00 h in the 1 whose length is known"
    other, _ = run(path, tmp_path / "b.jsonl", text="raw", id="")
    assert [u.text for u in other] == ["multi\nline", "x"]
    assert [u.id for u in other] == ["b-00000000", "b-00000001"]
    assert other[0].extra["source_text"] == 'one, "two"'
    assert "there is no column 'nope', only ID, File" in error_of(path, tmp_path / "c.jsonl", text="nope")


def test_duration_after_a_start_makes_the_end(tmp_path: Path) -> None:
    write_sound(tmp_path / "long.wav", 1, 2.0)
    (tmp_path / "set.csv").write_text("audio,start,duration\nlong.wav,0.1,0.7\n")
    (utterance,), _ = run(tmp_path / "set.csv", tmp_path / "a.jsonl")
    assert (utterance.begin_time, utterance.end_time) == (0.1, 0.8)
    (tmp_path / "set.csv").write_text("audio,start,duration\nlong.wav,-1,2.0\n")
    (utterance,), _ = run(tmp_path / "set.csv", tmp_path / "b.jsonl")
    assert (utterance.begin_time, utterance.end_time) == (-1, -1), "-1 is no start"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "set.csv:1: the header must name every column once"),
        (b"path,path\na.wav,b.wav\n", "set.csv:1: the header must name every column once"),
        (b"path,text\na.wav\n", "set.csv:2: 1 cells, but the header has 2"),
        (b'path,text\na.wav,"x\ny"\na.wav,one,two\n', "set.csv:4: 3 cells, but the header has 2"),
        (b'path,text\na.wav,"one" two\n', "set.csv:2: not a table in UTF-8"),
        (b"path,text\na.wav,\xff\n", "not a table in UTF-8"),
        (b"words,text\na,b\n", "set.csv:2: no column of audio among words, text"),
        (b"path,text\n,x\n", "set.csv:2: no audio"),
        (b"path,text\nb.wav,x\n", "set.csv:2: audio file not found: b.wav"),
        (b"path,start\na.wav,soon\n", "set.csv:2: `start` must be seconds, found 'soon'"),
        (b"path,lang\na.wav,xx\n", "set.csv:2: unknown language 'xx'"),
        (b"path\na.wav\na.wav\n", "set.csv:3: id 'a.wav' occurs a second time"),
        (b"path,text\n", "no utterances to write"),
    ],
)
def test_bad_tables(tmp_path: Path, content: bytes, message: str) -> None:
    write_sound(tmp_path / "a.wav", 1)
    (tmp_path / "set.csv").write_bytes(content)
    assert message in error_of(tmp_path / "set.csv", tmp_path / "a.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "set.csv"], "nothing is left behind"


def test_nemo(tmp_path: Path) -> None:
    write_sound(tmp_path / "sounds" / "a.wav", 1, 2.0)
    lines = [
        {"audio_filepath": "sounds/a.wav", "text": "one", "duration": 0.5, "offset": 0.25, "lang": "en"},
        {"audio_filepath": str(tmp_path / "sounds" / "a.wav"), "duration": 2.0, "text": "all", "tags": {"x": 1}},
    ]
    (tmp_path / "train_manifest.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    utterances, summary = run(tmp_path / "train_manifest.json", tmp_path / "a.jsonl")
    assert_sounds_like(utterances[0], sound(1, 2.0)[4_000:12_000])
    assert_sounds_like(utterances[1], sound(1, 2.0))
    assert (utterances[1].begin_time, utterances[1].end_time) == (-1, -1)
    assert [u.extra for u in utterances] == [{"duration": 0.5}, {"duration": 2.0}]
    assert summary.seconds == 2.5
    assert summary.languages == {"en": 1, "none": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"audio_filepath": ["a.wav", "b.wav"]}', "set.json:1: `audio_filepath` must be one path"),
        ("[1]", "set.json:1: expected a JSON object"),
        ('{"audio_filepath": "a.wav", "text": 7}', "set.json:1: `text` must be a string, found 7"),
        ('{"audio_filepath": "a.wav", "duration": true}', "set.json:1: `duration` must be seconds"),
    ],
)
def test_bad_json_lines(tmp_path: Path, line: str, message: str) -> None:
    write_sound(tmp_path / "a.wav", 1)
    (tmp_path / "set.json").write_text(line)
    assert message in error_of(tmp_path / "set.json", tmp_path / "a.jsonl")


# -- All formats -------------------------------------------------------------------------------------------------------


def test_languages_can_be_kept_as_they_are(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav", 1)
    (tmp_path / "set.csv").write_text("path,language\na.wav,Klingon\n")
    (utterance,), _ = run(tmp_path / "set.csv", tmp_path / "a.jsonl", language_check="off")
    assert utterance.language == "Klingon"
    assert "language_check=off" in error_of(tmp_path / "set.csv", tmp_path / "b.jsonl")
    (utterance,), _ = run(tmp_path / "set.csv", tmp_path / "b.jsonl", language="de")
    assert (utterance.language, utterance.extra) == ("de", {"source_language": "Klingon"})
    with pytest.raises(ValueError, match="unknown language 'xx'"):
        parse_options({"language": "xx"})
    with pytest.raises(ValueError, match="language= and language_column= are both given"):
        parse_options({"language": "de", "language_column": "language"})


def test_manifest_is_replaced_only_when_asked_and_only_by_a_whole_one(tmp_path: Path) -> None:
    audio = [{"bytes": encoded(sound(i)), "path": None} for i in range(3)]
    audio.append({"bytes": b"broken", "path": None})
    datasets.Dataset.from_dict({"audio": audio}).save_to_disk(tmp_path / "set")
    (tmp_path / "a.jsonl").write_text("before")
    with pytest.raises(ValueError, match="exists already.*overwrite=true"):
        run(tmp_path / "set", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match="row 3: audio cannot be read"):
        run(tmp_path / "set", tmp_path / "a.jsonl", overwrite="true")
    assert (tmp_path / "a.jsonl").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a_audio", "set"]
    written = {path: path.stat().st_ino for path in (tmp_path / "a_audio").rglob("*.wav")}
    assert len(written) == 3
    utterances, _ = run(tmp_path / "set", tmp_path / "a.jsonl", overwrite="true", missing="skip")
    assert {Path(u.audio): os.stat(u.audio).st_ino for u in utterances} == written, "audio is not written again"


def test_what_is_no_data_set(tmp_path: Path) -> None:
    assert "there is nothing there" in error_of(tmp_path / "nowhere", tmp_path / "a.jsonl")
    (tmp_path / "empty").mkdir()
    assert "neither a .csv" in error_of(tmp_path / "empty", tmp_path / "a.jsonl")
    (tmp_path / "notes.txt").write_text("path\n")
    assert "neither a .csv" in error_of(tmp_path / "notes.txt", tmp_path / "a.jsonl")
    assert "ends in .csv or .tsv" in error_of(tmp_path / "notes.txt", tmp_path / "a.jsonl", format="table")
    (tmp_path / "set.csv").write_text("path\n")
    assert "only a Hugging Face data set" in error_of(tmp_path / "set.csv", tmp_path / "a.jsonl", split="train")
    assert "there is no folder" in error_of(tmp_path / "set.csv", tmp_path / "a.jsonl", audio_root="x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "source=... is missing"),
        (["source=x"], "out=... is missing"),
        (["source=x", "out=y", "speed=3"], "unknown argument 'speed=3'; there are source=..., out=..."),
        (["source=x", "out=y", "x"], "unknown argument 'x'"),
        (["source=x", "source=y", "out=y"], "source= is given twice"),
        (["source=x", "out=y", "format=wav"], "format=wav: must be one of auto, huggingface"),
        (["source=x", "out=y", "pipes=yes"], "pipes=yes: must be one of refuse, run"),
        (["source=x", "out=y", "overwrite=1"], "overwrite=1: must be one of false, true"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "python -m data.import_manifest source=PATH out=manifest.jsonl" in capsys.readouterr().out


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "data.import_manifest", *arguments]


def test_command_line(tmp_path: Path) -> None:
    make_dataset("WAV", "FLAC").save_to_disk(tmp_path / "set")
    arguments = command(f"source={tmp_path}/set", f"out={tmp_path}/a.jsonl", "language_column=lang_id")
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"manifest: {tmp_path}/a.jsonl",
        "2 utterances, 0.00 h",
        "languages: de 1, en 1",
        "skipped: none",
    ]
    assert done.stderr == "", "no progress bar where there is no terminal"
    assert len(read_manifest(tmp_path / "a.jsonl")) == 2
    again = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 1
    assert again.stderr.startswith("error: out=")
    assert again.stdout == ""


def test_interrupted_import_leaves_no_manifest(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav", 1)
    marker = tmp_path / "started"
    folder = write_kaldi(tmp_path / "data", wav_scp=f"u1 cat {tmp_path}/a.wav |\nu2 touch {marker}; exec sleep 60 |\n")
    process = subprocess.Popen(
        command(f"source={folder}", f"out={tmp_path}/a.jsonl", "pipes=run"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What is started in the background ignores this signal, and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marker.exists()
    os.killpg(process.pid, signal.SIGINT)  # as the terminal does it: the command, too
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "interrupted, no manifest is written" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.wav", "a_audio", "data", "started"]
    kept = [path for path in (tmp_path / "a_audio").rglob("*") if path.is_file()]
    assert len(kept) == 1
    assert_sounds_like(Utterance(id="u1", audio=str(kept[0])), sound(1))
