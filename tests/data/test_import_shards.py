"""WebDataset shards: imported without unpacking, and trained on from where they are."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.audio import load_audio
from data.import_manifest import import_manifest, parse_options
from data.manifest import read_manifest


def flac(index: int) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, np.full(3_200 + index, 0.1), 16_000, format="FLAC")
    return content.getvalue()


def write_shard(path: Path, *members: tuple[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPD_HOME", str(tmp_path / "home"))
    folder = tmp_path / "shards"
    folder.mkdir()
    first = [("./a/u1.flac", flac(1)), ("./a/u1.txt", "één\n".encode()), ("./a/u1.json", b'{"lang": "nl", "snr": 9}')]
    second = [("a/u2.json", b'{"text": "two", "duration": 0.2}'), ("a/u2.extra.txt", b"no"), ("a/u2.flac", flac(2))]
    write_shard(folder / "000.tar", *first, *second)
    write_shard(folder / "001.tar", ("a/.hidden.txt", b"x"), ("a/u3.wav", flac(3)))
    return folder


def test_members_that_belong_together_become_an_utterance(shards: Path, tmp_path: Path) -> None:
    summary = import_manifest(shards, tmp_path / "set.jsonl", parse_options({}))
    lines = [json.loads(line) for line in (tmp_path / "set.jsonl").read_text().splitlines()]
    assert lines[0]["audio"] == "shards/000.tar!./a/u1.flac", "relative, so that both can be moved together"
    one, two, three = read_manifest(tmp_path / "set.jsonl")
    assert (one.id, one.text, one.language, one.extra) == ("a/u1", "één", "nl", {"snr": 9})
    assert (two.id, two.text, two.language, two.extra) == ("a/u2", "two", None, {"duration": 0.2})
    assert (three.id, three.text) == ("a/u3", None)
    assert [len(load_audio(u)) for u in (one, two, three)] == [3_201, 3_202, 3_203]
    assert (summary.utterances, summary.timed) == (3, 1)
    assert not (tmp_path / "set_audio").exists(), "nothing is unpacked"


def test_one_shard_and_columns_by_name(shards: Path, tmp_path: Path) -> None:
    options = parse_options({"text": "", "id": "", "language": "de"})
    import_manifest(shards / "000.tar", tmp_path / "set.jsonl", options)
    assert [(u.id, u.text, u.language) for u in read_manifest(tmp_path / "set.jsonl")] == [
        ("set-00000000", None, "de"),
        ("set-00000001", None, "de"),
    ]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("u.txt", b"one")], r"000\.tar:u: no audio"),
        (
            [("u.json", b"[1]"), ("u.flac", b"")],
            r"000\.tar:u: its .json or .txt cannot be read \(expected a JSON object",
        ),
        ([("u.json", b"{"), ("u.flac", b"")], r"000\.tar:u: its .json or .txt cannot be read"),
        ([("u.txt", b"\xff"), ("u.flac", b"")], r"000\.tar:u: its .json or .txt cannot be read"),
        ([("u.flac", b""), ("v.flac", b""), ("u.txt", b"")], r"000\.tar:u: no audio"),
    ],
)
def test_bad_members_are_named(shards: Path, tmp_path: Path, members: list, message: str) -> None:
    write_shard(shards / "000.tar", *members)
    with pytest.raises(ValueError, match=message):
        import_manifest(shards, tmp_path / "set.jsonl", parse_options({}))


def test_a_compressed_or_damaged_shard_is_an_error(shards: Path, tmp_path: Path) -> None:
    write_shard(shards / "000.tar", ("u.flac", flac(1)), mode="w:gz")
    with pytest.raises(ValueError, match=r"000\.tar: is no plain tar file .* unpack a compressed one"):
        import_manifest(shards, tmp_path / "set.jsonl", parse_options({}))
    write_shard(shards / "000.tar", ("u.flac", flac(1)), ("v.flac", flac(2)))
    with tarfile.open(shards / "000.tar") as tar:
        place = tar.getmembers()[1].offset
    with open(shards / "000.tar", "r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 512)
    with pytest.raises(ValueError, match=rf"000\.tar: is damaged after byte {place}: fetch it again"):
        import_manifest(shards, tmp_path / "set.jsonl", parse_options({}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no .tar files"):
        import_manifest(tmp_path / "empty", tmp_path / "set.jsonl", parse_options({"format": "webdataset"}))
