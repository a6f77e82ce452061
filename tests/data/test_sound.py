"""Sound that is no file of its own: members of tar files, and bytes within the record."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from data.audio import BadAudio, audio_info, load_audio
from data.manifest import read_manifest, write_manifest
from data.sound import _list_members, _members, file_of, inline, is_path, open_sound, shown
from opd.types import Utterance


def encoded(index: int, format: str = "FLAC") -> bytes:
    content = io.BytesIO()
    soundfile.write(content, np.full(3_200 + index, (index + 1) / 100), 16_000, format=format)
    return content.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OPD_HOME", str(tmp_path / "home"))
    _members.cache_clear()
    return tmp_path / "home"


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    members = {f"clips/u{i}.flac": encoded(i) for i in range(5)} | {"./a b!.wav": encoded(7, "WAV"), "empty.wav": b""}
    long_name = "deep/" * 40 + "u.flac"  # beyond the 100 characters of the oldest format
    return write_tar(tmp_path / "shard-0001.tar", members | {long_name: encoded(9)})


def test_members_are_read_as_files_are(shard: Path, tmp_path: Path) -> None:
    names = [*(f"clips/u{i}.flac" for i in (3, 0, 4)), "a b!.wav", "./a b!.wav", "deep/" * 40 + "u.flac"]
    for name, index in zip(names, (3, 0, 4, 7, 7, 9), strict=True):
        utterance = Utterance(id="u", audio=f"{shard}!{name}")
        (tmp_path / "alone").write_bytes(encoded(index, "WAV" if name.endswith("wav") else "FLAC"))
        alone = Utterance(id="u", audio=str(tmp_path / "alone"))
        np.testing.assert_array_equal(load_audio(utterance), load_audio(alone))
        assert audio_info(utterance) == audio_info(alone)
    part = Utterance(id="u", audio=f"{shard}!clips/u1.flac", begin_time=0.05, end_time=0.15)
    assert len(load_audio(part)) == 1_600


def test_a_manifest_names_them_from_its_folder(shard: Path, tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"audio": "shard-0001.tar!clips/u2.flac"}\n')
    (utterance,) = read_manifest(tmp_path / "set.jsonl")
    assert utterance.id == "shard-0001.tar!clips/u2.flac"
    assert utterance.audio == f"{shard}!clips/u2.flac"
    assert len(load_audio(utterance)) == 3_202
    write_manifest(tmp_path / "copy.jsonl", [utterance])
    assert read_manifest(tmp_path / "copy.jsonl") == [utterance]
    assert json.loads((tmp_path / "copy.jsonl").read_text())["audio"] == "shard-0001.tar!clips/u2.flac"


@pytest.mark.parametrize(
    ("member", "kind", "reason"),
    [
        ("clips/u9.flac", "missing_file", "has no member 'clips/u9.flac'"),
        ("clips", "missing_file", "has no member 'clips'"),
        ("empty.wav", "empty_audio", "is empty"),
    ],
)
def test_bad_members(shard: Path, member: str, kind: str, reason: str) -> None:
    with pytest.raises(BadAudio) as error:
        load_audio(Utterance(id="u", audio=f"{shard}!{member}"))
    assert error.value.kind == kind
    assert reason in error.value.reason
    assert error.value.path == f"{shard}!{member}"


def test_bad_tar_files(shard: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "packed.tar", {"u.flac": encoded(1)}, "w:gz")
    with pytest.raises(BadAudio, match=r"is no plain tar file .*: a compressed one cannot be read at a place"):
        load_audio(Utterance(id="u", audio=f"{tmp_path / 'packed.tar'}!u.flac"))
    with pytest.raises(BadAudio, match="is no plain tar file"):  # as it was found before
        load_audio(Utterance(id="u", audio=f"{tmp_path / 'packed.tar'}!v.flac"))
    with pytest.raises(BadAudio, match="No such file") as error:
        load_audio(Utterance(id="u", audio=f"{tmp_path / 'none.tar'}!u.flac"))
    assert error.value.kind == "missing_file"
    load_audio(Utterance(id="u", audio=f"{shard}!clips/u4.flac"))
    with open(shard, "r+b") as file:
        file.truncate(file.read().index(encoded(4)) + 50)
    with pytest.raises(BadAudio):
        load_audio(Utterance(id="u", audio=f"{shard}!clips/u4.flac"))


def heard(shard: Path, num: int = 5) -> dict[int, str | int]:
    """Samples of each clip, or why it is none."""
    found: dict[int, str | int] = {}
    for index in range(num):
        try:
            found[index] = len(load_audio(Utterance(id="u", audio=f"{shard}!clips/u{index}.flac")))
        except BadAudio as error:
            found[index] = f"{error.kind}: {error.reason}"
    return found


def offsets(shard: Path) -> list[int]:
    with tarfile.open(shard) as tar:
        return [member.offset for member in tar]


@pytest.mark.parametrize("damage", ["bad header", "blank header", "cut in a member", "cut in a header", "cut between"])
def test_of_a_damaged_tar_whole_members_are_heard_and_the_place_is_named(
    shard: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = offsets(shard)[3]
    content = bytearray(shard.read_bytes())
    if "header" in damage and "cut" not in damage:
        content[place : place + 512] = (b"\xff" if damage == "bad header" else b"\0") * 512
    else:
        del content[place + {"cut in a member": 600, "cut in a header": 100, "cut between": 0}[damage] :]
    shard.write_bytes(content)
    listed = []
    monkeypatch.setattr("data.sound._list_members", lambda tar: (listed.append(tar), _list_members(tar))[1])
    found = heard(shard)
    assert [found[index] for index in range(3)] == [3_200, 3_201, 3_202]
    for index in (3, 4):
        assert f"is damaged after byte {place}; 'clips/u{index}.flac' is not before it: fetch it" in str(found[index])
        assert not str(found[index]).startswith("missing_file")
    _members.cache_clear()  # as in another process
    assert heard(shard) == found
    assert len(listed) == 1


def test_a_tar_is_listed_once_and_anew_when_it_changes(
    shard: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = []
    monkeypatch.setattr("data.sound._list_members", lambda tar: (listed.append(tar), _list_members(tar))[1])
    address = f"{shard}!clips/u0.flac"
    for _ in range(3):
        assert isinstance(open_sound(address), io.BytesIO)
        _members.cache_clear()  # as in another process
    assert listed == [str(shard)]
    assert len(list(home.glob("tars/*/*.json"))) == 1
    write_tar(shard, {"before": b"x" * 5_000, "clips/u0.flac": encoded(8)})
    assert len(load_audio(Utterance(id="u", audio=address))) == 3_208
    assert len(listed) == 2
    next(iter(home.glob("tars/*/*.json"))).write_text("{")
    _members.cache_clear()
    assert len(load_audio(Utterance(id="u", audio=address))) == 3_208


def test_without_a_cache_to_write_to_members_are_found_all_the_same(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPD_HOME", str(tmp_path / "file"))
    assert len(load_audio(Utterance(id="u", audio=f"{shard}!clips/u0.flac"))) == 3_200


def test_sound_within_the_record(tmp_path: Path) -> None:
    for address in (inline(encoded(3)), f"data:audio/flac;base64,{base64.b64encode(encoded(3)).decode()}"):
        (tmp_path / "set.jsonl").write_text(json.dumps({"id": "u", "audio": address}) + "\n")
        (utterance,) = read_manifest(tmp_path / "set.jsonl")
        assert utterance.audio == address
        assert len(load_audio(utterance)) == 3_203
    for address, reason in (
        ("data:,abc", "must read data:"),
        ("data:x;base64,a", "cannot be read"),
        (inline(b""), "is empty"),
    ):
        with pytest.raises(BadAudio, match=reason):
            load_audio(Utterance(id="u", audio=address))
    with pytest.raises(BadAudio) as error:
        load_audio(Utterance(id="u", audio=inline(b"no sound" * 1_000)))
    assert len(str(error.value)) < 300


def test_addresses() -> None:
    assert [is_path(a) for a in ("a.wav", "a.tar!b.wav", "hf:x#1", "data:;base64,")] == [True, True, False, False]
    assert file_of("a/b.tar!c.tar!d.wav") == "a/b.tar"
    assert file_of("a.wav") == "a.wav"
    assert file_of("hf:x#1") is None
    assert open_sound("a!b.wav") == "a!b.wav", "an exclamation mark in the name of a file is one"
    assert shown("x" * 500) == "x" * 500
    assert shown(inline(bytes(500))).endswith("... (705 characters)")
