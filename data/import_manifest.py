"""Makes a manifest from a Hugging Face data set, a Kaldi data directory, a table, a NeMo manifest or WebDataset shards.

    python -m data.import_manifest source=PATH out=manifest.jsonl [key=value ...]

    format=auto|huggingface|kaldi|table|nemo|webdataset      split=train      audio_root=FOLDER   audio_dir=FOLDER
    audio= text= id= begin= end= language_column=   names of columns; nothing after the sign: there is no such column
    language=de    language_check=on|off    missing=error|skip    pipes=refuse|run    overwrite=true

Audio files, and those within tar files, stay where they are. Sound that is no file yet (in parquet or arrow files,
behind Kaldi's commands) is written to `audio_dir`, and found there again when an import is repeated. `ImportOptions`
says what the keys mean.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data.command_line import check_writable, key_values, one_of, wants_help
from data.import_audio import AudioStore, Skipped
from data.import_columns import Columns
from data.import_kaldi import read_kaldi
from data.import_shards import read_shards
from data.import_sources import (
    FORMATS,
    Row,
    Source,
    detect_format,
    metadata_files,
    read_audio_folder,
    read_json_lines,
    read_table,
)
from data.manifest import to_utterance, write_manifest
from data.sound import file_of
from opd.types import Utterance

_COLUMN_KEYS = ("audio", "text", "id", "language_column", "begin", "end", "language")
_KEYS = (
    "source", "out", "format", "split", *_COLUMN_KEYS, "audio_root", "audio_dir", "missing", "pipes", "language_check",
    "overwrite",
)  # fmt: skip


@dataclass(frozen=True)
class ImportOptions:
    """How a data set is read.

    format      one of FORMATS
    split       of a Hugging Face data set that has several
    columns     which columns hold what
    audio_root  what relative paths of audio count from, itself relative to the data set; by default the data set's
                folder and, for files that are only there, the working directory
    audio_dir   where sound that is no file yet is written; by default `<out>_audio` beside the manifest
    skip        whether rows whose audio or entry is missing or cannot be read are left out instead of refused
    run_pipes   whether the commands of Kaldi's wav.scp may be run
    overwrite   whether an existing manifest may be replaced
    """

    format: str = "auto"
    split: str | None = None
    columns: Columns = Columns()
    audio_root: Path | None = None
    audio_dir: Path | None = None
    skip: bool = False
    run_pipes: bool = False
    overwrite: bool = False


@dataclass
class ImportSummary:
    """What an import brought; `seconds` counts the `timed` utterances, whose length is known."""

    utterances: int = 0
    seconds: float = 0.0
    timed: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, utterance: Utterance) -> None:
        self.utterances += 1
        self.languages[utterance.language or "none"] += 1
        seconds = _seconds(utterance)
        if seconds is not None:
            self.seconds += seconds
            self.timed += 1

    def lines(self) -> list[str]:
        hours = f"{self.seconds / 3600:.2f} h" if self.timed else "length not known"
        if 0 < self.timed < self.utterances:
            hours += f" in the {self.timed} whose length is known"
        skipped = ", ".join(f"{count} {reason}" for reason, count in self.skipped.most_common()) or "none"
        return [
            f"{self.utterances} utterances, {hours}",
            "languages: " + ", ".join(f"{name} {count}" for name, count in self.languages.most_common()),
            f"skipped: {skipped}",
        ]


def import_manifest(
    source: str | os.PathLike, out: str | os.PathLike, options: ImportOptions | None = None
) -> ImportSummary:
    """Writes the manifest `out` of the data set `source`, in one step when all rows are read.

    Raises ValueError naming file and line (or row) for whatever is wrong; `out` is then as it was before.
    """
    source, out, options = Path(source), Path(out), options or ImportOptions()
    if out.exists() and not options.overwrite:
        raise ValueError(f"out={out}: exists already: choose another name, or replace it with overwrite=true")
    check_writable("out=", out)
    store = AudioStore((options.audio_dir or out.with_name(f"{out.stem}_audio")).absolute())
    rows = _open_source(source, options)
    if rows.audio_column is not None:
        given = options.columns
        columns = replace(given, audio=rows.audio_column, begin=given.begin or "", end=given.end or "")
        options = replace(options, columns=columns)
    summary = ImportSummary()
    write_manifest(out, _utterances(rows, options, store, summary, out.stem))
    return summary


def _open_source(source: Path, options: ImportOptions) -> Source:
    format = detect_format(source) if options.format == "auto" else options.format
    if options.split is not None and format != "huggingface":
        raise ValueError(f"split={options.split}: only a Hugging Face data set has splits: leave it out")
    folder = source.absolute() if source.is_dir() else source.absolute().parent
    audio_root = None if options.audio_root is None else folder / options.audio_root
    if audio_root is not None and not audio_root.is_dir():
        raise ValueError(f"audio_root={options.audio_root}: there is no folder {audio_root}: it counts from {folder}")
    if format == "kaldi":
        return read_kaldi(source, run_pipes=options.run_pipes, audio_root=audio_root)
    if format == "table":
        opened = read_table(source)
    elif format == "webdataset":
        opened = read_shards(source)
    elif format == "nemo":
        opened = read_json_lines(source)
    elif source.is_dir() and metadata_files(source):
        opened = read_audio_folder(source, options.split)
    else:
        # Here, because `datasets` takes seconds to import.
        from data.import_huggingface import read_huggingface

        opened = read_huggingface(source, split=options.split, audio=options.columns.audio)
    return opened if audio_root is None else opened._replace(root=audio_root)


def _utterances(
    rows: Source, options: ImportOptions, store: AudioStore, summary: ImportSummary, name: str
) -> Iterator[Utterance]:
    seen: set[str] = set()
    with _progress() as progress:
        for number, row in enumerate(progress.track(rows.rows, total=rows.total, description="import")):
            try:
                utterance = _utterance(row, f"{name}-{number:08d}", rows, options, store)
            except Skipped as error:
                if not options.skip:
                    raise ValueError(
                        f"{row.where}: {error}: correct it, or leave such rows out with missing=skip"
                    ) from error
                summary.skipped[error.reason] += 1
                continue
            if utterance.id in seen:
                raise ValueError(
                    f"{row.where}: id {utterance.id!r} occurs a second time: take another column with id=COLUMN, or "
                    "number the rows with id= (and no name)"
                )
            seen.add(utterance.id)
            summary.add(utterance)
            yield utterance
    if not summary.utterances:
        raise ValueError(f"there are no utterances to write ({summary.lines()[-1]}): check the source")


def _utterance(row: Row, numbered_id: str, rows: Source, options: ImportOptions, store: AudioStore) -> Utterance:
    if row.missing:
        raise Skipped(*row.missing)
    fields = options.columns.to_fields(row.columns, row.where)
    root = rows.root
    if row.sound is not None:
        stored = row.sound(store)
        fields["audio"] = str(stored.path)
        if "begin_time" not in fields and "end_time" not in fields:
            fields.setdefault("duration", round(stored.seconds, 4))
    elif not isinstance(fields.get("audio"), str) or not fields["audio"]:
        raise Skipped("no audio", "the row names no audio")
    else:
        root = _folder_of(fields["audio"], rows.root, options.audio_root is not None)
    if "id" not in fields and (rows.audio_column is not None or options.columns.id == ""):
        fields["id"] = numbered_id
    return to_utterance(fields, row.where, root)


def _folder_of(audio: str, root: Path, strict: bool) -> Path:
    """The folder from which the path `audio` leads to a file."""
    for folder in (root,) if strict else (root, Path.cwd()):
        if os.path.isfile(file_of(str(folder / audio)) or ""):
            return folder
    hint = "" if strict or os.path.isabs(audio) else f" from {root}; audio_root= names another folder"
    raise Skipped("audio file not found", f"{audio}{hint}")


def _seconds(utterance: Utterance) -> float | None:
    if utterance.end_time >= 0:
        return utterance.end_time - max(0.0, utterance.begin_time)
    seconds = utterance.extra.get("duration")
    return seconds if utterance.begin_time <= 0 else None


def _progress() -> Progress:
    """On a terminal only."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


