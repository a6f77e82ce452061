"""The files of one checkpoint: written to last, listed with size and checksum in a marker, checked against it later."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MARKER = "COMPLETE"
HASH_THREADS = 4  # hashing leaves Python's lock


def atomic_write_text(path: Path | str, text: str) -> None:
    """Writes a UTF-8 file so that a reader, or a crash, sees the old text or the new one and nothing between."""
    path = Path(path)
    temp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(temp, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except OSError:
        temp.unlink(missing_ok=True)  # on a full disk every byte counts
        raise
    fsync(path.parent)


def write_marker(folder: Path, step: int) -> None:
    """Brings all files below a folder to the disk, then vouches for them. Raises OSError."""
    paths = files_below(folder)
    for path in [*paths, *(entry for entry in folder.rglob("*") if entry.is_dir())]:
        fsync(path)
    files = {
        str(path.relative_to(folder)): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _digests(paths), strict=True)
    }
    atomic_write_text(folder / MARKER, json.dumps({"step": step, "files": files}, indent=1, sort_keys=True))


def damage(folder: Path, *, contents: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None where it is complete. `contents`: reads every file, not just its size."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        expected = {folder / name: (entry["size"], entry["sha256"]) for name, entry in files.items()}
    except FileNotFoundError:
        return f"no {MARKER} marker"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"the {MARKER} marker cannot be read"
    for path, (size, _) in expected.items():
        name = path.relative_to(folder)
        try:
            actual = path.stat().st_size
        except OSError:
            return f"{name} is missing"
        if actual != size:
            return f"{name} has {actual} bytes instead of {size}"
    if contents:
        try:
            digests = _digests(list(expected))
        except OSError as error:
            return f"a file cannot be read ({error.strerror})"
        for (path, (_, digest)), actual_digest in zip(expected.items(), digests, strict=True):
            if digest != actual_digest:
                return f"{path.relative_to(folder)} has other contents than when it was saved (checksum)"
    return None


def files_below(directory: Path) -> list[Path]:
    return sorted(entry for entry in directory.rglob("*") if entry.is_file())


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digests(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
