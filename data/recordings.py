"""Digit strings from recordings of single spoken digits, split by speaker: real speech that a small model learns.

The recordings are named as in the Free Spoken Digit Dataset, `{digit}_{speaker}_{index}.wav`, in a folder or a tar file.
A string joins recordings of one speaker with gaps between them. `ensure_recordings()` makes all sets once.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import soxr

from data.build import build_once, cache_home
from data.espeak import SAMPLING_RATE
from data.manifest import write_manifest
from data.mixing import make_noise, mix, rms, write_wav
from data.synthetic import DIGITS, MAX_LEVEL, MIN_LEVEL
from opd.types import Utterance

__all__ = ["RECORDING_SETS", "RecordingSet", "build_digit_strings", "ensure_recordings"]

MIN_DIGITS, MAX_DIGITS = 2, 5
GAP = (0.05, 0.3)  # seconds between two digits, and at both ends
DIGIT_LEVEL = (-3.0, 3.0)  # dB, a digit against the others of its string
SPEED = (0.9, 1.1)  # augmentation: factor of the speaking rate; the pitch goes with it
AUGMENTATION_SNR = (10.0, 40.0)  # dB, white or pink noise
PLAIN_SNR = 40.0  # dB, without augmentation: gaps as quiet as a quiet room
EVALUATION_SHARE = 0.1  # of a training speaker's recordings of each digit, the first ones: for evaluation alone
FEW_SHARE = 0.2  # of the others: what few_labels is made of
_FILE_NAME = re.compile(r"([0-9])_(.+)_([0-9]+)\.wav", re.IGNORECASE)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecordingSet:
    """One set of digit strings. `pool` says which recordings it joins: training, few, evaluation or held_out."""

    pool: str
    num_utterances: int
    seed: int
    with_text: bool = True
    augmented: bool = False


# Changing a set or the drawing below changes the audio: raise the version in RECORDINGS_NAME with it.
RECORDINGS_NAME = "recordings-v1"
RECORDING_SETS: dict[str, RecordingSet] = {
    "labelled": RecordingSet("training", 3_000, seed=31, augmented=True),
    "few_labels": RecordingSet("few", 300, seed=32, augmented=True),
    "unlabelled": RecordingSet("training", 4_000, seed=33, augmented=True, with_text=False),
    "seen_speakers": RecordingSet("evaluation", 300, seed=34),
    "held_out_speakers": RecordingSet("held_out", 500, seed=35),
}


class Recording(NamedTuple):
    """What a file's name says; `take` counts a speaker's recordings of one digit."""

    speaker: str
    digit: int
    take: int


# Speaker -> for each digit 0..9 the recordings to choose from.
Pool = dict[str, list[list[Recording]]]


def ensure_recordings(
    source: str | Path, held_out_speakers: Sequence[str], home: Path | None = None
) -> dict[str, Path]:
    """Make the sets of RECORDING_SETS where they are missing (under a minute) and return set name -> manifest path.

    They live in `home`/speech/recordings-v1, `home` being $OPD_HOME or ~/.cache/opd by default, under a fingerprint of
    the recordings' names and bytes and the held-out speakers. Raises ValueError as `build_digit_strings` does.
    """
    digests = {recording: hashlib.sha256(content).hexdigest() for recording, content in _recordings(Path(source))}
    _split(digests, held_out_speakers, source)  # refuses what cannot be built, whether or not it was built before
    sets = {name: asdict(recording_set) for name, recording_set in RECORDING_SETS.items()}
    identity = json.dumps([sorted(digests.items()), sorted(set(held_out_speakers)), sets])
    target = cache_home(home) / "speech" / RECORDINGS_NAME / hashlib.sha256(identity.encode()).hexdigest()[:16]

    def make(folder: Path) -> str:
        logger.info("joining recordings of %s to digit strings, in %s", source, target)
        build_digit_strings(source, folder, held_out_speakers, sets=RECORDING_SETS)
        return f"made from {source}"

    build_once(target, make)
    return {name: target / f"{name}.jsonl" for name in RECORDING_SETS}


def build_digit_strings(
    source: str | Path,
    target: Path,
    held_out_speakers: Sequence[str],
    *,
    sets: Mapping[str, RecordingSet] = RECORDING_SETS,
) -> dict[str, Path]:
    """Write `target`/SET/*.wav (16 kHz, 16 bit, mono) and the manifest `target`/SET.jsonl of each set; return those.

    Strings have 2–5 digits of one speaker, 50–300 ms apart, at random levels; augmented sets vary speed and noise. The
    held-out speakers are in their own set only, and what evaluates the others is in no training set. The same arguments
    give the same bytes. Raises ValueError for no recordings, one that cannot be read or is there twice, a held-out
    speaker that does not exist, no speaker to train on or to hold out, and a speaker that lacks a digit.
    """
    samples = {recording: _decode(recording, content, source) for recording, content in _recordings(Path(source))}
    pools = _split(samples, held_out_speakers, source)
    return {name: _make_set(target, name, s, pools[s.pool], samples) for name, s in sets.items()}


# -- the recordings ----------------------------------------------------------------------------------------------------


def _recordings(source: Path) -> Iterator[tuple[Recording, bytes]]:
    """Each recording with the bytes of its file; other files are passed over."""
    seen: dict[Recording, str] = {}
    for path, content in _files(source):
        match = _FILE_NAME.fullmatch(Path(path).name)
        assert match, "only such files are read"
        recording = Recording(match[2], int(match[1]), int(match[3]))
        if recording in seen:
            raise ValueError(f"recordings {source}: {seen[recording]} and {path} are the same one: remove one of them")
        seen[recording] = path
        yield recording, content
    if not seen:
        raise ValueError(
            f"recordings {source}: there are none; their files are named {{digit}}_{{speaker}}_{{index}}.wav, such as "
            "7_anna_0.wav"
        )


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of each file that is named like a recording, in a folder at any depth or in a tar file."""
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if _FILE_NAME.fullmatch(path.name) and path.is_file():
                yield str(path.relative_to(source)), path.read_bytes()
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                file = archive.extractfile(member) if _FILE_NAME.fullmatch(Path(member.name).name) else None
                if file is not None:
                    yield member.name, file.read()
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or str(error).split("\n")[0].rstrip(":")
        raise ValueError(f"recordings {source}: cannot be read ({reason}): give a folder or a tar file") from error


def _split(recordings: Iterable[Recording], held_out_speakers: Sequence[str], source: str | Path) -> dict[str, Pool]:
    """Pool name -> recordings. Raises ValueError where a split by speaker is not possible."""
    by_speaker: Pool = {}
    for recording in sorted(recordings):
        by_speaker.setdefault(recording.speaker, [[] for _ in DIGITS])[recording.digit].append(recording)
    speakers = ", ".join(by_speaker)
    if len(by_speaker) < 2:
        raise ValueError(f"recordings {source}: all are of {speakers}: at least two speakers are needed, one held out")
    if unknown := [speaker for speaker in held_out_speakers if speaker not in by_speaker]:
        raise ValueError(f"held-out speakers {', '.join(unknown)}: not in {source}, which has {speakers}")
    held_out = {speaker: by_speaker.pop(speaker) for speaker in sorted(set(held_out_speakers))}
    if not held_out or not by_speaker:
        raise ValueError(f"held-out speakers {list(held_out)}: hold out some of {speakers}, but not all")
    pools: dict[str, Pool] = {"held_out": held_out, "training": {}, "few": {}, "evaluation": {}}
    for speaker, digits in {**by_speaker, **held_out}.items():
        least = 1 if speaker in held_out else 2
        if lacking := [str(digit) for digit, found in enumerate(digits) if len(found) < least]:
            raise ValueError(
                f"recordings {source}: speaker {speaker} has fewer than {least} of digit {', '.join(lacking)}: add them "
                "or leave the speaker out"
            )
    for speaker, digits in by_speaker.items():
        first = [max(1, round(EVALUATION_SHARE * len(found))) for found in digits]
        pools["evaluation"][speaker] = [found[:n] for found, n in zip(digits, first, strict=True)]
        training = [found[n:] for found, n in zip(digits, first, strict=True)]
        pools["training"][speaker] = training
        pools["few"][speaker] = [found[: max(1, round(FEW_SHARE * len(found)))] for found in training]
    return pools


def _decode(recording: Recording, content: bytes, source: str | Path) -> np.ndarray:
    """float32 [samples at 16 kHz] of RMS 1; channels are averaged."""
    try:
        samples_SC, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        name = f"{recording.digit}_{recording.speaker}_{recording.take}.wav"
        raise ValueError(f"recordings {source}: {name} cannot be read ({error}): fetch it again") from error
    samples = soxr.resample(samples_SC.mean(axis=1), rate, SAMPLING_RATE)
    return samples / rms(samples)


# -- the strings -------------------------------------------------------------------------------------------------------


def _make_set(
    target: Path, name: str, recording_set: RecordingSet, pool: Pool, samples: Mapping[Recording, np.ndarray]
) -> Path:
    (target / name).mkdir(parents=True, exist_ok=True)
    utterances = []
    for index in range(recording_set.num_utterances):
        generator = np.random.default_rng([recording_set.seed, index])
        speaker = list(pool)[generator.integers(len(pool))]
        digits = generator.integers(len(DIGITS), size=generator.integers(MIN_DIGITS, MAX_DIGITS + 1))
        chosen = [pool[speaker][digit][generator.integers(len(pool[speaker][digit]))] for digit in digits]
        audio = _join([samples[recording] for recording in chosen], recording_set.augmented, generator)
        utterance_id = f"{name}-{index:05d}"
        write_wav(target / name / f"{utterance_id}.wav", audio)
        utterances.append(
            Utterance(
                id=utterance_id,
                audio=f"{name}/{utterance_id}.wav",
                text=" ".join(DIGITS[digit] for digit in digits) if recording_set.with_text else None,
                language="English",
                extra={"duration": round(len(audio) / SAMPLING_RATE, 4), "speaker": speaker},
            )
        )
    write_manifest(target / f"{name}.jsonl", utterances)
    return target / f"{name}.jsonl"


def _join(parts: list[np.ndarray], augmented: bool, generator: np.random.Generator) -> np.ndarray:
    """float32 [samples]: the recordings with gaps between them, noise and a random level."""
    speed = generator.uniform(*SPEED) if augmented else 1.0
    gaps = [np.zeros(int(gap * SAMPLING_RATE)) for gap in generator.uniform(*GAP, size=len(parts) + 1)]
    levels = 10 ** (generator.uniform(*DIGIT_LEVEL, size=len(parts)) / 20)
    pieces = [gaps[0]]
    for part, level, gap in zip(parts, levels, gaps[1:], strict=True):
        pieces += [level * soxr.resample(part, SAMPLING_RATE * speed, SAMPLING_RATE), gap]
    speech = np.concatenate(pieces)
    noise = make_noise(len(speech), (), generator)
    snr = generator.uniform(*AUGMENTATION_SNR) if augmented else PLAIN_SNR
    return mix(speech / rms(speech), noise, snr=snr, level=generator.uniform(MIN_LEVEL, MAX_LEVEL))
