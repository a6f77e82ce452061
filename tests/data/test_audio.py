"""Audio: real files, good and broken, written by the tests."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.audio import BadAudio, audio_seconds, load_audio
from opd.types import Utterance


def write_sine(path: Path, rate: int = 16_000, seconds: float = 1.0, hertz: float = 440.0, **options: str) -> str:
    samples = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)
    soundfile.write(path, samples, rate, **options)
    return str(path)


def utterance(audio: str | Path, begin_time: float = -1.0, end_time: float = -1.0) -> Utterance:
    return Utterance(id="u1", audio=str(audio), begin_time=begin_time, end_time=end_time)


def reason_of(bad: Utterance, **options: float) -> str:
    with pytest.raises(BadAudio) as error:
        load_audio(bad, **options)
    assert error.value.utterance_id == "u1"
    assert error.value.path == bad.audio
    assert "'u1'" in str(error.value)
    assert bad.audio in str(error.value)
    assert error.value.reason in str(error.value)
    return error.value.reason


def test_sixteen_khz_is_returned_unchanged(tmp_path: Path) -> None:
    written = np.random.default_rng(0).integers(-(2**15), 2**15, size=4_000).astype(np.int16)
    soundfile.write(tmp_path / "a.wav", written, 16_000)
    samples = load_audio(utterance(tmp_path / "a.wav"))
    assert samples.dtype == np.float32
    np.testing.assert_array_equal(samples * 2**15, written)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_frequency_length_and_level(tmp_path: Path, rate: int) -> None:
    samples = load_audio(utterance(write_sine(tmp_path / "a.wav", rate, 2.0, hertz=1_000)))
    assert abs(len(samples) - 32_000) <= 1
    middle = samples[8_000:24_000]
    spectrum = np.abs(np.fft.rfft(middle))  # one bin a hertz
    assert spectrum.argmax() == 1_000
    assert spectrum[1_000] ** 2 / (spectrum**2).sum() > 0.999
    assert np.abs(middle).max() == pytest.approx(0.5, abs=0.01)


def test_resampling_leaves_no_alias(tmp_path: Path) -> None:
    samples = load_audio(utterance(write_sine(tmp_path / "a.wav", 44_100, hertz=12_000)))
    assert np.abs(samples[1_000:-1_000]).max() < 1e-3, "12 kHz lies above the new Nyquist frequency"


def test_stereo_is_averaged(tmp_path: Path) -> None:
    left_right = np.stack([np.full(1_000, 0.5), np.full(1_000, -0.25)], axis=1)
    soundfile.write(tmp_path / "a.wav", left_right, 16_000)
    np.testing.assert_allclose(load_audio(utterance(tmp_path / "a.wav")), 0.125)


@pytest.mark.parametrize(
    ("begin", "end", "first", "last"),
    [
        (0.25, 0.75, 2_000, 6_000),
        (0.25, -1, 2_000, 8_000),
        (-1, 0.75, 0, 6_000),
        (0, 1.05, 0, 8_000),  # times are rounded in manifests
    ],
)
def test_segment(tmp_path: Path, begin: float, end: float, first: int, last: int) -> None:
    ramp = np.arange(8_000, dtype=np.int16)
    soundfile.write(tmp_path / "a.flac", ramp, 8_000)
    segment = utterance(tmp_path / "a.flac", begin, end)
    assert audio_seconds(segment) == (last - first) / 8_000
    samples = load_audio(segment, sampling_rate=8_000)
    np.testing.assert_array_equal(samples * 2**15, ramp[first:last])


@pytest.mark.parametrize(
    ("name", "options"), [("a.mp3", {}), ("a.ogg", {}), ("a.flac", {}), ("a.wav", {"subtype": "FLOAT"})]
)
def test_formats(tmp_path: Path, name: str, options: dict[str, str]) -> None:
    path = write_sine(tmp_path / name, 16_000, 1.0, **options)
    samples = load_audio(utterance(path))
    assert len(samples) == pytest.approx(16_000, abs=2_500), "lossy formats may pad"
    assert len(samples) == round(audio_seconds(utterance(path)) * 16_000)
    assert len(load_audio(utterance(path, 0.25, 0.75))) == 8_000


def test_missing_file(tmp_path: Path) -> None:
    assert "No such file" in reason_of(utterance(tmp_path / "nowhere.wav"))
    with pytest.raises(BadAudio, match="No such file"):
        audio_seconds(utterance(tmp_path / "nowhere.wav"))


def test_folder_text_and_raw_files_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read" in reason_of(utterance(tmp_path))
    (tmp_path / "a.wav").write_text("this is not sound")
    assert "cannot be read" in reason_of(utterance(tmp_path / "a.wav"))
    (tmp_path / "a.raw").write_bytes(bytes(2_000))
    assert "cannot be read" in reason_of(utterance(tmp_path / "a.raw"))


def test_empty_files(tmp_path: Path) -> None:
    (tmp_path / "a.wav").touch()
    assert "is empty" in reason_of(utterance(tmp_path / "a.wav"))
    soundfile.write(tmp_path / "b.wav", np.empty(0), 16_000)
    assert "is empty" in reason_of(utterance(tmp_path / "b.wav"))


def test_file_cut_short(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).normal(scale=0.1, size=32_000)
    soundfile.write(tmp_path / "a.flac", noise, 16_000)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[: len(whole) // 2])
    assert reason_of(utterance(tmp_path / "a.flac"))


def test_segment_outside_the_file(tmp_path: Path) -> None:
    path = write_sine(tmp_path / "a.wav")
    assert "begins at 1 s, but the file has 1.000 s" in reason_of(utterance(path, begin_time=1.0))
    assert "ends at 2 s, but the file has 1.000 s" in reason_of(utterance(path, end_time=2.0))
    with pytest.raises(BadAudio, match="begins at 5 s"):
        audio_seconds(utterance(path, begin_time=5.0))


@pytest.mark.parametrize(("rate", "num_samples"), [(16_000, 200), (8_000, 100), (48_000, 600)])
def test_too_short_for_one_mel_frame(tmp_path: Path, rate: int, num_samples: int) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(num_samples), rate)
    assert "is too short (0.0125 s" in reason_of(utterance(tmp_path / "a.wav"))
    soundfile.write(tmp_path / "a.wav", np.zeros(num_samples + rate // 8_000), rate)
    assert len(load_audio(utterance(tmp_path / "a.wav"))) > 200


def test_too_long(tmp_path: Path) -> None:
    path = write_sine(tmp_path / "a.wav", seconds=2.0)
    assert "is too long (2.00 s, at most 1.5 s)" in reason_of(utterance(path), max_seconds=1.5)
    assert len(load_audio(utterance(path), max_seconds=2.0)) == 32_000
    assert len(load_audio(utterance(path, 0.5, 1.5), max_seconds=1.5)) == 16_000, "the segment counts, not the file"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(tmp_path: Path, value: float) -> None:
    samples = np.zeros(1_000, dtype=np.float32)
    samples[500] = value
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    assert "not finite" in reason_of(utterance(tmp_path / "a.wav"))


def test_bad_audio_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadAudio("u1", "a.wav", "is empty")))
    assert (error.utterance_id, error.path, error.reason) == ("u1", "a.wav", "is empty")
    assert isinstance(error, ValueError)
