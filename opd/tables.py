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
    console.print(f"{seconds['total']:.1f} s in all: {_phases(seconds)}", highlight=False)


def _phases(seconds: dict[str, float]) -> str:
    """Seconds per phase, those within a phase (`start_ray` within `start`) in brackets behind it; they add up to `total`."""
    names = sorted(seconds.keys() - {"total"})
    within = {name: [inner for inner in names if inner.startswith(f"{name}_")] for name in names}
    outer = [name for name in names if not any(name in inner for inner in within.values())]
    parts = []
    for name in outer:
        inner = ", ".join(f"{part} {seconds[part]:.1f}" for part in within[name])
        parts.append(f"{name} {seconds[name]:.1f}" + (f" ({inner})" if inner else ""))
    other = seconds["total"] - sum(seconds[name] for name in outer)
    return ", ".join([*parts, f"other {max(0.0, other):.1f}"])


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


def print_ladder(summary: dict[str, Any]) -> None:
    """WER after each stage of a ladder, the start and the teacher's beside it."""
    stages = summary["stages"]
    table = Table(title=f"{summary['recipe']} (seed {summary['seed']}): WER after each stage")
    sets = list(dict.fromkeys(name for stage in stages.values() for name in stage["eval"]))
    for column in ("stage", "kind"):
        table.add_column(column)
    for column in ("steps", "seconds", *sets):
        table.add_column(column, justify="right")
    for name, stage in stages.items():
        seconds = f"{stage['seconds']['total']:.0f}"
        rates = [f"{stage['eval'][s]['after']['wer']:.2%}" if s in stage["eval"] else "-" for s in sets]
        table.add_row(name, stage["stage"], str(stage["steps"]), seconds, *rates)
    Console(width=120).print(table)


def print_comparison(summary: dict[str, Any]) -> None:
    """The arms of each setting, best first; differences are to the base arm, with 95 % intervals."""
    for setting, rows in summary["settings"].items():
        before = rows[0]["wer_before"]
        table = Table(
            title=f"{summary['recipe']}, {setting}: WER on {summary['eval_set']}, {len(summary['seeds'])} seeds, "
            f"start {before:.2%}"
        )
        table.add_column("arm")
        for column in ("steps", "CPU-s", "WER mean", "spread (sd)", f"minus {summary['base_arm']}", "95 % interval"):
            table.add_column(column, justify="right")
        for row in sorted(rows, key=lambda row: row["wer_mean"]):
            spread = f"{row['wer_sd']:.2%}" if row["wer_sd"] is not None else "-"
            difference = f"{row['difference']:+.2%}" if "difference" in row else "-"
            interval = "{:+.2%} .. {:+.2%}".format(*row["interval"]) if "interval" in row else "-"
            cells = (f"{row['cpu_seconds']:.0f}", f"{row['wer_mean']:.2%}", spread, difference, interval)
            table.add_row(row["arm"], str(row["steps"]), *cells)
        Console(width=120).print(table)
