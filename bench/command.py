"""What the command lines of all benchmarks share: --json, numbers that are checked, one line for what went wrong.

Status 2 is a wrong argument, 1 anything else that is not as it should be. OPD_TRACEBACK=1 shows where an error came from.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Has --json. A wrong argument is one line, and a file that cannot be written is one before anything is measured."""

    def __init__(self, name: str, doc: str | None) -> None:
        """name: of the module in bench/; doc: its docstring."""
        super().__init__(
            prog=f"python -m bench.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.add_argument("--json", type=writable, metavar="FILE", help="write the rows there")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())} (see {self.prog} --help)\n")


def command(main: Callable[[list[str]], int]) -> Callable[[Sequence[str] | None], int]:
    """Makes a `main` of the arguments into one that reports what it raises in one line and returns 1. None: those of the
    process."""

    @functools.wraps(main)
    def reported(argv: Sequence[str] | None = None) -> int:
        try:
            return main(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as stop:
            if not isinstance(stop.code, str):
                raise
            message = stop.code
        except (ValueError, RuntimeError, ImportError, OSError, subprocess.SubprocessError) as error:
            if os.environ.get("OPD_TRACEBACK"):
                raise
            message = str(error) or type(error).__name__
        except KeyboardInterrupt:
            message = "interrupted"
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 1

    return reported


def writable(text: str) -> Path:
    """A file's path, once it is certain that it can be written; a file that is there keeps its content."""
    path = Path(text)
    is_new = not path.exists()
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path} cannot be written: {error.strerror}") from error
    if is_new:
        path.unlink()
    return path


def positive(text: str) -> int:
    return _at_least(1, text)


def count(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least {least}")
    return number


def report_missed(missed: Sequence[str], are_checked: bool = True) -> int:
    """Prints the targets that were missed, a line each; returns the exit status.

    are_checked: False where what was measured is another size than the one that the targets are for
    """
    if not are_checked:
        print("targets are checked at the default sizes only")
        return 0
    print("\n".join(f"missed: {line}" for line in missed) or "all targets are met")
    return 1 if missed else 0
