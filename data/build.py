"""Folders of data that are made once into a cache, whoever asks first, and are never seen half made."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

MARKER = "COMPLETE"


def cache_home(home: str | Path | None = None) -> Path:
    """`home`, else $OPD_HOME, else ~/.cache/opd, as an absolute path."""
    return Path(home or os.environ.get("OPD_HOME") or "~/.cache/opd").expanduser().resolve()


def build_once(target: Path, make: Callable[[Path], str]) -> None:
    """Make the folder `target`, once: built beside it, renamed when complete, under a file lock.

    `make` fills the folder that it is given and returns a line about it for the marker. An interrupted build is redone,
    and a second process waits for the first.
    """
    if (target / MARKER).exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f"{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the system when the process ends, however it ends
        if (target / MARKER).exists():
            return
        for leftover in [target, *target.parent.glob(f"{target.name}.partial-*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
        try:
            (partial / MARKER).write_text(f"{make(partial)}\n")
            partial.chmod(0o755)  # mkdtemp makes it private
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
