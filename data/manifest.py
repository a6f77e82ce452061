"""Manifests: JSON lines, one utterance a line, read strictly so that a bad line is named before training starts."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.sound import is_path
from opd.types import Utterance

_KNOWN_FIELDS = frozenset({"id", "audio", "text", "language", "task", "begin_time", "end_time"})
_UNSET_TIME = -1.0


def read_manifest(
    path: str | Path, *, require_text: bool = False, default_language: str | None = None
) -> list[Utterance]:
    """Read a JSONL manifest. Only `audio` is required; other fields than Utterance's are kept in `extra`.

    A relative `audio` is resolved against the manifest's folder; the default `id` is the audio path as written, plus
    the times. `begin_time` and `end_time` are seconds, -1 or absent for the start and the end. Blank lines are skipped.
    Raises ValueError naming file and line for whatever is wrong.
    """
    path = Path(path)
    utterances: list[Utterance] = []
    line_of_id: dict[str, int] = {}
    for number, fields in _read_lines(path):
        utterance = to_utterance(fields, f"{path}:{number}", path.absolute().parent, default_language)
        if require_text and not (utterance.text and utterance.text.strip()):
            raise missing_text(f"{path}:{number}")
        if utterance.id in line_of_id:
            raise duplicate_id(path, utterance.id, line_of_id[utterance.id], number)
        line_of_id[utterance.id] = number
        utterances.append(utterance)
    return utterances


def read_rows(
    path: str | Path, field_names: Mapping[str, str] | None = None, default_language: str | None = None
) -> list[tuple[dict[str, Any], Utterance]]:
    """Each line of a JSONL manifest as written, with the utterance it describes; ids may repeat.

    field_names says where a file keeps `audio`, `text`, `begin_time` or `end_time` under another name. A relative
    `audio` is one of the manifest's folder, or of the working directory where only that exists.
    Raises ValueError naming file and line for whatever is wrong.
    """
    path = Path(path)
    folder = path.absolute().parent
    names = dict(field_names or {})
    rows = []
    for number, fields in _read_lines(path):
        taken = {own: fields.get(theirs) for own, theirs in names.items()}
        where = f"{path}:{number}"
        if names.get("audio", "audio") not in fields:
            raise ValueError(f"{where}: lacks `{names.get('audio', 'audio')}`: give the path of the sound file")
        utterance = to_utterance({**fields, **taken}, where, folder, default_language)
        written = str(taken.get("audio") or fields["audio"])
        if not os.path.exists(utterance.audio) and os.path.exists(written):
            utterance = replace(utterance, audio=os.path.abspath(written))
        rows.append((fields, utterance))
    return rows


def write_manifest(path: str | Path, utterances: Iterable[Utterance]) -> None:
    """Write a manifest that `read_manifest` reads back as the same utterances, replacing `path` in one step.

    Audio under the manifest's folder is written relative to it, so that the folder can be moved; a relative `audio` is
    written unchanged and so counts from that folder. Raises ValueError where `extra` holds a field of Utterance itself.
    """
    path = Path(path)
    folder = path.absolute().parent
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            for utterance in utterances:
                file.write(json.dumps(_to_fields(utterance, folder), ensure_ascii=False) + "\n")
        umask = os.umask(0)  # mkstemp makes a private file; a manifest gets the usual mode
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _read_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of each line that is not blank."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise unreadable(path, error) from error
    parsed = [
        (number, parse_line(line, f"{path}:{number}")) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not parsed:
        raise no_utterances(path)
    return parsed


def unreadable(path: Path, error: OSError) -> ValueError:
    return ValueError(f"manifest {path} cannot be read ({error.strerror}): check the path")


def no_utterances(path: Path) -> ValueError:
    return ValueError(f"manifest {path} has no utterances: write one JSON object per line")


def missing_text(where: str) -> ValueError:
    return ValueError(f"{where}: this set needs a transcript: give the line a non-empty `text`")


def duplicate_id(path: Path, utterance_id: str, first: int, second: int) -> ValueError:
    """Two lines (by their numbers) have one id."""
    return ValueError(
        f"{path}:{second}: id {utterance_id!r} is already used on line {first} ({path}:{first}): "
        "remove one of the two lines or give them different `id`s"
    )


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a line. `where` is "file:line" for messages. Raises ValueError for anything else."""
    try:
        fields = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{where}: not a JSON object in UTF-8 ({error}): each line is one {{...}}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: expected a JSON object, found {type(fields).__name__}: each line is one {{...}}")
    return fields


