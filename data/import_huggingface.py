"""Hugging Face data sets on disk, read row by row: what `save_to_disk` wrote, and parquet files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from data.import_audio import AudioStore, StoredAudio
from data.import_columns import COLUMN_NAMES
from data.import_sources import Row, Source, choose_split


def read_huggingface(source: Path, *, split: str | None, audio: str | None) -> Source:
    """The rows of a split. Audio is never decoded by `datasets`, so its decoder need not be installed.

    audio   name of the column of audio; by default the one that is typed as audio, else one with a usual name

    Raises ValueError for a folder that cannot be read, and where the split or the column of audio is not clear.
    """
    datasets.disable_progress_bars()
    # Streamed: otherwise all of it is first copied into the cache.
    data, column = open_data(str(source), split=split, audio=audio, streaming=True)
    total = len(data) if isinstance(data, datasets.Dataset) else None
    name = f"{source}[{split}]" if split else str(source)
    return Source(_rows(data, column, name, str(source)), source.absolute(), total, column)


def open_data(
    source: str, *, split: str | None, audio: str | None, streaming: bool, subset: str | None = None
) -> tuple[Any, str]:
    """(data set, its column of audio): that column, not decoded, comes first, then those that hold plain values.

    source      a folder that `save_to_disk` wrote (which is never streamed), a parquet file, a folder of them, or a name
    streaming   read as it comes, without random access; else it is copied into the cache of `datasets` first

    Raises ValueError as `read_huggingface` does.
    """
    data = _open(Path(source), split, streaming, subset)
    features = data.features
    if features is None:
        raise ValueError(f"{source}: the types of its columns are not known: save it with save_to_disk")
    column = _audio_column(features, audio, source)
    if isinstance(features[column], datasets.Audio):
        data = data.cast_column(column, datasets.Audio(decode=False))
    plain = [name for name, type_ in features.items() if isinstance(type_, datasets.Value | datasets.ClassLabel)]
    return data.select_columns([column, *(name for name in plain if name != column)]), column


def _open(source: Path, split: str | None, streaming: bool, subset: str | None) -> Any:
    try:
        if (source / "dataset_dict.json").is_file() or (source / "state.json").is_file():
            data = datasets.load_from_disk(str(source))
        elif source.is_file():
            data = datasets.load_dataset("parquet", data_files=str(source), streaming=streaming)
        else:
            data = datasets.load_dataset(str(source), subset, streaming=streaming)
    except Exception as error:  # the library raises many kinds, its own and pyarrow's
        raise ValueError(
            f"{source}: is no Hugging Face data set that can be read ({reason(error, source)}): check it"
        ) from error
    if isinstance(data, dict):
        return choose_split(data, split, source)
    if split is not None:
        raise ValueError(f"split={split}: {source} has no splits: leave it out")
    return data


def reason(error: BaseException, source: Path) -> str:
    """What is behind an error of `datasets`, which wraps others; with the first parquet file here that has no good end."""
    while error.__cause__ is not None:
        error = error.__cause__
    files = [source] if source.is_file() else sorted(source.rglob("*.parquet"))
    damaged = next((file for file in files if file.suffix == ".parquet" and not _has_footer(file)), None)
    return f"{damaged}: {error}" if damaged else str(error) or type(error).__name__


def _has_footer(parquet: Path) -> bool:
    """Whether its last bytes say what it holds, as those of a truncated file do not."""
    try:
        pq.read_metadata(parquet)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def _audio_column(features: Any, audio: str | None, source: str) -> str:
    if audio:
        if audio not in features:
            raise ValueError(f"{source}: there is no column {audio!r}, only {', '.join(features)}: name one of these")
        return audio
    typed = [name for name, type_ in features.items() if isinstance(type_, datasets.Audio)]
    usual = [name for name in COLUMN_NAMES["audio"] if name in features]
    if not typed + usual:
        raise ValueError(f"{source}: no column of audio among {', '.join(features)}: name it with audio=COLUMN")
    return (typed + usual)[0]


def plain_values(row: dict[str, Any], features: Any) -> dict[str, Any]:
    """A row with the names of its class labels instead of their numbers."""
    labels = {key: type_ for key, type_ in features.items() if isinstance(type_, datasets.ClassLabel)}
    return {key: labels[key].int2str(v) if key in labels and v is not None else v for key, v in row.items()}


def _rows(data: Any, column: str, name: str, source: str) -> Iterator[Row]:
    rows = iter(data)
    for index in count():
        where = f"{name}:row {index}"
        try:
            values = next(rows, None)
        except Exception as error:  # as in _open
            why = reason(error, Path(source))
            raise ValueError(f"{where}: cannot be read ({why}): fetch the data set again") from error
        if values is None:
            return
        value = values[column]
        columns = plain_values(values, data.features)
        columns[column], sound = _sound(value)
        yield Row(where, columns, sound)


def _sound(value: Any) -> tuple[str, Callable[[AudioStore], StoredAudio] | None]:
    """(path, None) of an audio file, or ("", what stores the sound) of audio within the row."""
    if isinstance(value, bytes):
        return "", partial(AudioStore.put_bytes, content=value)
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return "", partial(AudioStore.put_bytes, content=value["bytes"])
        if value.get("array") is not None:
            rate = value.get("sampling_rate") or 0
            return "", partial(AudioStore.put_samples, samples=value["array"], sampling_rate=rate)
        value = value.get("path")
    return value or "", None
