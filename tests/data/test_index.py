"""Large manifests: the index gives what reading all lines gives, is built once, and is built anew when the file changes."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path

import pytest

from data.build import MARKER
from data.index import INDEX_ABOVE_BYTES, IndexedManifest, ids_digest, open_manifest
from data.manifest import read_manifest


def write_varied(path: Path, num: int = 300) -> Path:
    """Lines of every accepted kind: with and without id, times, text, language; blank ones, long ones, a BOM, CRLF."""
    lines = []
    for i in range(num):
        row: dict = {"audio": f"clips/{i}.flac"}
        row |= {"id": f"u{i}"} if i % 3 else {}
        row |= {"begin_time": i % 5, "end_time": 10.5} if i % 7 == 0 else {}
        row |= {"text": f"número {i}" * (1 + 2000 * (i == 11))} if i % 4 else {}
        row |= {"language": ("English", "Dutch")[i % 2]} if i % 6 else {}
        row |= {"duration": i / 10, "speaker": {"n": i}} if i % 5 else {}
        lines.append(json.dumps(row, ensure_ascii=i % 2 == 0) + ("\r" if i % 9 == 0 else ""))
        lines += ["", "  "] if i % 50 == 0 else []
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())  # no line end after the last
    return path


def indexes(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(".*.index-*") if path.is_dir())


def test_any_position_gives_what_the_list_has(tmp_path: Path) -> None:
    path = write_varied(tmp_path / "set.jsonl")
    whole, indexed = read_manifest(path, default_language="French"), IndexedManifest(path, default_language="French")
    assert len(indexed) == len(whole) == 300
    assert [indexed[i] for i in (299, 0, 11, 50, -1)] == [whole[i] for i in (299, 0, 11, 50, -1)]
    assert indexed[90:110:3] == whole[90:110:3]
    assert list(indexed) == whole
    with pytest.raises(IndexError):
        indexed[300]


def test_an_index_that_was_built_before_there_was_a_digest_is_read(tmp_path: Path) -> None:
    path = write_varied(tmp_path / "set.jsonl")
    IndexedManifest(path)
    (index,) = indexes(tmp_path)
    facts = json.loads((index / "facts.json").read_text())
    del facts["ids_digest"]
    (index / "facts.json").write_text(json.dumps(facts))
    assert ids_digest(IndexedManifest(path)) is None


def test_facts_are_those_of_the_lines(tmp_path: Path) -> None:
    path = write_varied(tmp_path / "set.jsonl")
    whole, indexed = read_manifest(path), IndexedManifest(path)
    facts = indexed.facts
    assert facts.num_utterances == 300
    assert facts.ids_digest == ids_digest(whole) == ids_digest(indexed) != ids_digest(whole[::-1])
    assert facts.num_texts == sum(u.text is not None for u in whole)
    for language, position in facts.languages:
        assert position == next(i for i, u in enumerate(whole) if u.language == language)
    assert {language for language, _ in facts.languages} == {None, "English", "Dutch"}
    seconds = indexed.seconds()
    assert seconds is not None
    expected = [u.extra.get("duration") or math.nan for u in whole]
    assert seconds.tolist() == pytest.approx(expected, nan_ok=True)


def test_without_durations_there_are_no_seconds(tmp_path: Path) -> None:
    (tmp_path / "set.jsonl").write_text('{"audio": "a.wav"}\n{"audio": "b.wav", "duration": "long"}\n')
    assert IndexedManifest(tmp_path / "set.jsonl").seconds() is None


def test_the_index_is_built_once_and_anew_for_a_changed_file(tmp_path: Path) -> None:
    path = write_varied(tmp_path / "set.jsonl")
    other = write_varied(tmp_path / "other.jsonl", 7)
    IndexedManifest(path)
    IndexedManifest(other)
    (first,) = [folder for folder in indexes(tmp_path) if "set" in folder.name]
    made = (first / "offsets.npy").stat().st_mtime_ns
    assert len(IndexedManifest(path)) == 300
    assert (first / "offsets.npy").stat().st_mtime_ns == made
    with open(path, "a") as file:
        file.write('\n{"audio": "new.wav"}\n')
    assert len(IndexedManifest(path)) == 301
    assert not first.exists(), "the index of a file that is no more is removed"
    # The same size, another time of change.
    path.write_bytes(path.read_bytes().replace(b"new.wav", b"old.wav"))
    os.utime(path, ns=(1, 1))
    assert IndexedManifest(path)[300].id == "old.wav"
    assert len(indexes(tmp_path)) == 2, "the other manifest keeps its own"


def test_a_bad_manifest_leaves_no_index(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"audio": "a.wav"}\n{"text": "a.wav"}\n')
    for _ in range(2):
        with pytest.raises(ValueError, match=r"set\.jsonl:2: lacks `audio`"):
            IndexedManifest(path)
    assert indexes(tmp_path) == []


def test_an_interrupted_build_is_redone(tmp_path: Path) -> None:
    path = write_varied(tmp_path / "set.jsonl", 20)
    IndexedManifest(path)
    (folder,) = indexes(tmp_path)
    (folder / MARKER).unlink()
    (folder / "offsets.npy").write_bytes(b"half")
    assert list(IndexedManifest(path)) == read_manifest(path)


def test_ids_of_one_hash_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash that all ids share, only real repetitions are refused."""
    monkeypatch.setattr("data.index.hash", len, raising=False)
    path = tmp_path / "set.jsonl"
    path.write_text("".join(f'{{"audio": "a.wav", "id": "u{i:02}"}}\n\n' for i in range(20)))
    assert len(IndexedManifest(path)) == 20
    with open(path, "a") as file:
        file.write('{"audio": "u07"}\n{"audio": "u08"}\n')
    with pytest.raises(ValueError, match=r"set\.jsonl:41: id 'u07' is already used on line 15 "):
        IndexedManifest(path)


