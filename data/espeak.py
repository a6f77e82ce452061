"""eSpeak NG through ctypes, from the optional package `espeakng-loader` (GPLv3+: a data tool, never a hard dependency).

eSpeak keeps state between calls: the same call twice in one process gives slightly different samples, while two fresh
processes that make the same calls in the same order agree. Whoever needs reproducible audio starts fresh processes.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import soxr

SAMPLING_RATE = 16_000
MIN_RATE, MAX_RATE = 80, 450  # words a minute; eSpeak clamps silently outside
MIN_PITCH, MAX_PITCH = 0, 100

# Names and values from espeak-ng/speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_PARAMETER_RATE = 1
_PARAMETER_PITCH = 3
_CHARS_UTF8 = 1
_POSITION_CHARACTER = 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


def synthesise(text: str, voice: str, rate: int, pitch: int) -> tuple[np.ndarray, int]:
    """Speak `text` and return (float32 mono samples in -1..1, 16000).

    `voice` is an eSpeak voice with an optional variant, "en-us" or "en-us+m7"; `rate` is in words a minute (80..450),
    `pitch` 0..100. Raises ValueError for an unknown voice or variant, a rate or pitch out of range, and where
    espeakng-loader is missing.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        raise ValueError(f"speaking rate {rate} is outside {MIN_RATE}..{MAX_RATE} words a minute")
    if not MIN_PITCH <= pitch <= MAX_PITCH:
        raise ValueError(f"pitch {pitch} is outside {MIN_PITCH}..{MAX_PITCH}")
    return _engine().speak(text, voice, rate, pitch), SAMPLING_RATE


def check_installed() -> None:
    """Raise ValueError with the command to run when the optional package is missing."""
    if importlib.util.find_spec("espeakng_loader") is None:
        raise ValueError("synthetic speech needs the optional package espeakng-loader: run pip install '.[speech]'")


@cache
def variants() -> frozenset[str]:
    """Names of the installed voice variants: the part of a voice after the plus sign."""
    check_installed()
    import espeakng_loader

    return frozenset(path.name for path in (Path(espeakng_loader.get_data_path()) / "voices" / "!v").iterdir())


@cache
def _engine() -> _Engine:
    return _Engine()  # the library holds one global state, so there is one engine a process


class _Engine:
    def __init__(self) -> None:
        check_installed()
        import espeakng_loader

        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data_path = str(espeakng_loader.get_data_path()).encode()
        self._native_rate = self._library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, _INITIALIZE_DONT_EXIT
        )
        if self._native_rate <= 0:
            raise ValueError(f"eSpeak NG could not read its data in {data_path.decode()}: reinstall espeakng-loader")
        self._libc = ctypes.CDLL(None)
        self._chunks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._take)  # kept: the library calls it later, and ctypes would free it
        self._library.espeak_SetSynthCallback(self._callback)
        self._voice: str | None = None
        self._num_calls = 0

    def speak(self, text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
        """float32 [samples at 16 kHz]."""
        if voice != self._voice:
            self._set_voice(voice)
        # Set on every call: choosing a voice resets both.
        self._library.espeak_SetParameter(_PARAMETER_RATE, rate, 0)
        self._library.espeak_SetParameter(_PARAMETER_PITCH, pitch, 0)
        # eSpeak draws breath and flutter from its own generator and from the C library's, seeded with the time of day.
        self._num_calls += 1
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(self._num_calls))
        self._libc.srand(self._num_calls)
        self._chunks.clear()
        data = text.encode()
        status = self._library.espeak_Synth(
            data, ctypes.c_size_t(len(data) + 1), 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        if status != 0 or not self._chunks:
            raise ValueError(f"eSpeak NG made no sound of the text {text!r} with voice {voice!r} (status {status})")
        samples = np.concatenate(self._chunks).astype(np.float32) / 32768.0
        return soxr.resample(samples, self._native_rate, SAMPLING_RATE)

    def _set_voice(self, voice: str) -> None:
        _, plus, variant = voice.partition("+")
        # eSpeak accepts an unknown variant without a word and speaks with the plain voice.
        if plus and variant not in variants():
            known = ", ".join(sorted(variants()))
            raise ValueError(f"unknown voice variant {variant!r} in {voice!r}: known are {known}")
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice {voice!r}: start it with a language code such as 'en-us'")
        self._voice = voice

    def _take(self, samples: ctypes._Pointer[ctypes.c_short], num_samples: int, _events: int) -> int:
        if samples and num_samples > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())  # the library reuses its buffer
        return 0  # 0: go on speaking
