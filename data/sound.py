"""Where the sound of an utterance is: a file, a member of a tar file, a row of a data set, or the record itself.

clips/u1.flac                                a file
shards/000001.tar!clips/u1.flac              a member of a tar file (not compressed), read at its place there
hf:FOLDER_OR_NAME?split=train&audio=audio#7  row 7 of a Hugging Face data set (data/huggingface.py makes these)
data:audio/flac;base64,...                   the file's bytes, as RFC 2397 writes them
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import os
import tarfile
import threading
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from data.build import cache_home
from data.tar import DamagedTar, whole_members

HUGGINGFACE_PREFIX, INLINE_PREFIX = "hf:", "data:"
_MEMBER_MARK = ".tar!"
_SHOWN = 60  # characters of an address that a message shows
_OPEN_TARS = 64  # whose members are kept in memory


def is_path(audio: str) -> bool:
    """Whether an address begins with the path of a file, so that a relative one counts from a folder."""
    return not audio.startswith((HUGGINGFACE_PREFIX, INLINE_PREFIX))


def is_stream(name: str) -> bool:
    """Whether a manifest's name is that of a Hugging Face data set that is streamed."""
    _, _, query = name.partition("?")
    return name.startswith(HUGGINGFACE_PREFIX) and "stream=true" in query.split("&")


def file_of(audio: str) -> str | None:
    """The path of the file that holds the sound; None where no file does, or none that can be named."""
    if not is_path(audio):
        return None
    tar, mark, _ = audio.partition(_MEMBER_MARK)
    return tar + mark.removesuffix("!")


def shown(audio: str) -> str:
    """An address as messages show it: sound within a record would fill pages."""
    return audio if is_path(audio) or len(audio) <= _SHOWN else f"{audio[:_SHOWN]}... ({len(audio)} characters)"


def open_sound(audio: str) -> BinaryIO | str:
    """The sound for `soundfile`: the path of a file as it is, or what is stored elsewhere as a file in memory.

    Raises OSError or ValueError where there is none.
    """
    if audio.startswith(INLINE_PREFIX):
        return io.BytesIO(_decoded(audio))
    if audio.startswith(HUGGINGFACE_PREFIX):
        from data.huggingface import sound_of_row  # here, because `datasets` takes seconds to import

        return sound_of_row(audio)
    tar, mark, member = audio.partition(_MEMBER_MARK)
    return io.BytesIO(_read_member(tar + mark[:-1], member)) if mark else audio


def inline(content: bytes) -> str:
    """The address that holds the bytes of a file itself."""
    return f"{INLINE_PREFIX}application/octet-stream;base64,{base64.b64encode(content).decode()}"


def _decoded(address: str) -> bytes:
    head, comma, body = address.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("a data: address must read data:<type>;base64,<bytes>")
    return base64.b64decode(body, validate=True)


def _read_member(tar: str, member: str) -> bytes:
    stat = os.stat(tar)
    listing = _members(tar, stat.st_size, stat.st_mtime_ns)
    if listing.refused is not None:
        raise OSError(errno.EINVAL, listing.refused)
    found = listing.members.get(_plain(member))
    if found is None and listing.damaged_after is not None:
        raise OSError(
            errno.EIO,
            f"{tar} is damaged after byte {listing.damaged_after}; {member!r} is not before it: fetch it again",
        )
    if found is None:
        raise FileNotFoundError(errno.ENOENT, f"{tar} has no member {member!r}")
    offset, size = found
    with open(tar, "rb", buffering=0) as file:
        content = os.pread(file.fileno(), size, offset)
    if len(content) < size:
        raise OSError(errno.EIO, f"{tar} ends within {member!r}: fetch it again")
    return content


@dataclass(frozen=True)
class _Listing:
    """What a tar file holds.

    members         {name: [offset, size]} of its files
    damaged_after   the byte from which on it cannot be read; None where it is whole
    refused         why it is no plain tar file at all
    """

    members: dict[str, list[int]]
    damaged_after: int | None = None
    refused: str | None = None


@lru_cache(maxsize=_OPEN_TARS)
def _members(tar: str, size: int, mtime_ns: int) -> _Listing:
    """The listing of a tar, from the cache where it was made before."""
    digest = hashlib.blake2b(os.path.abspath(tar).encode(errors="surrogateescape"), digest_size=16).hexdigest()
    path = cache_home() / "tars" / digest[:2] / f"{digest}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["of"] == [size, mtime_ns]:
            return _Listing(kept["members"], kept["damaged_after"], kept["refused"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or written by something else: it is made anew
    listing = _list_members(tar)
    try:
        _replace(path, json.dumps({"of": [size, mtime_ns], **asdict(listing)}))
    except OSError:
        pass  # no room or no right to write there: the next process lists them again
    return listing


def _list_members(tar: str) -> _Listing:
    members: dict[str, list[int]] = {}
    try:
        with tarfile.open(tar, "r:") as file:
            for member in whole_members(file):
                if member.isreg():
                    members[_plain(member.name)] = [member.offset_data, member.size]
    except DamagedTar as error:
        return _Listing(members, damaged_after=error.after)
    except tarfile.TarError as error:
        hint = "a compressed one cannot be read at a place: unpack it to .tar, or fetch it again"
        return _Listing({}, refused=f"{tar} is no plain tar file ({error}): {hint}")
    return _Listing(members)


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