def test_a_file_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = write_varied(tmp_path / "set.jsonl", 20)
    indexed = IndexedManifest(path)
    path.write_text('{"audio": "a.wav"}\n')  # the same file, written again in place
    with pytest.raises(ValueError, match=r"set\.jsonl: utterance 9: .* changed while it is read: start again"):
        indexed[9]


def test_a_read_only_folder_has_its_index_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, home = Path(name) / "set", Path(name) / "home"
        for made in (folder, home):
            made.mkdir()
        path = write_varied(folder / "set.jsonl", 20)
        for made, mode in ((Path(name), 0o755), (folder, 0o555), (home, 0o777)):
            made.chmod(mode)
        monkeypatch.setenv("OPD_HOME", str(home))
        is_root = os.geteuid() == 0  # may write anywhere: be somebody else meanwhile
        if is_root:
            os.seteuid(65534)
        try:
            assert list(IndexedManifest(path)) == read_manifest(path)
            IndexedManifest(path)
        finally:
            if is_root:
                os.seteuid(0)
        assert indexes(folder) == []
        assert len(list(home.glob("manifests/*/v*/offsets.npy"))) == 1
        folder.chmod(0o755)


def test_only_a_large_manifest_is_indexed(tmp_path: Path) -> None:
    path = write_varied(tmp_path / "set.jsonl", 20)
    assert isinstance(open_manifest(path), list)
    assert indexes(tmp_path) == []
    line = json.dumps({"audio": "a.wav", "text": "one", "padding": "x" * 1_000_000})
    with open(path, "a") as file:
        for i in range(INDEX_ABOVE_BYTES // 1_000_000 + 1):
            file.write("\n" + line.replace("a.wav", f"{i}.wav"))
    assert isinstance(open_manifest(path), IndexedManifest)
    with pytest.raises(ValueError, match=r"set\.jsonl:1: this set needs a transcript"):
        open_manifest(path, require_text=True)
    with pytest.raises(ValueError, match="cannot be read"):
        open_manifest(tmp_path / "nowhere.jsonl")
