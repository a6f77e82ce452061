"""Runs through the real entry point: teachers of other kinds and environments, several at once, one that is killed."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from pathlib import Path

import pytest
from main_job import ROOT, command, environment, last_error, run, start, wait_for_step
from tiny_teachers import GLM_PROMPT

TEACHER_PYTHON = ROOT / ".venv-teacher" / "bin" / "python"
SMALL = [
    "train.micro_batch_size=4",
    "checkpoint.checkpoint_every=100",
    "optim.warmup_steps=1",
    "cluster.ranks_per_node=1",
]


def small(recipe: str, speech: dict[str, Path], run_dir: Path, *overrides: str) -> list[str]:
    return command(speech, run_dir, *SMALL, *overrides, recipe=recipe)


def steps_of(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss/kl" in line]


def test_two_teachers_in_two_environments_share_a_batch(
    speech: dict[str, Path], cluster: dict[str, str], glm_dir: Path, other_python: Path, tmp_path: Path
) -> None:
    """GLM-ASR (kind hf) scores the utterances that a manifest field sends to it, ARK-ASR the others."""
    rows = [json.loads(line) for line in speech["unlabelled"].read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"audio": str(speech["unlabelled"].parent / row["audio"]), "domain": "a" if number % 3 else "b"}
    manifest = tmp_path / "train.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    routes = {
        "glm": {
            "match": {"domain": "a"}, "kind": "hf", "path": str(glm_dir), "prompt": {"text": GLM_PROMPT},
            "python_path": str(other_python),
        },
        "rest": {"num_workers": 2},
    }  # fmt: skip
    overrides = [f"data.train_manifest={manifest}", f"teacher.routes={json.dumps(routes)}", "train.num_steps=2"]
    run_dir = tmp_path / "run"
    result = run(small("tiny", speech, run_dir, *overrides), cluster)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    steps = steps_of(run_dir)
    assert len(steps) == 2
    for line in steps:
        assert all(math.isfinite(value) for value in line.values())
        assert 0.9 <= line["align/coverage"] <= 1
        assert 0 <= line["align/retokenised_share"] <= 1
        assert line["loss/kl"] > 0.1, "a random teacher does not agree with the student"
    assert len(json.loads((run_dir / "workers.json").read_text())["teacher"]) == 3
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval"]["held_out"]["teacher"]["wer"] < 0.3, "the evaluation set goes to the trained teacher"


def test_a_teacher_that_is_killed_ends_the_run_with_the_reason(
    speech: dict[str, Path], cluster: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    overrides = ["train.num_steps=500", "eval.teacher=false", "checkpoint.checkpoint_every=2", "train.max_restarts=0"]
    process = start(small("tiny", speech, run_dir, *overrides), cluster)
    wait_for_step(process, run_dir, 3)
    os.kill(json.loads((run_dir / "workers.json").read_text())["teacher"][0], signal.SIGKILL)
    killed = time.monotonic()
    printed, _ = process.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert process.returncode == 1
    # Ray may print its own warning of the death before or after it.
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: teacher worker 0 \(pid \d+ on .*\) died during the teacher's ", line)
    assert "resume=auto" in line
    assert list((run_dir / "checkpoints").glob("step-*")), "what was saved is still there"


def test_a_package_that_breaks_in_the_teachers_environment_is_named(
    speech: dict[str, Path], cluster: dict[str, str], other_python: Path, tmp_path: Path
) -> None:
    site = next(other_python.parents[1].glob("lib/python*/site-packages"))
    (site / "soundfile.py").write_text("raise OSError('no sound library on this machine')\n")
    try:
        overrides = [f"teacher.python_path={other_python}", "train.num_steps=1", "data.eval_manifests={}"]
        result = run(small("tiny", speech, tmp_path / "run", *overrides), cluster)
    finally:
        (site / "soundfile.py").unlink()
    assert last_error(result) == "error: the teacher to load failed: OSError: no sound library on this machine"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.python_path=nowhere/python"], "teacher.python_path=nowhere/python: there is no such interpreter"),
        (["teacher.routes={zh: {match: {language: zh}}}"], "has no teacher: none of teacher.routes (zh) matches it"),
        (
            ["teacher.kind=hf", "teacher.path={glm}", "teacher.prompt={text: '{audio}{language}', languages: [zh]}"],
            "language 'English' is not one that this teacher knows; it knows Chinese (zh)",
        ),
        (["teacher.language=Klingon"], "teacher.language=Klingon: kind arkasr is told no language"),
        (["teacher.kind=hf", "teacher.prompt={text: '{audio}'}"], "model_type arkasr; set teacher.kind=arkasr"),
        (["teacher.routes={a: {path: 'stage:td'}}"], "teacher.routes.a.path=stage:td: there is no "),
    ],
)  # fmt: skip
def test_what_no_teacher_can_take_is_said_before_anything_starts(
    overrides: list[str],
    message: str,
    speech: dict[str, Path],
    glm_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from opd.train import main

    overrides = [override.replace("{glm}", str(glm_dir)) for override in overrides]
    assert main([*small("tiny", speech, tmp_path / "run")[3:], *overrides]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


@pytest.mark.both_envs
def test_qwen3_asr_teaches_from_its_own_environment(speech: dict[str, Path], tmp_path: Path) -> None:
    assert TEACHER_PYTHON.exists(), "make teacher-env"
    run_dir = tmp_path / "run"
    result = run(small("tiny_qwen3", speech, run_dir, "train.num_steps=2"), environment(tmp_path))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    for line in steps_of(run_dir):
        assert all(math.isfinite(value) for value in line.values())
        assert line["align/coverage"] > 0.95
        assert 0 <= line["align/retokenised_share"] <= 1
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["eval"]["held_out"]["teacher"]["wer"] < 0.2
