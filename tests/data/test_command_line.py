"""What the command lines of this package share."""

from __future__ import annotations

from pathlib import Path

import pytest

from data import import_manifest, validate
from data.command_line import check_writable


def test_the_folder_of_an_output_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable("out=", tmp_path / "new" / "folder" / "a.jsonl")
    check_writable("out=", tmp_path / "other", is_folder=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "new", "other"]
    with pytest.raises(ValueError, match=f"^out={tmp_path}: is a folder: name a file$"):
        check_writable("out=", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file/a.jsonl: cannot be written .*; choose a writable place"):
        check_writable("--output ", tmp_path / "file" / "a.jsonl")


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (import_manifest.main, ["source=nowhere", "out=/proc/a.jsonl"]),
        (validate.main, ["nowhere.jsonl", "report=/proc/a.json"]),
    ],
)
def test_an_output_that_cannot_be_written_is_told_by_its_key(main, arguments, capsys: pytest.CaptureFixture) -> None:
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {arguments[1]}: cannot be written (/proc")
    assert error.count("\n") == 1
