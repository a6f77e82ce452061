"""Manifests of any size: an index is built once, in one pass; after it, an utterance is read by its position alone.

The index is a folder beside the manifest, or in the cache ($OPD_HOME) where that place is read-only. Its name holds the
manifest's size and time of change, so that a manifest that was changed gets a new one.

offsets.npy    int64 [utterances], where each line begins
seconds.npy    float32 [utterances], `duration` of the lines that have one, NaN for the others
facts.json     what one pass over all lines tells: `Facts`
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from data.build import MARKER, build_once, cache_home
from data.manifest import duplicate_id, missing_text, no_utterances, parse_line, read_manifest, to_utterance, unreadable
from data.sound import HUGGINGFACE_PREFIX
from opd.types import Utterance

INDEX_ABOVE_BYTES = 64 << 20  # a smaller manifest is read whole; it is there at once, and its folder stays as it is
_VERSION = 1
logger = logging.getLogger(__name__)
_LONGEST_TIME = 1e9
_READ_SIZE = 1 << 12  # bytes: most lines are shorter


@dataclass
class Facts:
    """What is known of a manifest's lines without reading them again.

    line_without_text   number of the first line that has no words in its `text`; None where all have
    languages           (`language` as written, or None; position of the first line with it) of each that occurs
    ids_digest          of all ids in order (`ids_digest`); None where an index was built before there was one
    """

    version: int = _VERSION
    num_utterances: int = 0
    num_texts: int = 0
    num_timed: int = 0
    line_without_text: int | None = None
    languages: list[tuple[str | None, int]] = field(default_factory=list)
    ids_digest: str | None = None


class IndexedManifest(Sequence[Utterance]):
    """The utterances of a JSONL manifest, each read when it is asked for; what `read_manifest` gives, without its list.

    Raises ValueError as `read_manifest` does, when the index is built; and later for a file that was changed meanwhile.
    """

    def __init__(self, path: str | Path, *, require_text: bool = False, default_language: str | None = None) -> None:
        self.path = Path(path)
        self.default_language = default_language
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise unreadable(self.path, error) from error
        self._folder = self.path.absolute().parent
        folder = _index_folder(self.path)
        build_once(folder, lambda partial: _build(self.path, partial))
        facts: dict[str, Any] = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.facts = Facts(**facts)
        if require_text and self.facts.line_without_text is not None:
            raise missing_text(f"{self.path}:{self.facts.line_without_text}")
        self._offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self._seconds_path = folder / "seconds.npy"

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return len(self._offsets)

    @overload
    def __getitem__(self, index: int) -> Utterance: ...

    @overload
    def __getitem__(self, index: slice) -> list[Utterance]: ...

    def __getitem__(self, index: int | slice) -> Utterance | list[Utterance]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        where = f"{self.path}: utterance {index}"
        try:
            return to_utterance(
                parse_line(_line_at(self._file, int(self._offsets[index])), where),
                where,
                self._folder,
                self.default_language,
            )
        except ValueError as error:
            raise ValueError(f"{error}; the file was changed while it is read: start again") from error

    def seconds(self) -> np.ndarray | None:
        """float32 [utterances] of `duration`, NaN where a line has none; None where no line has one."""
        return np.load(self._seconds_path, mmap_mode="r") if self.facts.num_timed else None


def open_manifest(
    path: str | Path, *, require_text: bool = False, default_language: str | None = None
) -> Sequence[Utterance]:
    """The utterances of a manifest: a list of a small one, an `IndexedManifest` of a large one; or rows of an hf: name.

    Raises ValueError as `read_manifest` does.
    """
    if str(path).startswith(HUGGINGFACE_PREFIX):
        from data.huggingface import HuggingFaceRows  # here, because `datasets` takes seconds to import

        return HuggingFaceRows(str(path), require_text=require_text, default_language=default_language)
    path = Path(path)
    is_large = path.is_file() and path.stat().st_size > INDEX_ABOVE_BYTES
    open_it = IndexedManifest if is_large else read_manifest
    return open_it(path, require_text=require_text, default_language=default_language)


def facts_of(utterances: Sequence[Utterance]) -> Facts:
    """The facts of any utterances: what an index knows, or by a look at each. A list's lines have no numbers."""
    facts = getattr(utterances, "facts", None)
    if facts is not None:
        return facts
    first: dict[str | None, int] = {}
    for position, utterance in enumerate(utterances):
        first.setdefault(utterance.language, position)
    num_texts = sum(utterance.text is not None for utterance in utterances)
    return Facts(num_utterances=len(utterances), num_texts=num_texts, languages=list(first.items()))


