"""Tar files: which members they hold, and whether they are whole. `tarfile` alone stops without a word at a bad header."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator

_BLOCK = 512


class DamagedTar(Exception):
    """What lies in a tar file after byte `after` cannot be read."""

    def __init__(self, after: int) -> None:
        super().__init__(f"damaged after byte {after}")
        self.after = after


def whole_members(file: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members, in order, whose bytes are all there. Then raises DamagedTar where the file does not end as one does."""
    assert file.fileobj is not None and file.name is not None, "a file with a name was opened"
    size = os.path.getsize(file.name)
    end = 0  # of the last whole member
    try:
        while (member := file.next()) is not None:
            if member.offset_data + member.size > size and file.offset > size:
                raise DamagedTar(end)
            end = file.offset
            yield member
    except tarfile.TarError as error:
        raise DamagedTar(min(end, size)) from error
    file.fileobj.seek(end)
    closing = file.fileobj.read(2 * _BLOCK)
    if len(closing) < _BLOCK or any(closing):
        raise DamagedTar(min(end, size))
