"""Hugging Face data sets as what a run trains on, without an import: by position, or as a stream.

    hf:PATH_OR_NAME?split=train&audio=audio&text=text                 rows are read by position
    hf:PATH_OR_NAME?split=train&stream=true&buffer=500                rows come in the order of the stream (data/stream.py)

Options: split, subset; the columns audio, text, id, language_column, begin, end (by default those with usual names);
language, of all rows; language_check=off; stream, buffer. Sound is never decoded by `datasets`: `data.audio` reads it.
"""

from __future__ import annotations

import errno
import hashlib
import io
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, overload
from urllib.parse import parse_qsl, urlencode

import datasets
import numpy as np
import pyarrow.compute as pc

from data.import_columns import Columns
from data.import_huggingface import open_data, plain_values
from data.index import Facts, IdsDigest, positions_of_repeated
from data.manifest import to_utterance
from data.sound import HUGGINGFACE_PREFIX, inline
from opd.types import Utterance

_COLUMN_KEYS = ("audio", "text", "id", "language_column", "begin", "end", "language")
_KEYS = ("split", "subset", *_COLUMN_KEYS, "language_check", "stream", "buffer")
_BATCH = 10_000  # rows that are looked through at a time
DEFAULT_BUFFER = 500


@dataclass(frozen=True)
class DataName:
    """What an `hf:` name says. `path` is a folder, a parquet file or a name on the Hub."""

    path: str
    split: str | None = None
    subset: str | None = None
    columns: Columns = field(default_factory=Columns)
    stream: bool = False
    buffer: int = DEFAULT_BUFFER

    @property
    def folder(self) -> Path:
        """What relative paths of audio count from."""
        path = Path(self.path).absolute()
        return path if path.is_dir() else path.parent

    def address(self, column: str, row: int) -> str:
        """Of the sound in a row, for `data.sound`."""
        options = {"split": self.split, "subset": self.subset, "audio": column}
        query = urlencode({key: value for key, value in options.items() if value is not None})
        return f"{HUGGINGFACE_PREFIX}{self.path}?{query}#{row}"


def parse_name(name: str) -> DataName:
    """`hf:PATH?key=value&...` -> DataName. Raises ValueError for an unknown key or a value that is none of a key's."""
    path, _, query = name.removeprefix(HUGGINGFACE_PREFIX).partition("?")
    values = dict(parse_qsl(query, keep_blank_values=True))
    if not path or (unknown := sorted(values.keys() - set(_KEYS))):
        what = f"unknown option {unknown[0]}" if path else "names no data set"
        raise ValueError(f"{name}: {what}; write hf:PATH_OR_NAME?key=value&..., with keys {', '.join(_KEYS)}")
    for key, allowed in (("stream", ("true", "false")), ("language_check", ("on", "off"))):
        if values.get(key, allowed[0]) not in allowed:
            raise ValueError(f"{name}: {key} must be {' or '.join(allowed)}, not {values[key]!r}")
    buffer = values.get("buffer", str(DEFAULT_BUFFER))
    if not buffer.isdecimal() or int(buffer) < 1:
        raise ValueError(f"{name}: buffer must be a whole number above 0, not {buffer!r}")
    given: dict[str, Any] = {key: values[key] for key in _COLUMN_KEYS if key in values}
    try:
        columns = Columns(**given, check_language=values.get("language_check", "on") == "on")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return DataName(
        path, values.get("split"), values.get("subset"), columns, values.get("stream") == "true", int(buffer)
    )


