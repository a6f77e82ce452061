"""Audio for ARK-ASR: reading files, resampling, and Whisper's log-mel of many clips at once.

Shape suffixes: B clips, S samples, C channels, M mel bins, F mel frames, K taps of a filter, P its phases.
"""

from __future__ import annotations

import base64
import http.client
import io
import math
import os
import re
import urllib.request
import wave
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

DOWNLOAD_SECONDS = 60  # without an answer
MEL_FLOOR, MEL_RANGE = 1e-10, 8.0  # power floor; decades kept below a clip's own maximum
BLOCK_SAMPLES = 4_000_000  # samples per spectrogram call, which bounds its memory to some 100 MB
NUM_ZERO_CROSSINGS = 48  # of the resampling filter, on each side
KAISER_BETA = 9.0
PASS_BAND = 0.96  # of the smaller Nyquist frequency
MAX_RESAMPLING_WEIGHTS = 50_000_000


def load_waveform(
    source: Any, rate: int, own_rate: int, offset: float = 0.0, duration: float | None = None, where: str = "audio"
) -> np.ndarray:
    """Mono float32 samples at `rate` of mono floats at own_rate, or of anything `read_audio` takes.

    Raises ValueError for what is not there, cannot be read, or has another shape or type.
    """
    if isinstance(source, (str, os.PathLike, bytes, bytearray)):
        return read_audio(source, rate, offset, duration, where)
    if isinstance(own_rate, bool) or not isinstance(own_rate, (int, np.integer)) or own_rate < 1:
        raise ValueError(f"{where}: sampling_rate={own_rate!r} must be a whole number of Hz")
    samples = check_waveform(source, 0, where)
    return resample(samples[slice(*segment_bounds(len(samples), own_rate, offset, duration, where))], own_rate, rate)


