"""Checks that stand by themselves: each has a finding, also where another one failed; and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

STYLES = {"ok": "green", "warning": "yellow", "fail": "bold red", "skipped": "dim"}


@dataclass(frozen=True)
class Finding:
    """status is ok, warning, fail or skipped; fix says what to do about the middle two."""

    status: str
    found: str
    fix: str = ""


@dataclass(frozen=True)
class Check:
    """One row of the table.

    look    what it does: a finding, or a sentence where all is well, or None where it has nothing to look at; an exception
            is a failure with the exception's own sentence
    needs   checks that must not have failed or been skipped before; else this one is skipped
    fix     how to mend it where an exception does not say
    """

    name: str
    look: Callable[[Any], Finding | str | None]
    needs: tuple[str, ...] = ()
    fix: str = ""


def examine(
    checks: Iterable[Check], subject: Any, findings: dict[str, Finding], tell: Callable[[str], None] = lambda name: None
) -> None:
    """Adds the finding of each check, given the subject, in order. `tell` hears the name of the one that begins."""
    for check in checks:
        lacking = [n for n in check.needs if n in findings and findings[n].status in ("fail", "skipped")]
        if lacking:
            findings[check.name] = Finding("skipped", f"needs what failed: {', '.join(lacking)}")
            continue
        tell(check.name)
        try:
            result = check.look(subject)
        except Exception as error:  # whatever goes wrong is what the user came to hear
            result = Finding("fail", sentence(error), check.fix)
        if result is not None:
            findings[check.name] = result if isinstance(result, Finding) else Finding("ok", result)


def sentence(error: BaseException) -> str:
    """An exception in one line; of what is no sentence, its type too."""
    text = " ".join(str(error).split())
    return (
        text
        if isinstance(error, ValueError | RuntimeError | TimeoutError) and text
        else f"{type(error).__name__}: {text}"
    )


def print_report(title: str, findings: dict[str, Finding], seconds: float) -> None:
    """The table, and the verdict in one line below it."""
    table = Table(title=title, show_lines=True)
    table.add_column("check", no_wrap=True)
    table.add_column("result", no_wrap=True)
    table.add_column("what was found, and how to fix it", overflow="fold")
    for name, finding in findings.items():
        style = STYLES[finding.status]
        text = finding.found + (f"\nfix: {finding.fix}" if finding.fix else "")
        table.add_row(name, f"[{style}]{finding.status}[/]", text.replace("[", "\\["))
    console = Console(width=120)
    console.print(table)
    failed = [name for name, finding in findings.items() if finding.status == "fail"]
    warned = [name for name, finding in findings.items() if finding.status == "warning"]
    verdict = f"this run cannot work here: {', '.join(failed)}" if failed else "this run can work here"
    if warned:
        verdict += f"; look at {', '.join(warned)}"
    console.print(f"{verdict} ({seconds:.0f} s)", highlight=False, markup=False)
