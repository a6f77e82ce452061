"""Tar files as WebDataset has them: the members of an utterance follow each other and share all up to a name's first dot.

    clips/u1.flac  clips/u1.txt  clips/u1.json  clips/u2.flac  clips/u2.txt  ...

`.txt` is the transcript, the fields of `.json` are columns; sound stays where it is, in the tar.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from data.import_sources import Row, Source
from data.tar import DamagedTar, whole_members

_SOUND = frozenset({"flac", "wav", "mp3", "ogg", "opus", "aiff", "sph"})


def read_shards(source: Path) -> Source:
    """The utterances of a tar file, or of all in a folder in the order of their names. Raises ValueError for a bad one."""
    shards = [source] if source.is_file() else sorted(source.glob("*.tar"))
    if not shards:
        raise ValueError(f"source={source}: has no .tar files: check the path")
    rows = (row for shard in shards for row in _rows(shard.absolute()))
    return Source(rows, source.absolute() if source.is_dir() else source.absolute().parent, None, "audio")


def _rows(shard: Path) -> Iterator[Row]:
    try:
        with tarfile.open(shard, "r:") as tar:
            members = (
                member
                for member in whole_members(tar)
                if member.isreg() and not os.path.basename(member.name).startswith(".")
            )
            for key, group in groupby(members, key=lambda member: _split_name(member.name)[0]):
                yield _row(tar, shard, key, {_split_name(member.name)[1]: member for member in group})
    except DamagedTar as error:
        raise ValueError(f"{shard}: is {error}: fetch it again") from error
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{shard}: is no plain tar file ({error}): unpack a compressed one to .tar") from error


def _split_name(name: str) -> tuple[str, str]:
    """("clips/u1", "flac") of "./clips/u1.flac"."""
    folder, base = os.path.split(name.removeprefix("./"))
    stem, _, extension = base.partition(".")
    return os.path.join(folder, stem), extension.lower()


def _row(tar: tarfile.TarFile, shard: Path, key: str, members: dict[str, tarfile.TarInfo]) -> Row:
    where = f"{shard}:{key}"
    columns: dict[str, Any] = {"key": key}
    try:
        if "json" in members:
            fields = json.loads(_content(tar, members["json"]))
            if not isinstance(fields, dict):
                raise ValueError(f"expected a JSON object, found {type(fields).__name__}")
            columns |= fields
        if "txt" in members:
            columns["text"] = _content(tar, members["txt"]).decode("utf-8-sig").strip()
    except ValueError as error:  # bad JSON and bad UTF-8 too
        raise ValueError(f"{where}: its .json or .txt cannot be read ({error}): correct it") from error
    sounds = [member for extension, member in members.items() if extension in _SOUND]
    columns["audio"] = f"{shard}!{sounds[0].name}" if sounds else ""
    return Row(where, columns)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "it is an ordinary member"
    return file.read()
