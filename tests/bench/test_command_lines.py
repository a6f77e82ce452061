"""Command lines that are answered before anything is run."""

from __future__ import annotations

import subprocess
import sys

import pytest
from main_job import ROOT

from bench import quality, transcribe_speed


@pytest.mark.parametrize("main", [quality.main, transcribe_speed.main])
def test_help_runs_nothing(main, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "python -m bench." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("main", "argument", "message"),
    [
        (quality.main, "seed=1", "unknown argument 'seed=1'; there are seeds=..., out_dir=..., honest=..."),
        (quality.main, "seeds=1,a", "seeds=1,a: must be whole numbers from 0 on, each once, with commas between"),
        (quality.main, "honest=yes", "honest=yes: must be one of false, true"),
        (transcribe_speed.main, "clip=1", "unknown argument 'clip=1'; there are clips=..., batch_size=..., model=..."),
        (transcribe_speed.main, "clips=0", "clips=0: must be a whole number from 1 on"),
        (transcribe_speed.main, "model=./none", "model=./none: neither a folder nor a Hub repository"),
    ],
)
def test_bad_arguments_give_one_line(main, argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([argument]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (["scripts/make_seeds.py", "--help"], 0, "Makes shipped seeds again"),
        (["scripts/make_seeds.py", "x"], 2, "error: x: no seed that is made here; there are tiny_teacher, tiny_student"),
        (["scripts/make_qwen3_seed.py", "--help"], 0, "usage: make_qwen3_seed.py"),
        (["scripts/make_qwen3_seed.py"], 1, "run .venv-teacher/bin/python scripts/make_qwen3_seed.py"),
        (["-m", "opd.evaluate"], 2, "error: opd.evaluate is no command; scripts/eval/"),
        (["-m", "opd.compare"], 2, "error: opd.compare is no command; python -m opd.train recipe=tiny_compare"),
    ],
)  # fmt: skip
def test_scripts_answer_where_they_cannot_run(command: list[str], status: int, said: str) -> None:
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == status
    assert said in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