def parse_options(values: dict[str, str]) -> ImportOptions:
    """The options of a command line. Raises ValueError for a value that is none of a key's."""
    columns: dict[str, Any] = {key: values[key] for key in _COLUMN_KEYS if key in values}
    return ImportOptions(
        format=one_of(values, "format", *FORMATS),
        split=values.get("split"),
        columns=Columns(**columns, check_language=one_of(values, "language_check", "on", "off") == "on"),
        audio_root=Path(values["audio_root"]) if values.get("audio_root") else None,
        audio_dir=Path(values["audio_dir"]) if values.get("audio_dir") else None,
        skip=one_of(values, "missing", "error", "skip") == "skip",
        run_pipes=one_of(values, "pipes", "refuse", "run") == "run",
        overwrite=one_of(values, "overwrite", "false", "true") == "true",
    )


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    if wants_help(argv):
        print(__doc__)
        return 0
    try:
        values = key_values(argv, _KEYS)
        for key in ("source", "out"):
            if not values.get(key):
                raise ValueError(f"{key}=... is missing: python -m data.import_manifest source=PATH out=manifest.jsonl")
        os.environ["HF_HUB_OFFLINE"] = "1"
        summary = import_manifest(values["source"], values["out"], parse_options(values))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "error: interrupted, no manifest is written; audio that is written is kept for the next try",
            file=sys.stderr,
        )
        return 130
    print("\n".join([f"manifest: {values['out']}", *summary.lines()]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
