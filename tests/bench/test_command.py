"""Every benchmark's command line: a wrong argument is one line, before anything is measured."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from bench.command import Parser, command, report_missed, writable

NAMES = ("data", "gpu", "loss", "manifest", "memory", "overlap", "rollout", "scoring", "step", "teacher")
WRONG = {
    "memory": ["--cases", "nosuch"],
    "loss": ["--positions", "0"],
    "rollout": ["--model", "/nonexistent/model"],
    "step": ["train.nosuch=1"],
    "teacher": ["--runs", "0"],
    "data": ["--batches", "many"],
    "quality": ["seed=1"],
    "transcribe_speed": ["clip=3"],
    "load_checkpoint": ["dtype=int8"],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_one_line(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    try:
        status = importlib.import_module(f"bench.{name}").main(WRONG[name])
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"bench.{name}").main(["--json", str(tmp_path / "none" / "x.json")])
    assert stop.value.code == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: argument --json: ")
    assert "x.json cannot be written: No such file or directory" in err
    assert err.count("\n") == 1


def test_looking_whether_a_file_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("[1]")
    assert writable(str(old)).read_text() == "[1]"
    assert not writable(str(tmp_path / "new.json")).exists()


@pytest.mark.parametrize(
    "error", [ValueError("two\nlines"), SystemExit("two lines"), FileNotFoundError(2, "two lines")]
)
def test_what_goes_wrong_is_one_line(
    error: BaseException, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @command
    def main(argv: list[str]) -> int:
        raise error

    assert main([]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.endswith("two lines\n")
    monkeypatch.setenv("OPD_TRACEBACK", "1")
    if not isinstance(error, SystemExit):
        with pytest.raises(type(error)):
            main([])


def test_help_says_what_the_module_says(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        Parser("x", "What it measures.\n\nAnd how.").parse_args(["--help"])
    assert stop.value.code == 0
    assert "And how." in capsys.readouterr().out


def test_missed_targets_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert (report_missed([]), report_missed(["x: 1, target 2"])) == (0, 1)
    assert capsys.readouterr().out == "all targets are met\nmissed: x: 1, target 2\n"