class IdsDigest:
    """A digest of ids in their order."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, utterance_id: str) -> None:
        self._hash.update(f"{utterance_id}\n".encode(errors="surrogatepass"))

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def ids_digest(utterances: Sequence[Utterance]) -> str | None:
    """A digest of the ids in order: of a list by a look at each, else what an index knows. None where that is nothing."""
    facts = getattr(utterances, "facts", None)
    if facts is not None:
        return facts.ids_digest
    digest = IdsDigest()
    for utterance in utterances:
        digest.add(utterance.id)
    return digest.hexdigest()


def _line_at(file: int, offset: int) -> bytes:
    """The line that begins at a byte of an open file."""
    size = _READ_SIZE
    while True:
        content = os.pread(file, size, offset)
        line, end, _ = content.partition(b"\n")
        if end or len(content) < size:
            return line
        size *= 8


def _index_folder(path: Path) -> Path:
    """Where the index of the manifest as it is now belongs; older ones beside it are removed."""
    path = path.resolve()
    stat = os.stat(path)
    stem, key = f".{path.name}.index-", f"v{_VERSION}-{stat.st_size}-{stat.st_mtime_ns}"
    beside = path.parent / f"{stem}{key}"
    if (beside / MARKER).exists() or os.access(path.parent, os.W_OK, effective_ids=True):
        folder = beside
    else:
        name = f"{path.name}-{hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()}"
        stem, folder = "", cache_home() / "manifests" / name / key
    if not (folder / MARKER).exists() and folder.parent.is_dir():
        for entry in folder.parent.iterdir():
            is_index = entry.name.startswith(f"{stem}v") and entry.is_dir() and (entry / MARKER).exists()
            if is_index and entry != folder:
                shutil.rmtree(entry, ignore_errors=True)
                entry.with_name(f"{entry.name}.lock").unlink(missing_ok=True)
    return folder


# -- building --------------------------------------------------------------------------------------------------------


def _build(path: Path, folder: Path) -> str:
    """Fills the folder of an index. Memory: 24 bytes a line, 4 more where lines have a `duration`."""
    size = path.stat().st_size
    if size > INDEX_ABOVE_BYTES:
        logger.info(
            "%s: an index of its %.1f GB is built, once; that takes about a minute for each 3 GB", path, size / 1e9
        )
    offsets, seconds, hashes = array("q"), array("f"), array("q")
    facts, digest = Facts(), IdsDigest()
    first_of_language: dict[str | None, int] = {}
    for number, offset, line in _lines(path):
        utterance_id, language, text, duration = _checked(line, path, number)
        position = len(offsets)
        offsets.append(offset)
        hashes.append(hash(utterance_id))
        digest.add(utterance_id)
        if language not in first_of_language:
            first_of_language[language] = position
        if text is not None:
            facts.num_texts += 1
        if facts.line_without_text is None and not (text and text.strip()):
            facts.line_without_text = number
        if duration is not None:
            if not seconds:
                seconds.extend([float("nan")] * position)
            facts.num_timed += 1
            seconds.append(duration)
        elif seconds:
            seconds.append(float("nan"))
    if not offsets:
        raise no_utterances(path)
    facts.num_utterances = len(offsets)
    facts.languages = list(first_of_language.items())
    facts.ids_digest = digest.hexdigest()
    starts = np.frombuffer(offsets, np.int64)
    _check_ids(path, starts, np.frombuffer(hashes, np.int64))
    np.save(folder / "offsets.npy", starts)
    if seconds:
        np.save(folder / "seconds.npy", np.frombuffer(seconds, np.float32))
    (folder / "facts.json").write_text(json.dumps(asdict(facts)) + "\n", encoding="utf-8")
    return f"{len(offsets)} utterances of {path.name}"


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(number, byte where it begins, content) of each line that is not blank."""
    try:
        with open(path, "rb", buffering=1 << 20) as file:
            end = 0
            for number, line in enumerate(file, start=1):
                begin, end = end, end + len(line)
                if not line.isspace():
                    yield number, begin, line
    except OSError as error:
        raise unreadable(path, error) from error


def _checked(line: bytes, path: Path, number: int) -> tuple[str, str | None, str | None, float | None]:
    """(id, language, text, duration) of a line. Raises ValueError for a bad one.

    Lines that are plainly good are known without making an utterance of them, which takes most of the time. All others
    are left to those that read them later.
    """
    try:
        fields: Any = json.loads(str(line, "utf-8"))
        audio, utterance_id, language = fields["audio"], fields.get("id"), fields.get("language", "")
        has_times = "begin_time" in fields or "end_time" in fields
        if utterance_id is None and not has_times:
            utterance_id = audio
        is_plain = (
            type(audio) is str
            and type(utterance_id) is str
            and type(language) is str
            and type(fields.get("text", "")) is str
            and audio != ""
            and utterance_id != ""
            and fields.get("task", "asr") == "asr"
            and (not has_times or 0 <= fields["begin_time"] < fields["end_time"] < _LONGEST_TIME)
            and not (has_times and bool in (type(fields["begin_time"]), type(fields["end_time"])))
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        is_plain = False
    if is_plain:
        return utterance_id, language or None, fields.get("text"), _duration(fields.get("duration"))
    where = f"{path}:{number}"
    utterance = to_utterance(parse_line(line, where), where, Path())
    return utterance.id, utterance.language, utterance.text, _duration(utterance.extra.get("duration"))


def _duration(value: Any) -> float | None:
    """Seconds of a `duration` that is of use; it is a field of the user's own, so anything may stand there."""
    return float(value) if isinstance(value, int | float) and value is not True and value > 0 else None


def _check_ids(path: Path, offsets: np.ndarray, hashes: np.ndarray) -> None:
    """Raises ValueError for an id that two lines have. Only lines whose ids have one hash are looked at."""
    positions = positions_of_repeated(hashes)
    first: dict[str, int] = {}
    file = os.open(path, os.O_RDONLY)
    try:
        for position in positions:
            utterance = to_utterance(parse_line(_line_at(file, int(offsets[position])), str(path)), str(path), Path())
            if utterance.id in first:
                lines = _line_numbers(path, {int(offsets[first[utterance.id]]), int(offsets[position])})
                raise duplicate_id(path, utterance.id, *lines)
            first[utterance.id] = position
    finally:
        os.close(file)


def positions_of_repeated(hashes: np.ndarray) -> list[int]:
    """Positions whose hash (int64) occurs more than once, rising."""
    ordered = np.sort(hashes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    return np.flatnonzero(np.isin(hashes, repeated)).tolist() if len(repeated) else []


def _line_numbers(path: Path, offsets: set[int]) -> list[int]:
    """Numbers of the lines that begin at these bytes, rising."""
    return [number for number, begin, _ in _lines(path) if begin in offsets]
