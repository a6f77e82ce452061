"""Which column of a data set holds what, and the manifest fields that a row of it becomes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from opd.text import resolve_language

# Names that are looked for, in lower case, the first before the others.
COLUMN_NAMES: dict[str, tuple[str, ...]] = {
    "audio": ("audio", "path", "wav", "file", "filename", "file_name", "audio_filepath", "audio_path", "audio_file"),
    "text": ("text", "sentence", "transcript", "transcription", "normalized_text"),
    "id": ("id", "utt_id", "uttid", "utterance_id", "utt", "key"),
    "language": ("language", "locale", "lang"),
    "begin_time": ("begin_time", "start_time", "begin", "start", "offset"),
    "end_time": ("end_time", "end", "stop"),
    "duration": ("duration",),
}
_MANIFEST_FIELDS = frozenset({"id", "audio", "text", "language", "task", "begin_time", "end_time"})


@dataclass(frozen=True)
class Columns:
    """Columns that the user names. None: look for a usual name; an empty name: the data set has no such column.

    language        the language of all rows, instead of a column
    check_language  whether a language must be one of `opd.text.LANGUAGES`; it is then written as its ISO code
    """

    audio: str | None = None
    text: str | None = None
    id: str | None = None
    language_column: str | None = None
    begin: str | None = None
    end: str | None = None
    language: str | None = None
    check_language: bool = True

    def __post_init__(self) -> None:
        if self.language and self.language_column:
            raise ValueError("language= and language_column= are both given: give one of them")
        if self.language and self.check_language:
            try:
                resolve_language(self.language)
            except ValueError as error:
                raise ValueError(f"{error}, or keep it as it is with language_check=off") from error

    def to_fields(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The manifest fields of a row; `where` is "file:line" for messages.

        A start with a duration makes an end. Other columns are kept when they hold plain values; one that is named like
        a field of manifests but was not chosen for it becomes `source_<name>`.
        Raises ValueError for times that are no numbers and for a language that is not known.
        """
        try:
            found = _find(self, tuple(row))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        fields: dict[str, Any] = {"audio": row[found["audio"]], "text": row.get(found.get("text", ""))}
        if "id" in found and row[found["id"]] not in (None, ""):
            fields["id"] = str(row[found["id"]])
        fields["language"] = self._language(row.get(found.get("language", "")), where)
        for name in ("begin_time", "end_time", "duration"):
            fields[name] = _seconds(row.get(found.get(name, "")), found.get(name), where)
        begin_time, duration = fields["begin_time"], fields["duration"]
        if fields["end_time"] is None and begin_time is not None and begin_time >= 0 and duration is not None:
            fields["end_time"] = round(begin_time + duration, 6)
        for name, value in row.items():
            if name not in found.values() and _is_plain(value):
                fields[f"source_{name}" if name in _MANIFEST_FIELDS else name] = value
        return {name: value for name, value in fields.items() if value is not None}

    def find(self, names: tuple[str, ...]) -> dict[str, str]:
        """{field: column} for a row with these columns. Raises ValueError where a column is not there."""
        return _find(self, names)

    def _language(self, value: Any, where: str) -> str | None:
        value = self.language or value
        if value in (None, ""):
            return None
        if not self.check_language:
            return str(value)
        try:
            return resolve_language(str(value)).iso
        except ValueError as error:
            raise ValueError(f"{where}: {error}, or keep it as it is with language_check=off") from error


@lru_cache(maxsize=64)
def _find(columns: Columns, names: tuple[str, ...]) -> dict[str, str]:
    """{field: column} for the columns of a row."""
    by_lower_case = {name.lower(): name for name in reversed(names)}
    given = {
        "audio": columns.audio,
        "text": columns.text,
        "id": columns.id,
        "language": "" if columns.language else columns.language_column,
        "begin_time": columns.begin,
        "end_time": columns.end,
        "duration": None,
    }
    found = {}
    for field, name in given.items():
        if name is not None and name not in (*names, ""):
            raise ValueError(f"there is no column {name!r}, only {', '.join(names)}: name one of these")
        candidates = COLUMN_NAMES[field] if name is None else ()
        column = name or next((by_lower_case[c] for c in candidates if c in by_lower_case), None)
        if column:
            found[field] = column
    if "audio" not in found:
        raise ValueError(f"no column of audio among {', '.join(names)}: name it with audio=COLUMN")
    return found


def _seconds(value: Any, column: str | None, where: str) -> float | None:
    if value in (None, ""):
        return None
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds) or isinstance(value, bool):
        raise ValueError(f"{where}: `{column}` must be seconds, found {value!r}: correct it or name another column")
    return seconds


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and value != ""
