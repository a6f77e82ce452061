"""Batches: a bad file stops the run, or leaves silence in its row, as the policy says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers import WhisperFeatureExtractor

from data.audio import BadAudio
from data.collate import Collator
from opd.types import Utterance


@pytest.fixture
def utterances(tmp_path: Path) -> list[Utterance]:
    """Good, missing, too long for one second, good."""
    for name, num_samples in [("a", 8_000), ("long", 32_000), ("b", 4_000)]:
        soundfile.write(tmp_path / f"{name}.wav", np.full(num_samples, 0.25), 16_000)
    return [Utterance(id=name, audio=str(tmp_path / f"{name}.wav")) for name in ("a", "missing", "long", "b")]


def test_good_audio_in_order(utterances: list[Utterance]) -> None:
    waveforms, bad = Collator().collate([utterances[3], utterances[0]])
    assert [len(waveform) for waveform in waveforms] == [4_000, 8_000]
    assert bad == []


def test_stop_raises_the_first_bad_audio(utterances: list[Utterance]) -> None:
    with pytest.raises(BadAudio, match="'missing'"):
        Collator(max_seconds=1.0, on_bad_audio="stop").collate(utterances)


def test_skip_keeps_the_row_as_silence(utterances: list[Utterance]) -> None:
    waveforms, bad = Collator(max_seconds=1.0, on_bad_audio="skip").collate(utterances)
    assert [len(waveform) for waveform in waveforms] == [8_000, 8_000, 8_000, 4_000]
    assert all(waveform.dtype == np.float32 for waveform in waveforms)
    assert not waveforms[1].any()
    assert not waveforms[2].any()
    assert [error.utterance_id for error in bad] == ["missing", "long"]


def test_skip_does_not_hide_other_errors(utterances: list[Utterance], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object, **_options: object) -> np.ndarray:
        raise ZeroDivisionError("a fault of ours")

    monkeypatch.setattr("data.collate.load_audio", broken)
    with pytest.raises(ZeroDivisionError):
        Collator(on_bad_audio="skip").collate(utterances)


def test_unknown_policy() -> None:
    with pytest.raises(ValueError, match="on_bad_audio must be 'stop' or 'skip', not 'ignore'"):
        Collator(on_bad_audio="ignore")  # type: ignore[arg-type]


def test_silence_gives_finite_log_mel() -> None:
    """The placeholder is fed to models."""
    waveforms, _ = Collator(on_bad_audio="skip").collate([Utterance(id="missing", audio="/nowhere.wav")])
    extractor = WhisperFeatureExtractor(feature_size=128)
    mel = extractor(waveforms, sampling_rate=16_000, return_tensors="np", padding=False)["input_features"]
    assert mel.shape == (1, 128, 50)
    assert np.isfinite(mel).all()
