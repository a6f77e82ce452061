"""Tables for a person at the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def print_table(summary: dict[str, Any]) -> None:
    """What a run brought: error rates before and after for each evaluation set, and seconds per phase."""
    table = Table(title=f"{summary['recipe']} ({summary['stage']}, {summary['steps']} steps, seed {summary['seed']})")
    table.add_column("evaluation set")
    for name in ("utterances", "WER before", "WER after", "change", "CER after", "teacher WER", "gap closed"):
        table.add_column(name, justify="right")
    for name, result in summary["eval"].items():
        table.add_row(name, *_cells(result.get("before"), result["after"], result.get("teacher")))
    console = Console(width=120)
    console.print(table)
    seconds = summary["seconds"]
    parts = [f"{name} {value:.1f}" for name, value in sorted(seconds.items()) if name != "total"]
    console.print(f"{seconds['total']:.1f} s in all: " + ", ".join(parts), highlight=False)


def _cells(before: dict[str, Any] | None, after: dict[str, Any], teacher: dict[str, Any] | None) -> list[str]:
    start = before["wer"] if before else None
    change = f"{(after['wer'] - start) / start:+.1%}" if start else "-"
    closed = "-"
    if teacher and start is not None and start > teacher["wer"]:
        closed = f"{(start - after['wer']) / (start - teacher['wer']):.0%}"
    return [
        str(after["num_utterances"]),
        f"{start:.2%}" if start is not None else "-",
        f"{after['wer']:.2%}",
        change,
        f"{after['cer']:.2%}",
        f"{teacher['wer']:.2%}" if teacher else "-",
        closed,
    ]