def to_utterance(fields: dict[str, Any], where: str, folder: Path, default_language: str | None = None) -> Utterance:
    """The utterance that the fields of a line describe; a relative `audio` counts from `folder`.

    `where` is "file:line" for messages. Raises ValueError for whatever is wrong.
    """
    audio = _string(fields, "audio", where)
    if not audio:
        raise ValueError(f"{where}: lacks `audio`: give the path of the sound file")
    task = _string(fields, "task", where) or "asr"
    if task.lower() != "asr":
        raise ValueError(f"{where}: `task` is {task!r}, but only 'asr' is supported: remove the line or the field")
    begin_time, end_time = _time(fields, "begin_time", where), _time(fields, "end_time", where)
    if _UNSET_TIME not in (begin_time, end_time) and begin_time >= end_time:
        raise ValueError(f"{where}: `begin_time` {begin_time} is not before `end_time` {end_time}: correct the times")
    return Utterance(
        id=_string(fields, "id", where) or _default_id(audio, begin_time, end_time),
        audio=os.path.join(folder, audio) if is_path(audio) else audio,  # `join` keeps an absolute path
        text=_string(fields, "text", where),
        language=_string(fields, "language", where) or default_language,
        task="asr",
        begin_time=begin_time,
        end_time=end_time,
        extra={key: value for key, value in fields.items() if key not in _KNOWN_FIELDS},
    )


def _string(fields: dict[str, Any], key: str, where: str) -> str | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: `{key}` must be a string, found {json.dumps(value)}: put it in quotes")
    return value


def _time(fields: dict[str, Any], key: str, where: str) -> float:
    value = fields.get(key)
    if value is None:
        return _UNSET_TIME
    # bool is an int to Python, and json reads NaN and Infinity.
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
    if not is_number or (value < 0 and value != _UNSET_TIME):
        raise ValueError(f"{where}: `{key}` must be seconds from 0 on, or -1 for none, found {json.dumps(value)}")
    return float(value)


def _default_id(audio: str, begin_time: float, end_time: float) -> str:
    """From the path as written, so that moving the folder keeps the ids."""
    if begin_time == end_time == _UNSET_TIME:
        return audio
    begin = "" if begin_time == _UNSET_TIME else str(begin_time)
    end = "" if end_time == _UNSET_TIME else str(end_time)
    return f"{audio}@{begin}-{end}"


def _to_fields(utterance: Utterance, folder: Path) -> dict[str, Any]:
    clash = sorted(_KNOWN_FIELDS & utterance.extra.keys())
    if clash:
        raise ValueError(f"utterance {utterance.id!r}: `extra` may not hold {', '.join(clash)}: set the field itself")
    audio = Path(utterance.audio)
    fields: dict[str, Any] = {
        "id": utterance.id,
        "audio": str(audio.relative_to(folder)) if audio.is_relative_to(folder) else utterance.audio,
        "text": utterance.text,
        "task": utterance.task,
        "language": utterance.language,
    }
    fields = {key: value for key, value in fields.items() if value is not None}
    for key in ("begin_time", "end_time"):
        value = getattr(utterance, key)
        if not math.isclose(value, _UNSET_TIME):
            fields[key] = value
    return {**fields, **utterance.extra}
