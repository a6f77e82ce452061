"""What all side-by-side measurements write: a table on the terminal and, on demand, a list of rows as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """Ours against another side: median seconds, other_s / ours_s, and megabytes (1e6 bytes). None: not measured."""

    case: str
    ours_s: float | None
    other: str
    other_s: float | None
    ratio: float | None
    ours_mb: float | None = None
    other_mb: float | None = None


def print_rows(rows: Sequence[Row], notes: Mapping[str, str] | None = None) -> None:
    """One line per row as a Markdown table; a note per case comes last in its line."""
    notes = notes or {}
    print("| case | ours, s | other | other, s | times as fast | ours, MB | other, MB |" + (" |" if notes else ""))
    print("|---|---|---|---|---|---|---|" + ("---|" if notes else ""))
    for row in rows:
        megabytes = ["" if mb is None else f"{mb:,.0f}" for mb in (row.ours_mb, row.other_mb)]
        ours_s, other_s, ratio = ("" if x is None else f"{x:.3g}" for x in (row.ours_s, row.other_s, row.ratio))
        cells = [row.case, ours_s, row.other, other_s, ratio, *megabytes]
        print("| " + " | ".join([*cells, notes[row.case]] if notes else cells) + " |")


def write_json(rows: Sequence[Row], path: str | Path) -> None:
    Path(path).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