class HuggingFaceRows(Sequence[Utterance]):
    """The utterances of a data set with random access; each is made when it is asked for, its sound when it is read.

    Raises ValueError as `data.index.IndexedManifest` does, naming the row.
    """

    def __init__(self, name: str, *, require_text: bool = False, default_language: str | None = None) -> None:
        self.name = parse_name(name)
        self.default_language = default_language
        if self.name.stream:
            raise ValueError(f"{name}: stream=true: a stream can only be trained on, by stage sft or opd; leave it out")
        data, self._audio = open_rows(self.name.path, self.name.split, self.name.subset, self.name.columns.audio)
        self._num_rows = len(data)
        if not self._num_rows:
            raise ValueError(f"{self}: has no rows: choose another split")
        self._convert = RowConverter(self.name, self._audio, data.features, default_language)
        # Where a row names a file, that is where its sound is; where it holds the bytes, they are left alone here.
        self._has_paths = getattr(data.features[self._audio], "dtype", None) in ("string", "large_string")
        self._data = data if self._has_paths else data.remove_columns(self._audio)
        self.facts = self._look_through(require_text)

    def __str__(self) -> str:
        return f"{self.name.path}[{self.name.split}]" if self.name.split else self.name.path

    def __len__(self) -> int:
        return self._num_rows

    @overload
    def __getitem__(self, index: int) -> Utterance: ...

    @overload
    def __getitem__(self, index: slice) -> list[Utterance]: ...

    def __getitem__(self, index: int | slice) -> Utterance | list[Utterance]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"{self} has {len(self)} rows, none at {index}")
        row = self._data[position] if self._data.column_names else {}  # without columns it has forgotten its rows
        address = row[self._audio] if self._has_paths else self.name.address(self._audio, position)
        return self._convert.utterance(row, address, f"{self}:row {position}", f"row-{position:08d}")

    def _look_through(self, require_text: bool) -> Facts:
        """One pass over ids, languages and texts, which is what the checks need; sound is not touched."""
        found = self._convert.columns_found(self._data.column_names)
        names = {field: found[field] for field in ("id", "language", "text") if field in found}
        facts = Facts(num_utterances=len(self))
        first_of_language: dict[Any, int] = {} if "language" in names else {None: 0}
        hashes, digest = array("q"), IdsDigest()
        tables = self._data.select_columns(list(names.values())).with_format("arrow").iter(_BATCH) if names else ()
        for number, table in enumerate(tables):
            start = number * _BATCH
            if "id" in names:
                ids = list(map(str, table[names["id"]].to_pylist()))
                hashes.extend(map(hash, ids))
                for utterance_id in ids:
                    digest.add(utterance_id)
            if "language" in names:
                for language, row in _first_rows(table[names["language"]]):
                    first_of_language.setdefault(language, start + row)
            if "text" in names:
                facts.num_texts += len(table) - table[names["text"]].null_count
                blank = _first_without_words(table[names["text"]]) if require_text else None
                if blank is not None:
                    where = f"{self}:row {start + blank}"
                    raise ValueError(f"{where}: this set needs a transcript: its `{names['text']}` is empty")
        if require_text and "text" not in names:
            raise ValueError(f"{self}: this set needs transcripts: name the column with text=COLUMN")
        self._check_ids(np.frombuffer(hashes, np.int64))
        facts.ids_digest = digest.hexdigest() if "id" in names else None
        # Read as utterances, so that a language that is not known is told now.
        facts.languages = [(self[position].language, position) for position in first_of_language.values()]
        return facts

    def _check_ids(self, hashes: np.ndarray) -> None:
        first: dict[str, int] = {}
        for position in positions_of_repeated(hashes):
            utterance_id = self[position].id
            if utterance_id in first:
                raise ValueError(
                    f"{self}:row {position}: id {utterance_id!r} is already that of row {first[utterance_id]}: take another "
                    "column with id=COLUMN, or number the rows with id= (and no name)"
                )
            first[utterance_id] = position


def _first_rows(values: Any) -> list[tuple[Any, int]]:
    """(value, first row with it) of each value of an arrow column; None is one."""
    rows = ((v, pc.index(values, v) if v.is_valid else pc.index(pc.is_null(values), True)) for v in values.unique())
    return [(value.as_py(), row.as_py()) for value, row in rows]


def _first_without_words(texts: Any) -> int | None:
    """Row of the first text (of an arrow column) that is missing or blank."""
    blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(texts.cast("string"))), 0)
    row = pc.index(pc.fill_null(blank, True), True).as_py()
    return row if row >= 0 else None


class RowConverter:
    """Makes utterances of the rows of one data set."""

    def __init__(self, name: DataName, audio: str, features: Any, default_language: str | None) -> None:
        given = name.columns  # its sound is cut already: columns of times are used where they are named
        self.columns = replace(given, audio=audio, begin=given.begin or "", end=given.end or "")
        self.audio = audio
        self.features = features
        self.default_language = default_language
        self.folder = name.folder

    def columns_found(self, names: Sequence[str]) -> dict[str, str]:
        """{field: column}."""
        return self.columns.find((self.audio, *(name for name in names if name != self.audio)))

    def utterance(self, row: dict[str, Any], address: str, where: str, default_id: str) -> Utterance:
        """Raises ValueError naming `where` for a row that cannot be one."""
        values = plain_values(row, {key: self.features[key] for key in row})
        fields = self.columns.to_fields({**values, self.audio: address}, where)
        fields.setdefault("id", default_id)
        return to_utterance(fields, where, self.folder, self.default_language)


@lru_cache(maxsize=8)
def open_rows(path: str, split: str | None, subset: str | None, audio: str | None) -> tuple[datasets.Dataset, str]:
    """(data set with random access, its column of audio), once a process."""
    datasets.disable_progress_bars()
    data, column = open_data(path, split=split, audio=audio, streaming=False, subset=subset)
    return data, column


@lru_cache(maxsize=8)
def _sounds(path: str, split: str | None, subset: str | None, column: str) -> datasets.Dataset:
    return open_rows(path, split, subset, column)[0].select_columns([column])


def sound_of_row(address: str) -> io.BytesIO | str:
    """The sound in a row, for `data.sound`. Raises OSError where the row has none."""
    name, _, row = address.rpartition("#")
    parsed = parse_name(name)
    assert parsed.columns.audio is not None, "addresses name the column"
    data = _sounds(parsed.path, parsed.split, parsed.subset, parsed.columns.audio)
    return sound_of(data[int(row)][parsed.columns.audio], parsed.folder)


def sound_of(value: Any, folder: Path) -> io.BytesIO | str:
    """What a column of audio holds: the bytes of a file, or the path of one, which counts from `folder`.

    Raises OSError where it holds neither.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if isinstance(value, str) and value:
        return str(folder / value)
    raise OSError(errno.ENOENT, "the row has no audio")


def inline_sound(value: Any, folder: Path) -> tuple[str, str | None]:
    """(address of sound that travels with its utterance, an id made of the bytes); of a file its path, and None."""
    sound = sound_of(value, folder)
    if isinstance(sound, str):
        return sound, None
    content = sound.getvalue()
    return inline(content), hashlib.blake2b(content, digest_size=16).hexdigest()
