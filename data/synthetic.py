"""Synthetic speech: spoken digit strings that a small model learns in minutes on a laptop, without any download.

`ensure_digits()` makes all sets once and returns their manifests; `python -m data.synthetic` does it from a shell.
`make_set()` makes one set, of digits or of given texts (data/sentence_sets.py: sentences). The audio comes from eSpeak NG
(pip install '.[speech]'): 34 training voices, 10 others for the test of unseen voices.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from data.build import MARKER, build_once, cache_home
from data.espeak import SAMPLING_RATE, check_installed, synthesise, variants
from data.mixing import make_noise, mix, rms, trim, write_wav

__all__ = ["TRAINING_VOICES", "UNSEEN_VOICES", "Voice", "ensure_digits", "make_set", "synthesise"]

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BABBLE_WORDS = (
    *("people", "talk", "about", "weather", "music", "dinner", "holiday", "garden"),
    *("morning", "water", "paper", "window", "family", "coffee", "market"),
)
SNR = (5.0, 25.0)  # dB, least and most
MIN_LEVEL, MAX_LEVEL = -35.0, -15.0  # speech RMS in dB below full scale: the random gain
MIN_PAUSE, MAX_PAUSE = 0.05, 0.15  # seconds before and after the words
NUM_PROCESSES = 2
# Utterances made by one process. Part of what defines the audio: eSpeak's output depends on the calls before it.
SHARD_SIZE = 500

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Voice:
    """A variant of US English, and the ranges of speaking rate (words a minute) and pitch (0..100) to draw from."""

    name: str
    variant: str
    rate: tuple[int, int] = (120, 300)
    pitch: tuple[int, int] = (10, 90)

    @property
    def espeak(self) -> str:
        return f"en-us+{self.variant}"


def _voices(*variant_names: str, style: str = "", **ranges: tuple[int, int]) -> tuple[Voice, ...]:
    return tuple(Voice(name=variant + style, variant=variant, **ranges) for variant in variant_names)


_STANDARD = ("m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "f4")
# Variants whose spectra nearly equal an unseen voice's (Nguyen, linda, victor, Diogo, paul, max) are in no list.
TRAINING_VOICES: tuple[Voice, ...] = (
    *_voices(*_STANDARD, style="-calm", rate=(120, 210), pitch=(10, 55)),
    *_voices(*_STANDARD, style="-lively", rate=(190, 300), pitch=(45, 90)),
    *_voices("Alicia", "Andrea", "Gene", "Jacky", "Michael", "Reed", "anika"),
    *_voices("antonio", "grandpa", "marcelo", "norbert", "pablo", "robert", "steph"),
)
UNSEEN_VOICES: tuple[Voice, ...] = _voices(
    "m7", "m8", "f5", "Annie", "Denis", "belinda", "ed", "edward", "miguel", "quincy"
)
FEW_LABEL_VOICES: tuple[Voice, ...] = tuple(
    voice
    for voice in TRAINING_VOICES
    if voice.variant in {"m1", "m2", "m3", "m4", "m5", "m6", "f1", "f2", "f3", "f4"}
    and voice.name.endswith("-calm" if voice.variant[1] in "135" else "-lively")
)


@dataclass(frozen=True)
class DigitSet:
    """One set: `num_utterances` strings of 2–5 digits, then `num_short` of 1–2 digits."""

    seed: int
    num_utterances: int
    num_short: int = 0
    voices: tuple[Voice, ...] = TRAINING_VOICES
    with_text: bool = True


# Changing a set, a voice list or the drawing below changes the audio: raise the version in DIGITS_NAME with it.
DIGITS_NAME = "digits-v1"
SETS: dict[str, DigitSet] = {
    "labelled": DigitSet(seed=11, num_utterances=4_000, num_short=1_000),
    "few_labels": DigitSet(seed=12, num_utterances=1_700, num_short=300, voices=FEW_LABEL_VOICES),
    "unlabelled": DigitSet(seed=13, num_utterances=8_000, with_text=False),
    "seen_voices": DigitSet(seed=14, num_utterances=400),
    "unseen_voices": DigitSet(seed=15, num_utterances=1_000, voices=UNSEEN_VOICES),
}


def ensure_digits(home: Path | None = None) -> dict[str, Path]:
    """Make the digit sets where they are missing (about a minute) and return set name -> manifest path.

    They live in `home`/speech/digits-v1, `home` being $OPD_HOME or ~/.cache/opd by default. An interrupted build is
    redone, and a second process waits for the first. Raises ValueError when eSpeak is needed and not installed.
    """
    target = cache_home(home) / "speech" / DIGITS_NAME
    build_sets(target, SETS)
    return {name: target / f"{name}.jsonl" for name in SETS}


def build_sets(target: Path, sets: dict[str, DigitSet]) -> None:
    """Make `sets` in the folder `target`, once."""

    def make(folder: Path) -> str:
        for name, digit_set in sets.items():
            num_utterances = digit_set.num_utterances + digit_set.num_short
            logger.info("making synthetic speech: %s, %d utterances, in %s", name, num_utterances, target)
            make_set(folder, name, **vars(digit_set))
        return f"{sum(s.num_utterances + s.num_short for s in sets.values())} utterances"

    if not (target / MARKER).exists():
        check_installed()
        build_once(target, make)


def make_set(
    out_dir: Path,
    name: str,
    num_utterances: int,
    seed: int,
    *,
    num_short: int = 0,
    voices: tuple[Voice, ...] = TRAINING_VOICES,
    with_text: bool = True,
    texts: Sequence[str] | None = None,
    snr: tuple[float, float] = SNR,
) -> Path:
    """Write `out_dir`/`name`/*.wav (16 kHz, 16 bit, mono) and the manifest `out_dir`/`name`.jsonl; return its path.

    The first `num_utterances` have 2–5 digits, `num_short` more have 1–2; `texts`, one an utterance, are spoken instead.
    `snr` is the range of the signal-to-noise ratio in dB. The same arguments give the same bytes on one machine, because
    fresh processes make SHARD_SIZE utterances each. Raises ValueError for an unknown voice variant and where eSpeak is
    missing.
    """
    assert texts is None or len(texts) == num_utterances + num_short, "one text an utterance"
    unknown = sorted({voice.variant for voice in voices} - variants())
    if unknown:
        raise ValueError(f"unknown voice variants {', '.join(unknown)}: known are {', '.join(sorted(variants()))}")
    wav_dir = Path(out_dir).resolve() / name
    wav_dir.mkdir(parents=True, exist_ok=True)
    total = num_utterances + num_short
    shards = [
        {
            "wav_dir": str(wav_dir),
            "set_name": name,
            "seed": seed,
            "first": first,
            "last": min(first + SHARD_SIZE, total),
            "num_long": num_utterances,
            "texts": None if texts is None else list(texts[first : min(first + SHARD_SIZE, total)]),
            "snr": snr,
            "voices": [asdict(voice) for voice in voices],
            "parent": os.getpid(),
        }
        for first in range(0, total, SHARD_SIZE)
    ]
    with ThreadPoolExecutor(max_workers=NUM_PROCESSES) as pool:
        rows = [row for shard_rows in pool.map(_run_shard, shards) for row in shard_rows]
    if not with_text:
        rows = [{key: value for key, value in row.items() if key != "text"} for row in rows]
    return _write_rows(wav_dir.parent / f"{name}.jsonl", rows)


def _write_rows(path: Path, rows: list[dict]) -> Path:
    from data.manifest import write_manifest  # here, because it imports torch, which the shard processes do without
    from opd.types import Utterance

    own_fields = {"id", "audio", "text", "language", "task"}
    utterances = [
        Utterance(
            **{key: value for key, value in row.items() if key in own_fields},
            extra={key: value for key, value in row.items() if key not in own_fields},
        )
        for row in rows
    ]
    write_manifest(path, utterances)
    return path


def _run_shard(shard: dict) -> list[dict]:
    """Make one shard in a fresh process and return its manifest rows."""
    project = str(Path(__file__).resolve().parent.parent)
    paths = [project, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", "from data.synthetic import shard_main; shard_main()"],
        input=json.dumps(shard),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )
    if done.returncode != 0:
        raise RuntimeError(f"making speech in {shard['wav_dir']} failed with status {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)


def shard_main() -> None:
    """The shard process: the order on stdin as JSON, the manifest rows on stdout."""
    shard = json.load(sys.stdin)
    voices = [Voice(**voice) for voice in shard["voices"]]
    babble = _babble_sources(shard["seed"])
    rows = []
    for index in range(shard["first"], shard["last"]):
        if os.getppid() != shard["parent"]:
            sys.exit("the build was killed")  # else this process would write on where the next build cleans up
        # Seeded by the index, so that the draw of an utterance does not depend on its shard.
        generator = np.random.default_rng([shard["seed"], index])
        if shard["texts"] is None:
            text = _digit_string(2, 5, generator) if index < shard["num_long"] else _digit_string(1, 2, generator)
        else:
            text = shard["texts"][index - shard["first"]]
        voice = voices[generator.integers(len(voices))]
        samples = _noisy_speech(text, voice, babble, shard["snr"], generator)
        utterance_id = f"{shard['set_name']}-{index:05d}"
        write_wav(f"{shard['wav_dir']}/{utterance_id}.wav", samples)
        rows.append(
            {
                "id": utterance_id,
                "audio": f"{shard['set_name']}/{utterance_id}.wav",
                "text": text,
                "task": "asr",
                "language": "English",
                "duration": round(len(samples) / SAMPLING_RATE, 4),
                "voice": voice.name,
            }
        )
    json.dump(rows, sys.stdout)


def _digit_string(min_words: int, max_words: int, generator: np.random.Generator) -> str:
    return " ".join(generator.choice(DIGITS, size=generator.integers(min_words, max_words + 1)))


def _noisy_speech(
    text: str, voice: Voice, babble: list[np.ndarray], snr: tuple[float, float], generator: np.random.Generator
) -> np.ndarray:
    """float32 [samples]: the words with a pause around them, noise and a random gain."""
    rate = int(generator.integers(voice.rate[0], voice.rate[1] + 1))
    pitch = int(generator.integers(voice.pitch[0], voice.pitch[1] + 1))
    speech = trim(synthesise(text, voice.espeak, rate, pitch)[0])
    speech = speech / rms(speech)
    pauses = [int(pause * SAMPLING_RATE) for pause in generator.uniform(MIN_PAUSE, MAX_PAUSE, size=2)]
    speech = np.pad(speech, pauses)
    noise = make_noise(len(speech), babble, generator)
    return mix(speech, noise, snr=generator.uniform(*snr), level=generator.uniform(MIN_LEVEL, MAX_LEVEL))


def _babble_sources(seed: int) -> list[np.ndarray]:
    """Twelve voices that talk, without saying digits, for babble noise: float32 [samples] of RMS 1 each."""
    generator = np.random.default_rng([seed, 0, 1])
    sources = []
    for voice in TRAINING_VOICES[::3]:
        text = " ".join(generator.permutation(BABBLE_WORDS))
        speech = trim(synthesise(text, voice.espeak, int(generator.integers(150, 220)), 50)[0])
        sources.append(speech / rms(speech))
    return sources


def main() -> None:
    """Make the sets and say where they are."""
    parser = argparse.ArgumentParser(prog="python -m data.synthetic", description="Make the synthetic digit sets.")
    parser.add_argument("--home", type=Path, help="folder to keep them in (default: $OPD_HOME or ~/.cache/opd)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.monotonic()
    try:
        manifests = ensure_digits(arguments.home)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for name, path in manifests.items():
        print(f"{name:15s} {path}")
    print(f"ready after {time.monotonic() - start:.1f} s")


if __name__ == "__main__":
    main()
