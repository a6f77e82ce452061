"""The run directory: atomic checkpoints, retention, resume rules, the lock."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from opd.checkpoint import RunDir, atomic_write_text

FROZEN = ["recipe", "optim", "data.train_manifest"]
HOLD_LOCK = """
import sys, time
from opd.checkpoint import RunDir
run = RunDir.open(sys.argv[1], {"recipe": "tiny"})
print("held", flush=True)
time.sleep(600)
"""


def make_config(**changes: Any) -> dict[str, Any]:
    config = {
        "recipe": "tiny",
        "optim": {"lr": 1e-5, "betas": (0.9, 0.95)},
        "data": {"train_manifest": "a.jsonl", "on_bad_audio": "stop"},
        "train": {"num_steps": 10},
    }
    return {**config, **changes}


def open_run(path: Path, config: dict[str, Any] | None = None, **arguments: Any) -> RunDir:
    return RunDir.open(path, config or make_config(), frozen_keys=FROZEN, **arguments)


def save(run: RunDir, step: int, text: str = "weights") -> Path:
    folder = run.begin_save(step)
    (folder / "optim").mkdir()
    (folder / "model.bin").write_text(text)
    (folder / "optim" / "rank0.bin").write_text("moments")
    return run.commit_save(step, {"step": step, "sampler": {"position": 3}})


@pytest.fixture
def run(tmp_path: Path) -> Any:
    run = open_run(tmp_path / "run")
    yield run
    run.close()


def test_fresh_run_saves_the_resolved_config(run: RunDir) -> None:
    assert yaml.safe_load((run.path / "config.yaml").read_text())["optim"] == {"lr": 1e-5, "betas": [0.9, 0.95]}
    assert run.latest() is None
    assert run.best() is None


def test_save_and_load(run: RunDir) -> None:
    path = save(run, 500)
    assert path == run.path / "checkpoints" / "step-000500" == run.checkpoint_path(500)
    assert (path / "optim" / "rank0.bin").read_text() == "moments"
    assert run.latest() == 500
    assert run.load_loop_state(500) == {"step": 500, "sampler": {"position": 3}}
    marker = json.loads((path / "COMPLETE").read_text())
    assert marker["files"]["model.bin"] == {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}
    assert set(marker["files"]) == {"model.bin", "optim/rank0.bin", "loop_state.json", "config.yaml"}
    assert yaml.safe_load((path / "config.yaml").read_text()) == yaml.safe_load((run.path / "config.yaml").read_text())
    assert json.loads((run.checkpoints_dir / "latest.json").read_text()) == {"step": 500, "path": "step-000500"}


def test_unfinished_save_is_ignored_and_removed(run: RunDir) -> None:
    save(run, 1)
    temp = run.begin_save(2)
    (temp / "model.bin").write_text("half")
    assert run.latest() == 1
    run.close()
    with_leftover = open_run(run.path)
    assert with_leftover.latest() == 1
    assert not temp.exists()
    with_leftover.close()


def test_each_save_gets_a_directory_of_its_own(run: RunDir) -> None:
    first = run.begin_save(1)
    (first / "model.bin").write_text("from a worker that should be dead")
    second = run.begin_save(1)
    assert second != first
    assert not first.exists()
    assert list(second.iterdir()) == []


@pytest.mark.parametrize("damage", ["marker", "broken marker", "missing", "short", "changed"])
def test_damaged_checkpoint_is_skipped(run: RunDir, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    save(run, 1)
    path = save(run, 2)
    if damage == "marker":
        (path / "COMPLETE").unlink()
    elif damage == "broken marker":
        (path / "COMPLETE").write_text('{"step": 2, "fi')
    elif damage == "missing":
        (path / "optim" / "rank0.bin").unlink()
    elif damage == "changed":
        (path / "model.bin").write_text("weighty")
    else:
        (path / "model.bin").write_text("w")
    run.close()
    with caplog.at_level(logging.WARNING):
        reopened = open_run(run.path)
    assert reopened.latest() == 1
    assert "step-000002: checkpoint skipped" in caplog.text
    assert json.loads((run.checkpoints_dir / "latest.json").read_text())["step"] == 1
    with pytest.raises(ValueError, match="checkpoint 2 cannot be loaded"):
        reopened.load_loop_state(2)
    save(reopened, 2, "repaired")
    assert reopened.latest() == 2
    assert (path / "model.bin").read_text() == "repaired"
    reopened.close()


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(run: RunDir) -> None:
    """To begin again from the first step would overwrite what the run has measured."""
    (save(run, 1) / "model.bin").write_text("w")
    changed = save(run, 2) / "model.bin"
    changed.write_text("weighty")
    run.metrics_path.write_text('{"step": 1}\n')
    before = (run.path / "config.yaml").read_text()
    run.close()
    with pytest.raises(ValueError, match="every checkpoint is damaged") as error:
        open_run(run.path, make_config(train={"num_steps": 20}))
    assert str(error.value) == (
        f"run_dir={run.path}: every checkpoint is damaged (step-000002: model.bin has other contents than when it was saved "
        "(checksum); step-000001: model.bin has 1 bytes instead of 7); restore the files of one, or choose a new run_dir"
    )
    assert (run.path / "config.yaml").read_text() == before
    assert run.metrics_path.read_text() == '{"step": 1}\n'
    changed.write_text("weights")
    restored = open_run(run.path)
    assert restored.latest() == 2
    restored.close()


def test_failed_commit_leaves_the_earlier_checkpoint(run: RunDir) -> None:
    save(run, 1)
    run.begin_save(2)
    with pytest.raises(TypeError):
        run.commit_save(2, {"not json": object()})
    assert run.latest() == 1


def test_retention_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", make_config(checkpoint={"keep_last": 2}))
    wers = {0: 0.9, 1: 0.5, 2: 0.2, 3: 0.2, 4: 0.3, 5: float("nan"), 6: 0.4}
    assert [run.record_eval(step, wers[step]) for step in (0,)] == [True]
    for step in range(1, 7):
        assert run.record_eval(step, wers[step]) == (step in (1, 2))
        save(run, step)
    assert sorted(path.name for path in run.checkpoints_dir.glob("step-*")) == [
        "step-000002",
        "step-000005",
        "step-000006",
    ]
    assert run.best() == (2, 0.2)
    best = json.loads((run.checkpoints_dir / "best.json").read_text())
    assert (best["step"], best["wer"]) == (2, 0.2)
    run.close()


def test_best_of_the_saved_ones_is_kept_when_a_better_one_was_not_saved(tmp_path: Path) -> None:
    run = open_run(tmp_path / "run", make_config(checkpoint={"keep_last": 1}))
    for step, wer in ((10, 0.3), (20, 0.4)):
        run.record_eval(step, wer)
        save(run, step)
    assert run.record_eval(25, 0.1)
    save(run, 30)
    assert run.best() == (10, 0.3)
    assert run.latest() == 30
    run.close()


def test_evaluations_of_a_lost_part_are_forgotten(run: RunDir) -> None:
    run.record_eval(100, 0.5)
    save(run, 100)
    run.record_eval(200, 0.3)
    run.record_eval(300, 0.2)  # then a crash; the run goes on from 100 and evaluates the same again
    assert run.record_eval(200, 0.3)
    save(run, 200)
    assert run.best() == (200, 0.3)


def test_resume_with_the_same_config_and_changed_free_keys(run: RunDir) -> None:
    save(run, 1)
    run.close()
    changed = make_config(train={"num_steps": 20})
    with_more_steps = open_run(run.path, changed)
    assert with_more_steps.latest() == 1
    assert yaml.safe_load((run.path / "config.yaml").read_text())["train"] == {"num_steps": 20}
    with_more_steps.close()


def test_changed_frozen_keys_are_listed(run: RunDir) -> None:
    save(run, 1)
    run.close()
    before = (run.path / "config.yaml").read_text()
    changed = make_config(optim={"lr": 1.0, "eps": 2.0}, data={"train_manifest": "b.jsonl", "on_bad_audio": "skip"})
    with pytest.raises(ValueError, match="cannot be resumed") as error:
        open_run(run.path, changed)
    message = str(error.value)
    for part in (
        "optim.lr was 1e-05, is now 1.0",
        "optim.eps was (absent), is now 2.0",
        "optim.betas was [0.9, 0.95], is now (absent)",
        "data.train_manifest was a.jsonl, is now b.jsonl",
    ):
        assert part in message
    assert "on_bad_audio" not in message
    assert "\n" not in message
    assert (run.path / "config.yaml").read_text() == before


def test_frozen_keys_may_change_before_the_first_checkpoint(run: RunDir) -> None:
    run.close()
    open_run(run.path, make_config(optim={"lr": 1.0})).close()


def test_other_recipe_is_refused(run: RunDir) -> None:
    run.close()
    with pytest.raises(ValueError, match="belongs to recipe 'tiny', not to 'ark06b'; choose another run_dir"):
        open_run(run.path, make_config(recipe="ark06b"))


def test_resume_never_with_checkpoints_is_refused(run: RunDir) -> None:
    run.close()
    never = open_run(run.path, resume="never")
    save(never, 7)
    never.close()
    with pytest.raises(ValueError, match=r"newest is step 7.*resume=auto"):
        open_run(run.path, resume="never")
    with pytest.raises(ValueError, match="resume=perhaps"):
        open_run(run.path, resume="perhaps")


def test_refused_open_leaves_the_lock_free(run: RunDir) -> None:
    run.close()
    with pytest.raises(ValueError, match="another run_dir"):
        open_run(run.path, make_config(recipe="other"))
    open_run(run.path).close()


def test_relative_path_in_a_ray_job_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"run_dir=runs/x: .*absolute path"):
        open_run(Path("runs/x"), in_ray_job=True)
    assert list(tmp_path.iterdir()) == []
    run = open_run(Path("runs/x"))
    assert run.path == tmp_path / "runs" / "x"
    run.close()
    open_run(tmp_path / "y", in_ray_job=True).close()


def test_place_that_cannot_be_written(tmp_path: Path) -> None:
    # Below a regular file: root, who runs the tests in a container, may write anywhere else.
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match="cannot be made or written"):
            open_run(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only directory")
def test_read_only_directory(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be made or written"):
        open_run(tmp_path)


def test_directory_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds thesis.tex but no config.yaml"):
        open_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_broken_saved_config(run: RunDir) -> None:
    run.close()
    for text in ("a: [1, 2", "- a list"):
        (run.path / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=r"config.yaml: the saved config"):
            open_run(run.path)


def test_one_driver_at_a_time_and_sigkill_frees_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD_LOCK, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"another driver \(pid {holder.pid} on "):
            open_run(path)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    open_run(path).close()


def test_truncate_metrics(run: RunDir) -> None:
    lines = [{"step": 0, "eval/wer/a": 0.5}, *({"step": step, "loss/kl": step / 3} for step in (1, 2, 3))]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    run.metrics_path.write_text(whole + '{"step": 4, "loss/k')
    run.truncate_metrics(4)
    assert run.metrics_path.read_text() == whole
    run.truncate_metrics(2)
    assert run.metrics_path.read_text() == "".join(json.dumps(line) + "\n" for line in lines[:3])
    evaluated = json.dumps({"step": 2, "eval/wer/a": 0.4}) + "\n"
    with open(run.metrics_path, "a") as file:
        file.write(evaluated)
    run.truncate_metrics(2)
    assert run.metrics_path.read_text().endswith(evaluated)
    run.truncate_metrics(2, unevaluated=True)
    assert run.metrics_path.read_text() == "".join(json.dumps(line) + "\n" for line in lines[:3])
    run.truncate_metrics(0)
    assert run.metrics_path.read_text() == ""
    run.metrics_path.unlink()
    run.truncate_metrics(2)
    assert not run.metrics_path.exists()


def test_atomic_write_and_summary(run: RunDir) -> None:
    run.write_summary({"recipe": "tiny", "steps": 3})
    run.write_summary({"recipe": "tiny", "steps": 4})
    assert json.loads((run.path / "summary.json").read_text()) == {"recipe": "tiny", "steps": 4}
    atomic_write_text(run.path / "note", "é\n")
    assert (run.path / "note").read_bytes() == "é\n".encode()
    assert not list(run.path.glob(".*tmp*"))


def test_keys_that_an_older_version_did_not_know_have_their_defaults(run: RunDir) -> None:
    save(run, 1)
    run.close()
    newer = make_config(optim={"lr": 1e-5, "betas": (0.9, 0.95), "offload": False}, zero={"stage": 2})
    frozen, defaults = [*FROZEN, "zero"], {"optim": {"lr": 1.0, "offload": False}, "zero": {"stage": 2}}
    RunDir.open(run.path, newer, frozen_keys=frozen, defaults=defaults).close()
    for changed in ({**newer, "zero": {"stage": 3}}, {**newer, "optim": {**newer["optim"], "offload": True}}):
        with pytest.raises(ValueError, match=r"zero.stage was 2, is now 3|optim.offload was False, is now True"):
            RunDir.open(run.path, changed, frozen_keys=frozen, defaults=defaults)
