"""Kaldi data directories: wav.scp and, where they are there, segments, text, utt2spk, utt2lang and utt2dur."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

from data.import_audio import AudioStore, StoredAudio
from data.import_sources import Row, Source

# File: the column that its values become.
_LISTS = {"text": "text", "utt2spk": "speaker", "utt2lang": "language", "utt2dur": "duration"}


class _Entry(NamedTuple):
    where: str
    value: str


def read_kaldi(folder: Path, *, run_pipes: bool, audio_root: Path | None) -> Source:
    """The utterances of a data directory.

    run_pipes   whether the commands of wav.scp (`sph2pipe ... |`) may be run; as in Kaldi by the shell
    audio_root  where commands are run and relative paths begin; by default, as in Kaldi, the working directory, but
                files that are in the data directory go before

    Rows whose lists do not agree come first, marked as missing. Raises ValueError naming file and line for a line that
    is not of its list's form, for an id that a list has twice, for a command without run_pipes, and for archives.
    """
    recordings = _read_list(folder / "wav.scp")
    for name, entry in recordings.items():
        if entry.value.endswith("|") and not run_pipes:
            raise ValueError(
                f"{entry.where}: the audio of {name!r} is what a command prints ({entry.value}): read it, and if you "
                "trust it run it with pipes=run"
            )
        if not entry.value or re.search(r"\.ark:\d+$", entry.value):
            raise ValueError(f"{entry.where}: {name!r} needs the path of a sound file, found {entry.value!r}")
    segments_path = folder / "segments"
    segments = _read_list(segments_path) if segments_path.is_file() else None
    utterances = recordings if segments is None else segments
    lists = {name: _read_list(folder / name) for name in _LISTS if (folder / name).is_file()}
    problems = _problems(recordings, segments, lists)
    rows = _rows(recordings, segments, lists, audio_root or Path.cwd())
    return Source(_all_rows(problems, rows, utterances), audio_root or folder.absolute(), len(utterances))


def _all_rows(problems: list[Row], rows: Iterator[Row], utterances: dict[str, _Entry]) -> Iterator[Row]:
    yield from problems
    bad = {row.columns["id"] for row in problems}
    for row in rows:
        if row.columns["id"] not in bad:
            yield row


def _problems(
    recordings: dict[str, _Entry], segments: dict[str, _Entry] | None, lists: dict[str, dict[str, _Entry]]
) -> list[Row]:
    """A row for each utterance that one of the lists lacks; one for each utterance."""
    found: dict[str, Row] = {}
    main = "wav.scp" if segments is None else "segments"
    utterances = recordings if segments is None else segments
    for name, entries in lists.items():
        for held, held_in, lacking, lacks in ((entries, name, utterances, main), (utterances, main, entries, name)):
            for utterance, entry in held.items():
                if utterance not in lacking:
                    missing = (f"in {held_in} but not in {lacks}", f"utterance {utterance}")
                    found.setdefault(utterance, Row(entry.where, {"id": utterance}, None, missing))
    for utterance, entry in (segments or {}).items():
        recording = re.split(r"[ \t]", entry.value, maxsplit=1)[0]
        if recording not in recordings:
            missing = ("in segments but not in wav.scp", f"recording {recording} of utterance {utterance}")
            found.setdefault(utterance, Row(entry.where, {"id": utterance}, None, missing))
    return list(found.values())


def _rows(
    recordings: dict[str, _Entry],
    segments: dict[str, _Entry] | None,
    lists: dict[str, dict[str, _Entry]],
    command_folder: Path,
) -> Iterator[Row]:
    @lru_cache(maxsize=1)  # the segments of a recording follow one another
    def store_output(store: AudioStore, command: str) -> StoredAudio:
        return store.put_command(command, command_folder)

    for utterance, entry in (recordings if segments is None else segments).items():
        columns: dict[str, str | float] = {"id": utterance}
        for name, column in _LISTS.items():
            if utterance in lists.get(name, {}):
                columns[column] = lists[name][utterance].value
        recording = utterance
        if segments is not None:
            recording, columns["begin_time"], columns["end_time"] = _segment(entry)
        audio = recordings[recording].value if recording in recordings else ""
        columns["audio"] = audio
        if audio.endswith("|"):
            command = audio.removesuffix("|").strip()
            yield Row(entry.where, columns, partial(store_output, command=command))
        else:
            yield Row(entry.where, columns)


def _segment(entry: _Entry) -> tuple[str, float, float]:
    """(recording, begin, end); an end of -1 is the end of the recording."""
    parts = entry.value.split()
    try:
        recording, begin, end = parts
        return recording, float(begin), float(end)
    except ValueError:
        raise ValueError(
            f"{entry.where}: expected an utterance, a recording, its begin and its end in seconds, found "
            f"{entry.value!r} after the id: correct the line"
        ) from None


def _read_list(path: Path) -> dict[str, _Entry]:
    """{id: what follows it on its line}."""
    entries: dict[str, _Entry] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                if not line.strip():
                    raise ValueError(f"{where}: the line is empty: remove it")
                name, *rest = re.split(r"[ \t]+", line.strip(), maxsplit=1)
                if name in entries:
                    raise ValueError(f"{where}: {name!r} is already used ({entries[name].where}): remove one line")
                entries[name] = _Entry(where, "".join(rest))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not in UTF-8 ({error}): write it again") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}): check the path") from error
    return entries
