"""Audio that an import has to write: sound inside a data set's own files, and what Kaldi's commands print."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

_SUFFIXES = {"WAVEX": ".wav", "RF64": ".wav", "NIST": ".sph"}
_BLOCK_SIZE = 1 << 16
# Encodings that stay in what a command prints (others become PCM_16), and the data type that holds all of their values.
_KEPT_ENCODINGS = {
    **dict.fromkeys(("PCM_U8", "PCM_16", "ULAW", "ALAW"), "int16"),
    **dict.fromkeys(("PCM_24", "PCM_32"), "int32"),
    "FLOAT": "float32",
    "DOUBLE": "float64",
}


class Skipped(ValueError):
    """A row without usable audio or a matching entry. Has `reason` (the same for all such rows) and `detail`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class StoredAudio(NamedTuple):
    """An audio file and its length in seconds."""

    path: Path
    seconds: float


class AudioStore:
    """A folder of audio files named by what they hold, so that a repeated import finds and keeps them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put_bytes(self, content: bytes) -> StoredAudio:
        """Encoded audio as it is, with the suffix of its format. Raises Skipped where it cannot be read."""
        try:
            with soundfile.SoundFile(io.BytesIO(content)) as file:
                seconds = file.frames / file.samplerate
                suffix = _SUFFIXES.get(file.format, f".{file.format.lower()}")
        except soundfile.SoundFileError as error:
            raise Skipped("audio cannot be read", f"{len(content)} bytes of no known format ({error})") from error
        path = self._path(hashlib.blake2b(content, digest_size=16).hexdigest(), suffix)
        if not path.exists():
            with _complete_file(path) as temporary:
                temporary.write_bytes(content)
        return StoredAudio(path, seconds)

    def put_samples(self, samples: Any, sampling_rate: int) -> StoredAudio:
        """Samples [S] as FLAC of 16 bits: floats of -1 to 1, or integers of 16 bits. Raises Skipped for others."""
        array = np.asarray(samples)
        if array.ndim != 1 or not array.size or array.dtype.kind not in "if" or not np.isfinite(array).all():
            raise Skipped("audio cannot be read", f"samples of shape {list(array.shape)} and type {array.dtype}")
        if array.dtype.kind == "i":
            if array.min() < -(2**15) or array.max() >= 2**15:
                raise Skipped("audio cannot be read", f"integers up to {array.max()} do not fit into 16 bits")
            array = array.astype(np.int16)
        digest = hashlib.blake2b(array.tobytes() + f"{array.dtype} {sampling_rate}".encode(), digest_size=16)
        path = self._path(digest.hexdigest(), ".flac")
        if not path.exists():
            with _complete_file(path) as temporary:
                soundfile.write(temporary, array, sampling_rate, subtype="PCM_16", format="FLAC")
        return StoredAudio(path, len(array) / sampling_rate)

    def put_command(self, command: str, folder: Path) -> StoredAudio:
        """What a shell command, run in `folder`, prints, as a wav file; an earlier output of the command is kept.

        By the shell, as Kaldi does it: real data directories pipe programs into one another. The header is written
        anew, because a program that writes into a pipe cannot know its length. Raises Skipped where it fails.
        """
        path = self._path(hashlib.blake2b(f"{folder}\0{command}".encode(), digest_size=16).hexdigest(), ".wav")
        if not path.exists():
            with _complete_file(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as output:
                done = subprocess.run(
                    command, shell=True, stdout=output, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=folder
                )
                if done.returncode != 0:
                    said = " ".join(done.stderr.decode(errors="replace").split())[-300:]
                    raise Skipped("command failed", f"status {done.returncode} of {command!r} ({said or 'no message'})")
                output.seek(0)
                _copy_as_wav(output, temporary, command)
        info = soundfile.info(path)
        return StoredAudio(path, info.frames / info.samplerate)

    def _path(self, digest: str, suffix: str) -> Path:
        """Files are spread over up to 256 folders."""
        return self.folder / digest[:2] / f"{digest}{suffix}"


def _copy_as_wav(source: Any, target: Path, command: str) -> None:
    try:
        with soundfile.SoundFile(source) as file:
            if file.frames == 0:
                raise Skipped("command failed", f"{command!r} printed no sound")
            subtype = file.subtype if file.subtype in _KEPT_ENCODINGS else "PCM_16"
            with soundfile.SoundFile(target, "w", file.samplerate, file.channels, subtype, format="WAV") as copy:
                # Not by `blocks`, which makes up for the samples that a file cut short lacks.
                while len(block := file.read(_BLOCK_SIZE, dtype=_KEPT_ENCODINGS[subtype])):
                    copy.write(block)
                if copy.frames < file.frames:
                    raise Skipped("command failed", f"{command!r} printed {copy.frames} of {file.frames} samples")
    except soundfile.SoundFileError as error:
        raise Skipped("command failed", f"{command!r} printed no sound that can be read ({error})") from error


@contextmanager
def _complete_file(path: Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well, and is removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
