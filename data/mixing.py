"""Noise, level, trimming and writing of audio that is put together here: [samples] at 16 kHz, RMS and peak as floats."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.espeak import SAMPLING_RATE


def make_noise(num_samples: int, babble: Sequence[np.ndarray], generator: np.random.Generator) -> np.ndarray:
    """float [num_samples] of RMS 1: white, pink (power falls with 1 / frequency) or babble (six voices at once).

    `babble` are at least six voices to draw from; where it is empty there is no babble.
    """
    kind = generator.integers(3 if babble else 2)
    if kind == 2:
        chosen = generator.choice(len(babble), size=6, replace=False)
        starts = generator.integers(SAMPLING_RATE, size=6)
        positions = np.arange(num_samples)
        noise = sum(np.take(babble[i], positions + start, mode="wrap") for i, start in zip(chosen, starts, strict=True))
        return noise / rms(noise)
    if kind == 0:
        noise = generator.standard_normal(num_samples)
    else:
        # Of a power of two in length, since an FFT of a large prime length takes ten times as long.
        spectrum = np.fft.rfft(generator.standard_normal(1 << num_samples.bit_length()))
        noise = np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1)))[:num_samples]
    return noise / rms(noise)


def mix(speech: np.ndarray, noise: np.ndarray, snr: float, level: float) -> np.ndarray:
    """float32 [samples] of speech and noise, both of RMS 1, `snr` dB apart and `level` dB below full scale."""
    mixed = (speech + noise * 10 ** (-snr / 20)) * 10 ** (level / 20)
    return (mixed * min(1.0, 0.99 / np.abs(mixed).max())).astype(np.float32)  # turned down rather than clipped


def trim(samples: np.ndarray) -> np.ndarray:
    """Without the silence at both ends (below a hundredth of the peak)."""
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    return samples[loud[0] : loud[-1] + 1]


def rms(samples: np.ndarray) -> float:
    """Root mean square of [samples], in their unit (1 is full scale); never 0, so that one may divide by it."""
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64)))) + 1e-12


def write_wav(path: str | Path, samples: np.ndarray) -> None:
    """16-bit mono; by the standard library, which takes half of libsndfile's time for small files."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, SAMPLING_RATE, len(samples), "NONE", "not compressed"))
        file.writeframes(np.round(samples * 32767).astype("<i2").tobytes())
