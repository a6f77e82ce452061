"""Manifests, read whole or by an index: every bad line is named with its file and line; what is written reads back."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.index import IndexedManifest
from data.manifest import read_manifest, write_manifest
from opd.types import Utterance

GOOD = '{"audio": "good.wav"}'
Read = Callable[..., list[Utterance]]


def read_indexed(path: Path, **options: Any) -> list[Utterance]:
    return list(IndexedManifest(path, **options))


@pytest.fixture(params=[read_manifest, read_indexed])
def read(request: pytest.FixtureRequest) -> Read:
    """Both ways to read a manifest: they must not differ in what they take and say."""
    return request.param


def write_lines(folder: Path, *lines: str | dict[str, Any]) -> Path:
    path = folder / "set.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"audio": "a.wav"', "not a JSON object"),
        ("a.wav,one two", "not a JSON object"),
        ('["a.wav"]', "expected a JSON object, found list"),
        ('{"text": "one"}', "lacks `audio`"),
        ('{"audio": ""}', "lacks `audio`"),
        ('{"audio": null}', "lacks `audio`"),
        ('{"audio": 7}', "`audio` must be a string, found 7"),
        ('{"audio": "a.wav", "text": ["one"]}', "`text` must be a string"),
        ('{"audio": "a.wav", "language": 1}', "`language` must be a string"),
        ('{"audio": "a.wav", "id": 12}', "`id` must be a string, found 12"),
        ('{"audio": "a.wav", "task": true}', "`task` must be a string, found true"),
        ('{"audio": "a.wav", "task": "s2tt"}', "`task` is 's2tt', but only 'asr' is supported"),
        ('{"audio": "a.wav", "begin_time": "1.5"}', "`begin_time` must be seconds"),
        ('{"audio": "a.wav", "begin_time": true}', "`begin_time` must be seconds"),
        ('{"audio": "a.wav", "end_time": NaN}', "`end_time` must be seconds"),
        ('{"audio": "a.wav", "end_time": Infinity}', "`end_time` must be seconds"),
        ('{"audio": "a.wav", "end_time": 1' + "0" * 400 + "}", "`end_time` must be seconds"),
        (
            '{"audio": "a.wav", "begin_time": -0.5}',
            "`begin_time` must be seconds from 0 on, or -1 for none, found -0.5",
        ),
        ('{"audio": "a.wav", "begin_time": 2, "end_time": 1}', "`begin_time` 2.0 is not before `end_time` 1.0"),
        ('{"audio": "a.wav", "begin_time": 2, "end_time": 2}', "`begin_time` 2.0 is not before `end_time` 2.0"),
    ],
)
def test_bad_line_is_named(read: Read, tmp_path: Path, line: str, message: str) -> None:
    path = write_lines(tmp_path, GOOD, "", line)  # the blank line counts as a line, too
    with pytest.raises(ValueError) as error:
        read(path)
    assert f"{path}:3: " in str(error.value)
    assert message in str(error.value)


def test_bad_utf8_is_named(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + '{"audio": "ä.wav"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"set\.jsonl:2: not a JSON object in UTF-8"):
        read(path)


@pytest.mark.parametrize("text", [None, "", "  "])
def test_text_can_be_required(read: Read, tmp_path: Path, text: str | None) -> None:
    path = write_lines(tmp_path, {"audio": "a.wav", "text": "one"}, {"audio": "b.wav", "text": text})
    assert len(read(path)) == 2
    with pytest.raises(ValueError, match=r"set\.jsonl:2: this set needs a transcript"):
        read(path, require_text=True)


@pytest.mark.parametrize("lines", [(), ("", "   ")])
def test_empty_manifest(read: Read, tmp_path: Path, lines: tuple[str, ...]) -> None:
    path = write_lines(tmp_path, *lines)
    with pytest.raises(ValueError, match=r"set\.jsonl has no utterances"):
        read(path)


def test_missing_manifest(read: Read, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.jsonl cannot be read \(No such file or directory\)"):
        read(tmp_path / "nowhere.jsonl")


def test_duplicate_id_names_both_lines(read: Read, tmp_path: Path) -> None:
    path = write_lines(tmp_path, {"audio": "a.wav", "id": "x"}, {"audio": "b.wav"}, {"audio": "c.wav", "id": "x"})
    with pytest.raises(ValueError) as error:
        read(path)
    assert f"{path}:3: id 'x' is already used on line 1 ({path}:1)" in str(error.value)


def test_default_ids_follow_path_and_times(read: Read, tmp_path: Path) -> None:
    lines = [
        {"audio": "a.wav"},
        {"audio": "a.wav", "begin_time": 12345.671, "end_time": 12349},
        {"audio": "a.wav", "begin_time": 12345.672, "end_time": 12349},
        {"audio": "a.wav", "end_time": 3},
    ]
    first = [utterance.id for utterance in read(write_lines(tmp_path, *lines))]
    assert first == ["a.wav", "a.wav@12345.671-12349.0", "a.wav@12345.672-12349.0", "a.wav@-3.0"]
    elsewhere = tmp_path / "moved"
    elsewhere.mkdir()
    assert [utterance.id for utterance in read(write_lines(elsewhere, *lines))] == first


def test_fields_and_defaults(read: Read, tmp_path: Path) -> None:
    line = {
        "audio": "clips/a.wav",
        "text": "één",
        "task": "ASR",
        "begin_time": 1,
        "end_time": -1,
        "speaker": {"age": 3},
    }
    path = write_lines(tmp_path, line, {"audio": "/data/b.wav", "language": "Dutch"})
    a, b = read(path, default_language="English")
    assert a == Utterance(
        id="clips/a.wav@1.0-",
        audio=str(tmp_path / "clips/a.wav"),
        text="één",
        language="English",
        begin_time=1.0,
        extra={"speaker": {"age": 3}},
    )
    assert (b.audio, b.language, b.task, b.text) == ("/data/b.wav", "Dutch", "asr", None)


def test_windows_line_ends_and_byte_order_mark(read: Read, tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"audio": "a.wav"}\r\n\r\n{"audio": "b.wav"}\r\n')
    assert [utterance.id for utterance in read(path)] == ["a.wav", "b.wav"]


def test_round_trip(tmp_path: Path) -> None:
    utterances = [
        Utterance(id="1", audio=str(tmp_path / "clips" / "a.wav"), text="one\u2028two", language="English"),
        Utterance(id="2", audio="/elsewhere/b.flac", begin_time=0.0, end_time=2.5, extra={"voice": "m1", "n": [1]}),
        Utterance(id="3", audio=str(tmp_path / "c.wav"), end_time=0.1 + 0.2),
    ]
    path = tmp_path / "new" / ".." / "set.jsonl"
    (tmp_path / "new").mkdir()
    write_manifest(tmp_path / "set.jsonl", utterances)
    assert read_manifest(tmp_path / "set.jsonl") == utterances
    assert [Path(u.audio).resolve() for u in read_manifest(path)] == [Path(u.audio).resolve() for u in utterances]
    fields = json.loads((tmp_path / "set.jsonl").read_text().split("\n")[0])
    assert fields["audio"] == "clips/a.wav", "relative, so that the folder can be moved"


def test_write_is_atomic(tmp_path: Path) -> None:
    path = write_lines(tmp_path, GOOD)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="`extra` may not hold text"):
        write_manifest(path, [Utterance(id="1", audio="a.wav"), Utterance(id="2", audio="b.wav", extra={"text": "x"})])
    with pytest.raises(TypeError):
        write_manifest(path, [Utterance(id="1", audio="a.wav", extra={"x": object()})])
    assert path.read_bytes() == before
    write_manifest(path, [Utterance(id="1", audio="a.wav")])
    assert [entry.name for entry in tmp_path.iterdir()] == ["set.jsonl"], "no temporary file is left"
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR
