"""Digit strings of recordings: what is joined, who is in which set, and what is refused. Stand-ins speak and hum."""

from __future__ import annotations

import dataclasses
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data import recordings
from data.audio import audio_info, load_audio
from data.espeak import synthesise
from data.manifest import read_manifest
from data.recordings import RECORDING_SETS, RecordingSet, build_digit_strings, ensure_recordings
from data.synthetic import DIGITS
from opd.config import load_config
from opd.resolve import resolve, resolve_manifests

TINY = {
    "labelled": RecordingSet("training", 12, seed=1, augmented=True),
    "few_labels": RecordingSet("few", 8, seed=2, augmented=True),
    "unlabelled": RecordingSet("training", 8, seed=3, augmented=True, with_text=False),
    "seen_speakers": RecordingSet("evaluation", 8, seed=4),
    "held_out_speakers": RecordingSet("held_out", 8, seed=5),
}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three voices, three recordings of each digit, 8 kHz, as the Free Spoken Digit Dataset has them; and a README."""
    pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed: pip install '.[speech]'")
    folder = tmp_path_factory.mktemp("spoken") / "recordings"
    folder.mkdir()
    (folder / "README.md").write_text("by nobody")
    for speaker, variant in (("anna", "f1"), ("bert", "m1"), ("van_dyk", "m3")):
        for digit, word in enumerate(DIGITS):
            for take in range(3):
                samples = synthesise(word, f"en-us+{variant}", 160 + 20 * take, 50)[0]
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", samples[::2], 8_000)
    return folder


def hum(
    folder: Path, hertz: Callable[[int, int], float], speakers: tuple[str, ...] = ("a", "b"), takes: int = 3
) -> Path:
    """Recordings that are a tone of `hertz(digit, take)`, 0.2 s, so that they can be told apart in a string."""
    folder.mkdir(parents=True)
    times = np.arange(1_600) / 8_000
    for speaker in speakers:
        for digit in range(10):
            for take in range(takes):
                tone = 0.3 * np.sin(2 * np.pi * hertz(digit, take) * times)
                soundfile.write(folder / f"{digit}_{speaker}_{take}.wav", tone, 8_000)
    return folder


def tones(samples: np.ndarray) -> list[float]:
    """Hertz of each hum, in order; hums are parted by 50 ms of next to nothing."""
    frames = samples[: len(samples) // 160 * 160].reshape(-1, 160)
    loud = np.sqrt((frames**2).mean(axis=1)) > 0.2 * np.abs(samples).max()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loud.astype(int), [0]])))
    parts = [frames[start:end].ravel() for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return [np.abs(np.fft.rfft(part, 16_000)).argmax() for part in parts]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sets_are_complete_and_readable(spoken: Path, tmp_path: Path) -> None:
    manifests = build_digit_strings(spoken, tmp_path, ["bert"], sets=TINY)
    assert manifests == {name: tmp_path / f"{name}.jsonl" for name in TINY}
    for name, path in manifests.items():
        utterances = read_manifest(path, require_text=name != "unlabelled")
        assert [u.id for u in utterances] == [f"{name}-{i:05d}" for i in range(TINY[name].num_utterances)]
        for utterance in utterances:
            assert audio_info(utterance)[1:] == (16_000, 1)
            assert len(load_audio(utterance)) / 16_000 == pytest.approx(utterance.extra["duration"], abs=1e-3)
            assert 0.005 < np.abs(load_audio(utterance)).max() < 1.0
            assert (utterance.text is None) == (name == "unlabelled")
            if utterance.text is not None:
                assert 2 <= len(utterance.text.split()) <= 5
                assert set(utterance.text.split()) <= set(DIGITS)
        speakers = {utterance.extra["speaker"] for utterance in utterances}
        assert speakers == ({"bert"} if name == "held_out_speakers" else {"anna", "van_dyk"}), name


def test_text_says_what_is_joined_in_order(tmp_path: Path) -> None:
    source = hum(tmp_path / "hum", lambda digit, _take: 400 + 300 * digit)
    manifest = build_digit_strings(source, tmp_path, ["b"], sets=TINY)["held_out_speakers"]
    for utterance in read_manifest(manifest):
        digits = [round((hertz - 400) / 300) for hertz in tones(load_audio(utterance))]
        assert " ".join(DIGITS[digit] for digit in digits) == utterance.text
        gaps = utterance.extra["duration"] - 0.2 * len(digits)
        assert 0.05 * (len(digits) + 1) - 0.01 <= gaps <= 0.3 * (len(digits) + 1)


def test_no_recording_is_in_training_and_in_evaluation(tmp_path: Path) -> None:
    """Each take hums a tone of its own. The first is for evaluation, the second for few labels and training."""
    source = hum(tmp_path / "hum", lambda _digit, take: 1_000 + 1_000 * take)
    manifests = build_digit_strings(source, tmp_path, ["b"], sets=TINY)
    heard = {
        name: {round(hertz / 1_000) - 1 for u in read_manifest(path) for hertz in tones(load_audio(u))}
        for name, path in manifests.items()
    }
    assert heard == {
        "labelled": {1, 2},
        "few_labels": {1},
        "unlabelled": {1, 2},
        "seen_speakers": {0},
        "held_out_speakers": {0, 1, 2},
    }


def test_shares_of_fifty_recordings(tmp_path: Path) -> None:
    """The sizes of the Free Spoken Digit Dataset: 5 of 50 evaluate, 9 of the other 45 are those of few labels."""
    source = hum(tmp_path / "hum", lambda _digit, take: 400 + 60 * take, takes=50)
    sets = {name: RecordingSet(TINY[name].pool, 60, seed=1) for name in TINY}
    manifests = build_digit_strings(source, tmp_path, ["b"], sets=sets)
    heard = {
        name: {round((hertz - 400) / 60) for u in read_manifest(path) for hertz in tones(load_audio(u))}
        for name, path in manifests.items()
    }
    assert heard["seen_speakers"] == set(range(5))
    assert heard["few_labels"] == set(range(5, 14))
    assert min(heard["labelled"]) == 5
    assert len(heard["labelled"]) > 35


def test_augmentation_changes_speed_and_noise_of_training_sets_only(tmp_path: Path) -> None:
    source = hum(tmp_path / "hum", lambda _digit, _take: 2_000)
    manifests = build_digit_strings(source, tmp_path, ["b"], sets=TINY)
    heard = {
        name: [hertz for u in read_manifest(path) for hertz in tones(load_audio(u))] for name, path in manifests.items()
    }
    for name, hertz in heard.items():
        if TINY[name].augmented:
            assert 1_790 <= min(hertz) < 1_900 < 2_100 < max(hertz) <= 2_210
        else:
            assert all(abs(h - 2_000) <= 5 for h in hertz)
    # The first 50 ms are a gap: noise alone.
    floors = {
        name: [np.std(load_audio(u)[:800]) / np.std(load_audio(u)) for u in read_manifest(path)]
        for name, path in manifests.items()
    }
    assert max(floors["seen_speakers"]) < 0.015 < max(floors["labelled"]) < 0.5


def test_levels_vary(spoken: Path, tmp_path: Path) -> None:
    manifest = build_digit_strings(spoken, tmp_path, ["bert"], sets=TINY)["labelled"]
    levels = [20 * np.log10(np.std(load_audio(u))) for u in read_manifest(manifest)]
    assert -36 < min(levels) < -28 < -22 < max(levels) < -14


def test_same_arguments_give_the_same_bytes_from_folder_and_tar(spoken: Path, tmp_path: Path) -> None:
    archive = tmp_path / "recordings.tar"
    with tarfile.open(archive, "w") as file:
        file.add(spoken, "deep/recordings")
    folders = [tmp_path / name for name in "abc"]
    for source, folder in zip((spoken, spoken, archive), folders, strict=True):
        build_digit_strings(source, folder, ["bert"], sets=TINY)
    first, again, from_tar = (contents(folder) for folder in folders)
    assert len(first) == 44 + 5
    assert first == again == from_tar


@pytest.fixture
def tiny_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and the table of sets in small."""
    monkeypatch.setattr(recordings, "RECORDING_SETS", TINY)
    monkeypatch.setenv("OPD_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_sets_are_made_once_for_what_they_are_made_of(spoken: Path, tiny_home: Path, tmp_path: Path) -> None:
    manifests = ensure_recordings(spoken, ["bert"])
    folder = manifests["labelled"].parent
    assert folder.is_relative_to(tiny_home)
    assert set(manifests) == set(TINY)
    assert (folder / "COMPLETE").is_file()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    copy = tmp_path / "copy"
    shutil.copytree(spoken, copy)
    assert ensure_recordings(copy, ["bert"]) == manifests, "the recordings count, not where they are"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    other_speaker = ensure_recordings(copy, ["anna"])
    shutil.copy(copy / "1_anna_0.wav", copy / "1_anna_1.wav")
    other_content = ensure_recordings(copy, ["bert"])
    assert len({m["labelled"] for m in (manifests, other_speaker, other_content)}) == 3


def test_names_of_recipes_are_resolved(spoken: Path, tiny_home: Path) -> None:
    resolved = resolve_manifests(
        ["recordings:labelled", "dev.jsonl"], recordings=str(spoken), held_out_speakers=["bert"]
    )
    assert resolved["dev.jsonl"] == "dev.jsonl"
    assert len(read_manifest(resolved["recordings:labelled"], require_text=True)) == 12
    assert resolved["recordings:labelled"].startswith(str(tiny_home))
    with pytest.raises(ValueError, match="recordings:x: there is no such set of recordings; there are labelled, few"):
        resolve_manifests(["recordings:x"], recordings=str(spoken), held_out_speakers=["bert"])
    with pytest.raises(ValueError, match="recordings:labelled: set data.recordings to the folder or tar file"):
        resolve_manifests(["recordings:labelled"])
    with pytest.raises(
        ValueError, match=r"data.recordings=.* data.held_out_speakers=\[\]: .*hold out some of anna, bert"
    ):
        resolve_manifests(["recordings:labelled"], recordings=str(spoken))


def test_a_recipe_names_the_recordings(spoken: Path, tiny_home: Path) -> None:
    config = load_config(
        [
            "recipe=tiny",
            "data.train_manifest=recordings:unlabelled",
            "data.eval_manifests.seen_voices=recordings:seen_speakers",
            "data.eval_manifests.unseen_voices=recordings:held_out_speakers",
            f"data.recordings={spoken}",
            "data.held_out_speakers=[bert,anna]",
        ]
    )
    data = resolve(config).data
    unlabelled = read_manifest(data.train_manifest)
    assert {u.extra["speaker"] for u in unlabelled} == {"van_dyk"}
    assert not any(u.text for u in unlabelled)
    speakers = {name: {u.extra["speaker"] for u in read_manifest(path)} for name, path in data.eval_manifests.items()}
    assert speakers == {"seen_voices": {"van_dyk"}, "unseen_voices": {"anna", "bert"}}
    with pytest.raises(ValueError, match=r"data.held_out_speakers=\[nobody\]: held-out speakers nobody: not in"):
        resolve(dataclasses.replace(config, data=dataclasses.replace(config.data, held_out_speakers=["nobody"])))


def _without_digit(folder: Path) -> None:
    for path in folder.glob("7_van_dyk_*.wav"):
        path.unlink()


def _single_take(folder: Path) -> None:
    for path in [*folder.glob("3_anna_1.wav"), *folder.glob("3_anna_2.wav")]:
        path.unlink()


def _one_speaker(folder: Path) -> None:
    for path in [*folder.glob("*_bert_*.wav"), *folder.glob("*_van_dyk_*.wav")]:
        path.unlink()


def _nothing(folder: Path) -> None:
    for path in folder.glob("*.wav"):
        path.rename(path.with_name(f"x{path.name}"))


def _not_audio(folder: Path) -> None:
    (folder / "4_anna_1.wav").write_bytes(b"nothing to hear")


def _twice(folder: Path) -> None:
    (folder / "more").mkdir()
    shutil.copy(folder / "4_anna_1.wav", folder / "more" / "4_anna_01.wav")


@pytest.mark.parametrize(
    ("spoil", "held_out", "message"),
    [
        (_nothing, ["bert"], r"there are none; their files are named \{digit\}_\{speaker\}_\{index\}.wav"),
        (None, ["bart"], "held-out speakers bart: not in .*, which has anna, bert, van_dyk"),
        (None, [], "hold out some of anna, bert, van_dyk, but not all"),
        (None, ["anna", "bert", "van_dyk"], "hold out some of anna, bert, van_dyk, but not all"),
        (_one_speaker, ["anna"], "all are of anna: at least two speakers are needed"),
        (_without_digit, ["bert"], "speaker van_dyk has fewer than 2 of digit 7"),
        (_without_digit, ["van_dyk"], "speaker van_dyk has fewer than 1 of digit 7"),
        (_single_take, ["bert"], "speaker anna has fewer than 2 of digit 3"),
        (_not_audio, ["bert"], "4_anna_1.wav cannot be read .*: fetch it again"),
        (_twice, ["bert"], r"4_anna_1.wav and more/4_anna_01.wav are the same one: remove one"),
    ],
)
def test_what_cannot_be_built_is_refused(
    spoken: Path,
    tiny_home: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None] | None,
    held_out: list[str],
    message: str,
) -> None:
    source = tmp_path / "spoilt"
    shutil.copytree(spoken, source)
    if spoil is not None:
        spoil(source)
    with pytest.raises(ValueError, match=message) as error:
        ensure_recordings(source, held_out)
    assert "\n" not in str(error.value)
    assert not list(tiny_home.rglob("*.jsonl"))


def test_a_source_that_is_neither_folder_nor_tar(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"missing.tar: cannot be read \(No such file or directory\)"):
        ensure_recordings(tmp_path / "missing.tar", ["a"], tmp_path)
    (tmp_path / "notes.txt").write_text("no archive")
    with pytest.raises(ValueError, match=r"notes.txt: cannot be read \(.*\): give a folder or a tar file"):
        ensure_recordings(tmp_path / "notes.txt", ["a"], tmp_path)


def test_table_of_sets() -> None:
    pools = {name: (s.pool, s.with_text, s.augmented) for name, s in RECORDING_SETS.items()}
    assert pools == {name: (s.pool, s.with_text, s.augmented) for name, s in TINY.items()}
    assert len({s.seed for s in RECORDING_SETS.values()}) == len(RECORDING_SETS)
    assert all(re.fullmatch("[a-z_]+", name) for name in RECORDING_SETS)
