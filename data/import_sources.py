"""Data sets as rows: which format a path holds, tables (CSV, TSV), and JSON lines as NeMo and audio folders have them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.import_audio import AudioStore, StoredAudio
from data.manifest import parse_line

FORMATS = ("auto", "huggingface", "kaldi", "table", "nemo", "webdataset")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_JSON_SUFFIXES = (".json", ".jsonl")
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")


class Row(NamedTuple):
    """One row of a data set.

    where     "file:line" for messages
    columns   by name; values that are not plain are dropped later
    sound     makes an audio file of sound that is no file yet
    missing   (reason, detail) where the row cannot become an utterance
    """

    where: str
    columns: dict[str, Any]
    sound: Callable[[AudioStore], StoredAudio] | None = None
    missing: tuple[str, str] | None = None


class Source(NamedTuple):
    """The rows of a data set.

    root          what relative paths of audio count from
    total         number of rows, where it is known beforehand
    audio_column  where the data set itself says which column that is. Its sound then has no name that could be the id,
                  and is cut already: columns of times are not looked for
    """

    rows: Iterable[Row]
    root: Path
    total: int | None = None
    audio_column: str | None = None


def detect_format(source: Path) -> str:
    """huggingface, kaldi, table, nemo or webdataset. Raises ValueError where nothing of these is to be seen."""
    if source.is_file():
        suffix = source.suffix.lower()
        if suffix in _DELIMITERS:
            return "table"
        if suffix in _JSON_SUFFIXES:
            return "nemo"
        if suffix == ".parquet":
            return "huggingface"
        if suffix == ".tar":
            return "webdataset"
    elif not source.is_dir():
        raise ValueError(f"source={source}: there is nothing there: check the path")
    elif (source / "wav.scp").is_file():
        return "kaldi"
    elif (
        any((source / name).is_file() for name in ("dataset_dict.json", "state.json"))
        or metadata_files(source)
        or next(source.rglob("*.parquet"), None)
    ):
        return "huggingface"
    elif next(source.glob("*.tar"), None):
        return "webdataset"
    raise ValueError(
        f"source={source}: neither a .csv, .tsv, .json, .jsonl, .parquet or .tar file nor a folder with wav.scp (Kaldi), "
        "dataset_dict.json or state.json (save_to_disk), metadata.csv or metadata.jsonl (audio folder), .parquet or .tar "
        "files: check the path, or say format=..."
    )


def metadata_files(folder: Path) -> dict[str, Path]:
    """{split: metadata file} of an audio folder; the split of a file in the folder itself is ""."""
    files = {}
    for place in [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]:
        for name in METADATA_NAMES:
            if (place / name).is_file():
                files["" if place == folder else place.name] = place / name
    return files


def read_audio_folder(folder: Path, split: str | None) -> Source:
    """An audio folder by its metadata file. Raises ValueError where the split is not clear.

    Without the `datasets` library, whose audio folders cannot be read without a decoder of its own.
    """
    path = choose_split(metadata_files(folder), split, folder)
    return read_table(path) if path.suffix == ".csv" else read_json_lines(path)


def choose_split(splits: dict[str, Any], split: str | None, where: Path) -> Any:
    """The value of `split`, or the only one. Raises ValueError that lists the splits."""
    if split is None and len(splits) == 1:
        return next(iter(splits.values()))
    if split not in splits:
        said = "there are several splits" if split is None else f"there is no split {split!r}"
        raise ValueError(f"{where}: {said}: choose with split= from {', '.join(filter(None, splits)) or 'none'}")
    return splits[split]


def read_table(path: Path) -> Source:
    """A .csv with the usual quoting, or a .tsv, whose fields stand as they are (as in Common Voice). Needs a header."""
    suffix = path.suffix.lower()
    if suffix not in _DELIMITERS:
        raise ValueError(f"{path}: a table ends in .csv or .tsv: rename it")
    return Source(_table_rows(path, _DELIMITERS[suffix]), path.absolute().parent)


def _table_rows(path: Path, delimiter: str) -> Iterator[Row]:
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    reader: Any = None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
            header: list[str] = next(reader, [])
            if not header or len(set(header)) < len(header) or "" in header:
                raise ValueError(f"{path}:1: the header must name every column once, found {header}: correct it")
            line = reader.line_num + 1
            for cells in reader:
                if cells and len(cells) != len(header):
                    raise ValueError(f"{path}:{line}: {len(cells)} cells, but the header has {len(header)}: correct it")
                if cells:
                    yield Row(f"{path}:{line}", dict(zip(header, cells, strict=True)))
                line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        line = reader.line_num if reader is not None else 1
        raise ValueError(f"{path}:{line}: not a table in UTF-8 ({error}): write it again") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from error


def read_json_lines(path: Path) -> Source:
    """JSON lines: a NeMo manifest, the metadata.jsonl of an audio folder, or a manifest of ours."""
    return Source(_json_rows(path), path.absolute().parent)


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}:{number}"
                    fields = parse_line(line, where)
                    for name in ("audio_filepath", "audio", "file_name"):
                        if not isinstance(fields.get(name, ""), str):
                            raise ValueError(
                                f"{where}: `{name}` must be one path, found {json.dumps(fields[name])}: correct it"
                            )
                    yield Row(where, fields)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from error
