"""Synthetic speech: reproducible sets, disjoint voices, and a build that survives being interrupted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from data import synthetic
from data.audio import audio_seconds, load_audio
from data.espeak import check_installed, variants
from data.manifest import read_manifest
from data.synthetic import DIGITS, TRAINING_VOICES, UNSEEN_VOICES, DigitSet, Voice, build_sets, make_set, synthesise

pytest.importorskip("espeakng_loader", reason="espeakng-loader is not installed: pip install '.[speech]'")

TINY = {
    "labelled": DigitSet(seed=1, num_utterances=4, num_short=2),
    "unlabelled": DigitSet(seed=2, num_utterances=4, with_text=False),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_voices_exist_and_unseen_ones_are_new() -> None:
    training, unseen = ({voice.variant for voice in voices} for voices in (TRAINING_VOICES, UNSEEN_VOICES))
    assert not training & unseen
    assert training | unseen <= variants()
    assert len({voice.name for voice in TRAINING_VOICES}) == len(TRAINING_VOICES) >= 30
    assert len({voice.name for voice in UNSEEN_VOICES}) == len(UNSEEN_VOICES) == 10
    assert len(synthetic.FEW_LABEL_VOICES) == 10
    assert set(synthetic.FEW_LABEL_VOICES) <= set(TRAINING_VOICES)


def test_sets_differ_in_seed_and_only_one_has_unseen_voices() -> None:
    assert len({digit_set.seed for digit_set in synthetic.SETS.values()}) == len(synthetic.SETS)
    for name, digit_set in synthetic.SETS.items():
        assert (digit_set.voices == UNSEEN_VOICES) == (name == "unseen_voices")
        assert digit_set.with_text == (name != "unlabelled")


def test_speech_follows_text_rate_and_pitch() -> None:
    short, rate = synthesise("one", "en-us+m1", 150, 50)
    long, _ = synthesise("one two three four", "en-us+m1", 150, 50)
    fast, _ = synthesise("one two three four", "en-us+m1", 300, 50)
    assert rate == 16_000
    assert long.dtype == np.float32
    assert len(short) < len(fast) < len(long)
    assert 0.05 < np.abs(long).max() < 1.1
    deep, shrill = (fundamental(synthesise("zero", "en-us+m2", 150, pitch)[0]) for pitch in (5, 95))
    assert 50 < 1.3 * deep < shrill < 400


def fundamental(samples: np.ndarray) -> float:
    """Hertz: the highest peak of the autocorrelation around the middle of the loud part."""
    loud = np.flatnonzero(np.abs(samples) > 0.3 * np.abs(samples).max())
    part = samples[loud[len(loud) // 2] - 500 :][:1_000]
    correlation = np.correlate(part, part, mode="full")[len(part) :]
    return 16_000 / (40 + correlation[40:300].argmax() + 1)


@pytest.mark.parametrize(
    ("voice", "rate", "pitch", "message"),
    [
        ("en-us+nosuch", 150, 50, "unknown voice variant 'nosuch' in 'en-us\\+nosuch': known are .*m7"),
        ("zz+m1", 150, 50, "eSpeak NG has no voice 'zz\\+m1'"),
        ("en-us", 20, 50, "speaking rate 20 is outside 80..450"),
        ("en-us", 150, 101, "pitch 101 is outside 0..100"),
    ],
)
def test_bad_requests_are_refused(voice: str, rate: int, pitch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthesise("one", voice, rate, pitch)


def test_unknown_variant_is_refused_before_a_set_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown voice variants nosuch"):
        make_set(tmp_path, "x", 3, seed=1, voices=(Voice("x", "nosuch"),))
    assert not any(tmp_path.iterdir())


def test_set_is_complete_and_readable(tmp_path: Path) -> None:
    manifest = make_set(tmp_path, "tiny", 8, seed=5, num_short=4, voices=UNSEEN_VOICES)
    utterances = read_manifest(manifest, require_text=True)
    assert [utterance.id for utterance in utterances] == [f"tiny-{i:05d}" for i in range(12)]
    names = {voice.name for voice in UNSEEN_VOICES}
    for index, utterance in enumerate(utterances):
        assert utterance.text is not None
        words = utterance.text.split()
        assert set(words) <= set(DIGITS)
        assert (2 if index < 8 else 1) <= len(words) <= (5 if index < 8 else 2)
        assert utterance.language == "English"
        assert utterance.extra["voice"] in names
        assert utterance.extra["duration"] == pytest.approx(audio_seconds(utterance), abs=1e-3)
        samples = load_audio(utterance)
        assert 0.01 < np.abs(samples).max() <= 0.99
    fields = json.loads(manifest.read_text().splitlines()[0])
    assert fields["audio"] == "tiny/tiny-00000.wav"


def test_unlabelled_set_has_no_text(tmp_path: Path) -> None:
    manifest = make_set(tmp_path, "tiny", 5, seed=5, with_text=False)
    assert all("text" not in json.loads(line) for line in manifest.read_text().splitlines())
    assert all(utterance.text is None for utterance in read_manifest(manifest))


def test_two_fresh_runs_give_the_same_bytes(tmp_path: Path) -> None:
    # All voices, because some of them draw random breath noise in eSpeak.
    for run in ("a", "b"):
        make_set(tmp_path / run, "tiny", 40, seed=5)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    make_set(tmp_path / "c", "tiny", 4, seed=6)
    assert contents(tmp_path / "a")["tiny/tiny-00000.wav"] != contents(tmp_path / "c")["tiny/tiny-00000.wav"]


def test_sets_are_built_once_and_redone_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "speech" / "tiny"
    real_make_set = make_set

    def interrupted(out_dir: Path, name: str, *args: object, **options: object) -> Path:
        if name == "unlabelled":
            raise KeyboardInterrupt
        return real_make_set(out_dir, name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(synthetic, "make_set", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_sets(target, TINY)
    assert not target.exists(), "an interrupted build is not taken for a complete one"

    monkeypatch.setattr(synthetic, "make_set", real_make_set)
    leftover = tmp_path / "speech" / "tiny.partial-killed"  # what a killed build leaves
    leftover.mkdir()
    (target / "labelled").mkdir(parents=True)  # and a folder without the marker
    build_sets(target, TINY)
    built = contents(target)
    assert sorted(path.name for path in (tmp_path / "speech").iterdir()) == ["tiny", "tiny.lock"]
    assert len(built) == 10 + 2 + 1

    monkeypatch.setattr(synthetic, "make_set", interrupted)
    build_sets(target, TINY)  # makes nothing
    assert contents(target) == built


def test_two_builders_at_once_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(synthetic, "make_set", lambda out_dir, name, **_options: calls.append(name))
    threads = [threading.Thread(target=build_sets, args=(tmp_path / "tiny", TINY)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["labelled", "unlabelled"]


def test_home_is_taken_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "SETS", TINY)
    monkeypatch.setenv("OPD_HOME", os.path.relpath(tmp_path))
    manifests = synthetic.ensure_digits()
    assert manifests == {name: tmp_path / "speech" / "digits-v1" / f"{name}.jsonl" for name in TINY}
    assert len(read_manifest(manifests["labelled"])) == 6
    assert synthetic.ensure_digits(tmp_path) == manifests


def test_missing_package_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"needs the optional package espeakng-loader: run pip install '\.\[speech\]'"):
        check_installed()
    with pytest.raises(ValueError, match="espeakng-loader"):
        build_sets(tmp_path / "speech" / "tiny", TINY)
    assert not any(tmp_path.iterdir())


def test_shard_process_starts_without_torch() -> None:
    """Forty of them are started for a build, and torch would cost each two seconds."""
    code = "import sys, data.synthetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(synthetic.__file__).parent.parent).returncode == 0
