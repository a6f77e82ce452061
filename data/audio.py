"""Audio files to float32 samples at 16 kHz, with every way a file can be bad turned into one BadAudio error."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from data.sound import open_sound, shown
from opd.types import Utterance

SAMPLING_RATE = 16_000
# A mel frame is a window of 400 samples (25 ms) around its centre with the signal mirrored at both ends, and 200
# samples or fewer cannot be mirrored that far.
MIN_SECONDS = 200 / SAMPLING_RATE
# How far an `end_time` may lie behind the file's end: times in manifests are rounded.
END_TOLERANCE_SECONDS = 0.1
# TypeError is how soundfile asks for the format of a file that ends in .raw.
_READ_ERRORS = (soundfile.SoundFileError, OSError, ValueError, TypeError)


class BadAudio(ValueError):
    """The audio of one utterance cannot be used. Has `utterance_id`, `path`, `reason` and `kind`; survives pickling.

    kind    missing_file, unreadable_audio, empty_audio, cut_short, outside_file, too_short, too_long or not_finite
    """

    def __init__(self, utterance_id: str, path: str, reason: str, kind: str = "unreadable_audio") -> None:
        super().__init__(utterance_id, path, reason, kind)
        self.utterance_id = utterance_id
        self.path = path
        self.reason = reason
        self.kind = kind

    def __str__(self) -> str:
        return f"audio of utterance {self.utterance_id!r} ({self.path}) {self.reason}"


def load_audio(
    utterance: Utterance, *, max_seconds: float | None = None, sampling_rate: int = SAMPLING_RATE
) -> np.ndarray:
    """Read the utterance's segment of its file as mono float32 [samples] at `sampling_rate` Hz; channels are averaged.

    Raises BadAudio for a file that is missing, unreadable or empty, a segment outside the file, one that is too short
    for a mel frame (12.5 ms) or longer than `max_seconds`, and samples that are not finite. Nothing is cut or repaired.
    """
    samples_SC, file_rate = _read_segment(utterance, max_seconds)
    samples = samples_SC[:, 0] if samples_SC.shape[1] == 1 else samples_SC.mean(axis=1)
    if not np.isfinite(samples).all():
        raise _bad(utterance, "holds samples that are not finite: write the file again", "not_finite")
    if file_rate != sampling_rate:
        samples = soxr.resample(samples, file_rate, sampling_rate, quality="HQ")
    if len(samples) <= MIN_SECONDS * sampling_rate:
        reason = f"is too short ({len(samples) / sampling_rate:.4f} s, needs more than {MIN_SECONDS} s): remove it"
        raise _bad(utterance, reason, "too_short")
    return np.ascontiguousarray(samples, dtype=np.float32)


class AudioInfo(NamedTuple):
    """seconds: length of the utterance's segment; sampling_rate (Hz) and channels: of its file."""

    seconds: float
    sampling_rate: int
    channels: int


def audio_seconds(utterance: Utterance) -> float:
    """Length of the utterance's segment in seconds, from the file's header alone. Raises BadAudio."""
    return audio_info(utterance).seconds


def audio_info(utterance: Utterance) -> AudioInfo:
    """What the file's header alone says. Raises BadAudio."""
    try:
        with soundfile.SoundFile(open_sound(utterance.audio)) as file:
            first, last = _bounds(utterance, file)
            return AudioInfo((last - first) / file.samplerate, file.samplerate, file.channels)
    except _READ_ERRORS as error:
        raise _as_bad(utterance, error) from error


def _read_segment(utterance: Utterance, max_seconds: float | None) -> tuple[np.ndarray, int]:
    """(float32 [samples, channels] at the file's own rate, that rate)."""
    try:
        with soundfile.SoundFile(open_sound(utterance.audio)) as file:
            first, last = _bounds(utterance, file)
            seconds = (last - first) / file.samplerate
            if max_seconds is not None and seconds > max_seconds:  # asked of the header, before an hour is decoded
                reason = f"is too long ({seconds:.2f} s, at most {max_seconds:g} s): split or remove it"
                raise _bad(utterance, reason, "too_long")
            if first > 0:
                file.seek(first)
            samples_SC = file.read(last - first, dtype="float32", always_2d=True)
            if len(samples_SC) < last - first:
                reason = f"is cut short: {len(samples_SC)} of {last - first} samples: fetch it again"
                raise _bad(utterance, reason, "cut_short")
            return samples_SC, file.samplerate
    except _READ_ERRORS as error:
        raise _as_bad(utterance, error) from error


def _bounds(utterance: Utterance, file: soundfile.SoundFile) -> tuple[int, int]:
    """First sample of the segment and the one after its last."""
    seconds = file.frames / file.samplerate
    if file.frames == 0:
        raise _bad(utterance, "is empty: remove it", "empty_audio")
    remedy = f"but the file has {seconds:.3f} s: correct the times"
    if utterance.begin_time >= seconds:
        raise _bad(utterance, f"begins at {utterance.begin_time:g} s, {remedy}", "outside_file")
    if utterance.end_time > seconds + END_TOLERANCE_SECONDS:
        raise _bad(utterance, f"ends at {utterance.end_time:g} s, {remedy}", "outside_file")
    first = 0 if utterance.begin_time < 0 else round(utterance.begin_time * file.samplerate)
    last = file.frames if utterance.end_time < 0 else round(utterance.end_time * file.samplerate)
    return first, max(first, min(last, file.frames))


def _bad(utterance: Utterance, reason: str, kind: str = "unreadable_audio") -> BadAudio:
    return BadAudio(utterance.id, shown(utterance.audio), reason, kind)


def _as_bad(utterance: Utterance, error: Exception) -> BadAudio:
    if isinstance(error, BadAudio):
        return error
    reason, kind = str(error), "unreadable_audio"
    try:
        sound = open_sound(utterance.audio)
        with open(sound, "rb") if isinstance(sound, str) else sound as file:
            if not file.read(1):  # libsndfile says "System error." for a file that is not there
                return _bad(utterance, "is empty: remove it", "empty_audio")
    except (OSError, ValueError) as open_error:
        reason = getattr(open_error, "strerror", None) or str(open_error)
        kind = "missing_file" if isinstance(open_error, FileNotFoundError) else kind
    return _bad(utterance, f"cannot be read ({reason}): check the path and the file", kind)
