"""What a validation found, for a person at the terminal and as JSON."""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from data.checks import LEVELS, Checked
from opd.types import Utterance

NUM_EXAMPLES = 3
PERCENTILES = {"min": 0, "p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong in line `line` (from 1) of manifest `file`; level is error or warning, kind one of LEVELS."""

    file: str
    line: int
    id: str | None
    level: str
    kind: str
    message: str


@dataclass
class Totals:
    """Sums over all utterances; durations are of those whose audio could be opened, in seconds."""

    utterances: int = 0
    without_text: int = 0
    without_language: int = 0
    repeated_texts: int = 0
    durations: array[float] = field(default_factory=lambda: array("d"))
    seconds_of_language: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    utterances_of_language: Counter[str] = field(default_factory=Counter)
    sampling_rates: Counter[int] = field(default_factory=Counter)

    def add(self, utterance: Utterance, checked: Checked) -> None:
        self.utterances += 1
        self.without_text += utterance.text is None
        self.without_language += utterance.language is None
        language = checked.language or "none"
        self.utterances_of_language[language] += 1
        if checked.seconds is not None and checked.sampling_rate is not None:
            self.durations.append(checked.seconds)
            self.seconds_of_language[language] += checked.seconds
            self.sampling_rates[checked.sampling_rate] += 1

    def percentiles(self) -> dict[str, float]:
        """Seconds; empty where no audio could be opened."""
        if not self.durations:
            return {}
        values = np.percentile(np.asarray(self.durations), list(PERCENTILES.values()))
        return {name: round(float(value), 3) for name, value in zip(PERCENTILES, values, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        return {
            "utterances": self.utterances,
            "hours": round(sum(self.durations) / 3600, 4),
            "languages": {
                name: {"utterances": count, "hours": round(self.seconds_of_language[name] / 3600, 4)}
                for name, count in self.utterances_of_language.most_common()
            },
            "duration_seconds": self.percentiles(),
            "sampling_rates": {str(rate): count for rate, count in self.sampling_rates.most_common()},
            "without_text": self.without_text,
            "without_language": self.without_language,
            "repeated_texts": self.repeated_texts,
        }


def count_kinds(findings: Sequence[Finding]) -> dict[str, int]:
    """{kind: findings}, errors first, in the order of LEVELS."""
    counts = Counter(finding.kind for finding in findings)
    return {kind: counts[kind] for kind in sorted(LEVELS, key=lambda kind: LEVELS[kind] != "error") if counts[kind]}


def write_report(path: Path, manifests: Sequence[str], findings: Sequence[Finding], totals: Totals) -> None:
    """Totals, counts and every finding as one JSON object, replacing `path` in one step."""
    content = {
        "manifests": list(manifests),
        "totals": totals.to_dict(),
        "counts": count_kinds(findings),
        "findings": [asdict(finding) for finding in findings],
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)  # in ASCII: a manifest may hold what is no text in UTF-8
            file.write("\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def print_report(findings: Sequence[Finding], totals: Totals) -> None:
    """Tables of the findings by kind, with the first few of each, and of the languages."""
    console = Console(width=120, highlight=False)
    counts = count_kinds(findings)
    if counts:
        table = Table("level", "kind", title="Findings")
        table.add_column("count", justify="right")
        table.add_column("the first of them", overflow="fold")
        for kind, count in counts.items():
            examples = [finding for finding in findings if finding.kind == kind][:NUM_EXAMPLES]
            lines = "\n".join(f"{finding.file}:{finding.line}: {finding.message}" for finding in examples)
            # As Text: brackets in a message are no markup. Lone surrogates cannot be printed.
            table.add_row(LEVELS[kind], kind, str(count), Text(lines.encode("utf-8", "backslashreplace").decode()))
        console.print(table)
    languages = Table("language", title="Languages")
    for heading in ("utterances", "hours"):
        languages.add_column(heading, justify="right")
    for name, count in totals.utterances_of_language.most_common():
        languages.add_row(name, str(count), f"{totals.seconds_of_language[name] / 3600:.2f}")
    console.print(languages)
    seconds = ", ".join(f"{name} {value:g}" for name, value in totals.percentiles().items())
    rates = ", ".join(f"{rate} Hz {count}" for rate, count in totals.sampling_rates.most_common())
    errors = sum(finding.level == "error" for finding in findings)
    console.print(f"{totals.utterances} utterances, {sum(totals.durations) / 3600:.2f} h", markup=False)
    console.print(f"seconds: {seconds or '-'}\nsampling rates: {rates or '-'}", markup=False)
    console.print(
        f"without text: {totals.without_text}, without language: {totals.without_language}, "
        f"texts that occurred before: {totals.repeated_texts}",
        markup=False,
    )
    console.print(f"{errors} errors, {len(findings) - errors} warnings", markup=False)