def read_audio(
    source: str | os.PathLike | bytes | bytearray,
    rate: int,
    offset: float = 0.0,
    duration: float | None = None,
    where: str = "audio",
) -> np.ndarray:
    """Mono float32 samples at `rate` of an audio file, from `offset` seconds for `duration` seconds (None: the rest).

    source  a path, an http(s) address, or the file's bytes, which messages call `where`

    Any format through soundfile; PCM WAV by the standard library where soundfile is not installed. Channels are
    averaged. Raises ValueError for what is not there or cannot be read.
    """
    name, file = _locate(source, where)
    try:
        import soundfile
    except ImportError:
        samples_SC, own_rate = _read_wav(file, name, offset, duration)
    else:
        try:
            with soundfile.SoundFile(file) as sound:
                own_rate = sound.samplerate
                start, stop = segment_bounds(sound.frames, own_rate, offset, duration, name)
                sound.seek(start)
                samples_SC = sound.read(stop - start, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise ValueError(f"{name}: cannot be read as audio ({error}); convert it to WAV or FLAC") from error
    return resample(samples_SC.mean(axis=1), own_rate, rate)


def _locate(source: str | os.PathLike | bytes | bytearray, where: str) -> tuple[str, str | io.BytesIO]:
    """(name for messages, path or content) of a path, an http(s) address, or a file's bytes."""
    if isinstance(source, (bytes, bytearray)):
        return where, io.BytesIO(source)
    name = os.fspath(source).removeprefix("file://")
    if name.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(name, timeout=DOWNLOAD_SECONDS) as response:
                return name, io.BytesIO(response.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ValueError(f"{name}: cannot be downloaded ({error}); check the address, or give a file") from error
    if "://" in name:
        raise ValueError(f"{name}: only files and http(s) addresses are read; download it first")
    if not os.path.isfile(name):
        raise ValueError(f"{name}: no such audio file; check the path (working directory {os.getcwd()})")
    return name, name


def decode_base64(text: Any, where: str) -> bytes:
    """The bytes of an audio file in base64, with or without a `data:` head."""
    try:
        return base64.b64decode(re.sub(r"^data:[^,]*,|\s", "", text), validate=True)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{where}: base64 must be the text of an encoded audio file ({error}); encode it anew"
        ) from error


def _read_wav(source: str | io.BytesIO, name: str, offset: float, duration: float | None) -> tuple[np.ndarray, int]:
    """(float32 samples (S, C) in [-1, 1], rate) of a PCM WAV file of 8, 16, 24 or 32 bits."""
    try:
        with wave.open(source, "rb") as file:
            width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
            start, stop = segment_bounds(file.getnframes(), rate, offset, duration, name)
            file.setpos(start)
            data = np.frombuffer(file.readframes(stop - start), dtype=np.uint8)
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{name}: not a PCM WAV file ({error}); install soundfile to read other formats") from error
    if width == 1:  # the only unsigned one
        return ((data.astype(np.float32) - 128) / 128).reshape(-1, channels), rate
    widened = np.zeros((len(data) // width, 4), dtype=np.uint8)  # little-endian, moved to the top of 32 bits
    widened[:, 4 - width :] = data.reshape(-1, width)
    return (widened.view("<i4").astype(np.float32) / 2**31).reshape(-1, channels), rate


def segment_bounds(num_samples: int, rate: int, offset: float, duration: float | None, where: str) -> tuple[int, int]:
    """First sample of a segment and the one after its last. Raises ValueError for an empty file, and behind the end."""
    if num_samples == 0:
        raise ValueError(f"{where}: is empty: remove it")
    start = round(offset * rate)
    if start >= num_samples:
        raise ValueError(
            f"{where}: segment begins at {offset:g} s, but the audio has {num_samples / rate:.3f} s: correct the times"
        )
    stop = num_samples if duration is None else min(num_samples, start + round(duration * rate))
    return start, stop


def check_waveform(samples: Any, longer_than: int, where: str) -> np.ndarray:
    """Contiguous float32 (S,) of mono floats. Raises ValueError for another shape or type, too few samples, NaN."""
    array = np.asarray(samples)
    if array.ndim != 1 or array.dtype.kind != "f":
        raise ValueError(f"{where}: needs mono floats in [-1, 1], has shape {array.shape} of {array.dtype}; convert it")
    if len(array) <= longer_than:
        raise ValueError(
            f"{where}: {len(array)} samples are too few, a mel frame needs more than {longer_than}; leave this clip out"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: holds samples that are not finite; write the audio again")
    return np.ascontiguousarray(array, dtype=np.float32)


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Mono float32 samples at another rate: Kaiser-windowed sinc, ceil(S * new_rate / rate) samples, zero phase."""
    if rate == new_rate:
        return samples
    common = math.gcd(rate, new_rate)
    step, num_phases = rate // common, new_rate // common  # `step` samples in are `num_phases` samples out
    cutoff = min(1.0, new_rate / rate) * PASS_BAND
    half_width = math.ceil(NUM_ZERO_CROSSINGS / cutoff)
    if num_phases * (step + 2 * half_width) > MAX_RESAMPLING_WEIGHTS:
        raise ValueError(f"audio: {rate} Hz to {new_rate} Hz has no small common ratio; resample the file first")
    offsets_K = torch.arange(step + 2 * half_width, dtype=torch.float64) - half_width
    distances_KP = offsets_K[:, None] - torch.arange(num_phases, dtype=torch.float64) * step / num_phases
    inside_KP = (1 - (distances_KP / half_width) ** 2).clamp(min=0)
    window_KP = torch.special.i0(KAISER_BETA * inside_KP.sqrt()) / torch.special.i0(torch.tensor(KAISER_BETA))
    weights_KP = cutoff * torch.sinc(cutoff * distances_KP) * window_KP * (distances_KP.abs() < half_width)
    num_out = math.ceil(len(samples) * new_rate / rate)
    num_blocks = math.ceil(num_out / num_phases)
    tail = num_blocks * step + half_width - len(samples)
    padded = functional.pad(torch.from_numpy(np.ascontiguousarray(samples)), (half_width, max(0, tail)))
    frames = padded.unfold(0, len(offsets_K), step)[:num_blocks]
    return (frames @ weights_KP.float()).flatten()[:num_out].numpy()


def log_mel(clips: Sequence[np.ndarray], extractor: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-mel (B, M, F) float32, mask (B, F) bool) with the settings of a WhisperFeatureExtractor.

    Equals the extractor on each clip alone; frames beyond a clip's own length are 0.
    """
    frames_B = torch.tensor([len(clip) // extractor.hop_length for clip in clips])
    num_frames = int(frames_B.max())
    mel_BMF = torch.zeros(len(clips), extractor.feature_size, num_frames)
    for rows in _blocks([len(clip) for clip in clips]):
        block_BMF = _log_mel_block(clips[rows], frames_B[rows], extractor)
        mel_BMF[rows, :, : block_BMF.shape[2]] = block_BMF
    return mel_BMF, torch.arange(num_frames) < frames_B[:, None]


def _log_mel_block(clips: Sequence[np.ndarray], frames_B: torch.Tensor, extractor: Any) -> torch.Tensor:
    """log_mel of a few clips, laid end to end for one Fourier transform (a padded batch would transform padding)."""
    hop, edge = extractor.hop_length, extractor.n_fft // 2
    # Each clip is mirrored at its own ends and begins on a frame, so no frame that is kept sees another clip.
    starts = np.cumsum([0, *(-(-(len(clip) + 2 * edge) // hop) for clip in clips)])
    line_S = np.zeros(int(starts[-1]) * hop + extractor.n_fft, dtype=np.float32)
    for clip, start in zip(clips, starts[:-1], strict=True):
        line_S[start * hop : start * hop + len(clip) + 2 * edge] = np.pad(clip, edge, mode="reflect")
    spectrum = torch.stft(
        torch.from_numpy(line_S),
        extractor.n_fft,
        hop,
        window=torch.hann_window(extractor.n_fft),
        center=False,
        return_complex=True,
    )
    power = spectrum.real.square() + spectrum.imag.square()
    filters_MK = torch.as_tensor(np.asarray(extractor.mel_filters), dtype=torch.float32).T
    mel_MT = (filters_MK @ power).clamp(min=MEL_FLOOR).log10()
    offsets_F = torch.arange(int(frames_B.max()))
    padding_B1F = (offsets_F >= frames_B[:, None])[:, None]
    index_BF = torch.from_numpy(starts[:-1])[:, None] + torch.minimum(offsets_F, frames_B[:, None] - 1)
    mel_BMF = mel_MT[:, index_BF].transpose(0, 1)
    loudest_B11 = mel_BMF.amax((1, 2), keepdim=True)
    return ((torch.maximum(mel_BMF, loudest_B11 - MEL_RANGE) + 4.0) / 4.0).masked_fill(padding_B1F, 0.0)


def _blocks(lengths: list[int]) -> Iterator[slice]:
    """Runs of neighbouring clips of at most BLOCK_SAMPLES samples each; one clip at least."""
    start = 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or sum(lengths[start : end + 1]) > BLOCK_SAMPLES:
            yield slice(start, end)
            start = end
