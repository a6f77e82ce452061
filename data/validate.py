"""Checks manifests before a training run: every line, every audio file, every text, and what sets have in common.

    python -m data.validate manifest.jsonl [more.jsonl ...] [report=report.json] [max_seconds=30] [min_seconds=0.1]
                            [workers=2] [fail_on=error|warning]

The exit status is 0 where nothing was found, 1 for errors (with fail_on=warning also for warnings), 2 for wrong usage.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from data.checks import LEVELS, Checked, Limits, check_utterance
from data.command_line import check_writable, key_values, one_of, wants_help
from data.manifest import parse_line, to_utterance
from data.validation_report import Finding, Totals, print_report, write_report
from opd.types import Utterance

_KEYS = ("report", "max_seconds", "min_seconds", "workers", "fail_on")


class Place(NamedTuple):
    """A line of a manifest."""

    file: str
    line: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass
class Validation:
    """What is known of the manifests read so far. Texts are kept as digests: a large set has millions."""

    findings: list[Finding] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    _place_of_id: dict[str, Place] = field(default_factory=dict)
    _place_of_segment: dict[tuple[str, float, float], Place] = field(default_factory=dict)
    _place_of_content: dict[bytes, Place] = field(default_factory=dict)
    _texts: set[bytes] = field(default_factory=set)

    def add_manifest(self, path: Path, results: Iterable[tuple[int, Utterance | None, Checked]]) -> None:
        """Takes up the lines of a manifest: the number, the utterance (None for a bad line), and its checks."""
        num_lines, with_text = 0, 0
        without_text: list[Place] = []
        for line, utterance, checked in results:
            num_lines += 1
            place = Place(str(path), line)
            if utterance is None:
                for kind, message in checked.findings:
                    self.report(place, None, kind, message)
            else:
                self.add(place, utterance, checked)
                with_text += utterance.text is not None
                if utterance.text is None:
                    without_text.append(place)
        if without_text and with_text:
            message = f"{len(without_text)} utterances have no text, this one first, though {with_text} have one"
            self.report(without_text[0], None, "missing_text", message)
        if not num_lines:
            self.report(Place(str(path), 1), None, "empty_manifest", "there are no utterances: one JSON object a line")

    def report(self, place: Place, utterance_id: str | None, kind: str, message: str) -> None:
        self.findings.append(Finding(place.file, place.line, utterance_id, LEVELS[kind], kind, message))

    def add(self, place: Place, utterance: Utterance, checked: Checked) -> None:
        """Takes up one utterance and compares it with all before it."""
        for kind, message in checked.findings:
            self.report(place, utterance.id, kind, message)
        self._compare(place, utterance, checked)
        self.totals.add(utterance, checked)
        if utterance.text and utterance.text.strip():
            text = " ".join(utterance.text.split()).casefold().encode("utf-8", "surrogatepass")
            digest = hashlib.blake2b(text, digest_size=16).digest()
            self.totals.repeated_texts += digest in self._texts
            self._texts.add(digest)

    def _compare(self, place: Place, utterance: Utterance, checked: Checked) -> None:
        first = self._place_of_id.setdefault(utterance.id, place)
        if first != place:
            kind = "duplicate_id" if first.file == place.file else "shared_id"
            self.report(place, utterance.id, kind, f"the id is already used by {first}")
        first, how = place, ""
        if checked.segment is not None:
            first, how = self._place_of_segment.setdefault(checked.segment, place), "segment of the same file"
        if checked.content is not None:
            same_samples = self._place_of_content.setdefault(checked.content, place)
            if first == place:
                first, how = same_samples, "samples, in another file or segment"
        if first != place:
            kind = "repeated_audio" if first.file == place.file else "shared_audio"
            self.report(place, utterance.id, kind, f"the same audio as {first} (the same {how})")


def validate(manifests: Sequence[str | os.PathLike], limits: Limits | None = None, workers: int = 2) -> Validation:
    """Checks all lines of all manifests with `workers` threads, and goes on after whatever it finds.

    Raises ValueError for a manifest that cannot be opened or is given twice.
    """
    paths = [Path(manifest) for manifest in manifests]
    if len({path.resolve() for path in paths}) < len(paths):
        raise ValueError("a manifest is given twice: give each once, as all of its utterances would be shared")
    limits, validation = limits or Limits(), Validation()
    with _progress() as progress, ThreadPoolExecutor(workers) as pool:
        for path in paths:
            total = sum(1 for _ in _lines(path))
            results = progress.track(_results(path, limits, pool, 8 * workers), total=total, description=path.name)
            validation.add_manifest(path, results)
    return validation


def _results(
    path: Path, limits: Limits, pool: ThreadPoolExecutor, window: int
) -> Iterator[tuple[int, Utterance | None, Checked]]:
    """(line, utterance or None, checks) of each line in order, with at most `window` of them under way."""
    pending: deque[tuple[int, Future]] = deque()
    for number, line in _lines(path):
        if len(pending) == window:
            first, result = pending.popleft()
            yield first, *result.result()
        pending.append((number, pool.submit(_check_line, line, f"{path}:{number}", path.absolute().parent, limits)))
    for first, result in pending:
        yield first, *result.result()


def _check_line(line: bytes, where: str, folder: Path, limits: Limits) -> tuple[Utterance | None, Checked]:
    try:
        utterance = to_utterance(parse_line(line, where), where, folder)
    except ValueError as error:
        return None, Checked([("bad_line", str(error).removeprefix(f"{where}: "))])
    return utterance, check_utterance(utterance, limits)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each line that is not blank."""
    try:
        with open(path, "rb") as file:
            yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())
    except OSError as error:
        raise ValueError(f"manifest {path} cannot be read ({error.strerror}): check the path") from error


def _progress() -> Progress:
    """On a terminal only."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())


def _seconds(values: dict[str, str], key: str, default: float) -> float:
    try:
        value = float(values.get(key, default))
    except ValueError:
        value = math.nan
    if not value >= 0:
        raise ValueError(f"{key}={values[key]}: must be a number of seconds from 0 on")
    return value


def main(argv: Sequence[str]) -> int:
    """Command line; returns the exit status."""
    if wants_help(argv):
        print(__doc__)
        return 0
    try:
        options = [argument for argument in argv if "=" in argument and not os.path.exists(argument)]
        manifests = [argument for argument in argv if argument not in options]
        values = key_values(options, _KEYS)
        limits = Limits(_seconds(values, "min_seconds", 0.1), _seconds(values, "max_seconds", 30.0))
        fail_on = one_of(values, "fail_on", "error", "warning")
        workers = values.get("workers", "2")
        if not workers.isdecimal() or int(workers) < 1:
            raise ValueError(f"workers={workers}: must be a whole number from 1 on")
        if not manifests:
            raise ValueError("no manifest is given: python -m data.validate manifest.jsonl [more.jsonl ...]")
        report = Path(values["report"]) if values.get("report") else None
        if report is not None:
            check_writable("report=", report)
        validation = validate(manifests, limits, int(workers))
        print_report(validation.findings, validation.totals)
        if report is not None:
            write_report(report, manifests, validation.findings, validation.totals)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    levels = {finding.level for finding in validation.findings}
    return int("error" in levels or fail_on in levels)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
