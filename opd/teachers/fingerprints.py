"""Digests of what a kept transcript or score depends on: a teacher's files, a student's vocabulary."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from opd.arkasr import ArkasrConfig, load_processor

LARGE = 64 << 20  # bytes; the digest of a larger file is kept on disk, so that only the first run reads all of it
DIGEST_LENGTH = 64  # characters of a SHA-256


def fingerprint(path: str, kept_in: Path | None = None) -> str:
    """Digest of a model folder's files, all their bytes; of a Hub id, of the snapshot that was loaded.

    kept_in   folder for the digests of large files
    """
    folder = Path(path)
    if not folder.is_dir():
        config = try_to_load_from_cache(path, "config.json")
        if not isinstance(config, str):
            return f"hub:{path}"
        folder = Path(config).parent
    digest = hashlib.sha256()
    for file in sorted(entry for entry in folder.iterdir() if entry.is_file()):
        if file.suffix not in (".md", ".py"):
            digest.update(f"{file.name}:{file_digest(file, kept_in)}\n".encode())
    return digest.hexdigest()


def file_digest(file: Path, kept_in: Path | None = None) -> str:
    """SHA-256 of a file's bytes. A file that has not changed is read once in a process, a large one once in all."""
    stat = file.stat()
    # The time of change and the inode too: files of equal size may have been given one and the same mtime, as in images.
    state = (str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
    return _digest(state, kept_in if stat.st_size > LARGE else None)


@cache
def _digest(state: tuple[str, int, int, int, int], kept_in: Path | None) -> str:
    kept = kept_in and kept_in / f"{hashlib.sha256(repr(state).encode()).hexdigest()}.txt"
    if kept and kept.is_file() and len(known := kept.read_text(encoding="utf-8", errors="replace")) == DIGEST_LENGTH:
        return known
    with open(state[0], "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if kept:
        with suppress(OSError):  # a folder that this machine may only read: the next process reads the weights again
            replace_file(kept, lambda temp: temp.write_text(digest, encoding="utf-8"))
    return digest


def vocabulary_digest(student_path: str) -> str:
    """Digest of what the ids of a student mean: its tokens and their ids, the control tokens, the size and EOS."""
    tokenizer = load_processor(student_path).tokenizer
    parts = [
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.all_special_ids),
        ArkasrConfig.from_pretrained(student_path).vocab_size,
        tokenizer.eos_token_id,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def replace_file(path: Path, write: Callable[..., Any]) -> None:
    """Writes a file so that a reader sees all of it or nothing. Writers may be in any number of machines and containers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    write(temp)
    os.replace(temp, path)
