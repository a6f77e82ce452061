"""Exports of runs whose files were damaged, and what the card says of where a run began."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from stopped_run import stopped_run

from opd.arkasr import load_model
from opd.card import write_model_card
from opd.config import PROJECT_ROOT
from opd.export import export_checkpoint, main
from opd.resolve import absolute, portable
from opd.saved_run import saved_config

SEED = PROJECT_ROOT / "seeds" / "tiny_student"


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stopped_run(tmp_path_factory.mktemp("runs") / "stopped", SEED)


@pytest.fixture
def run_dir(whole_run: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(whole_run, tmp_path / "run")


def flip_a_bit(checkpoint: Path) -> None:
    """In the middle of the weights, where no reader notices."""
    path = next((checkpoint / "state").glob("*.distcp"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def cut_short(checkpoint: Path) -> None:
    path = next((checkpoint / "state").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1000])


def break_marker(checkpoint: Path) -> None:
    (checkpoint / "COMPLETE").write_text('{"step": 30, "fi', encoding="utf-8")


DAMAGES = [
    (flip_a_bit, "has other contents than when it was saved (checksum)"),
    (cut_short, "bytes instead of"),
    (break_marker, "the COMPLETE marker cannot be read"),
]


@pytest.mark.parametrize(("harm", "problem"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    run_dir: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None], problem: str
) -> None:
    harm(run_dir / "checkpoints" / "step-000030")
    out = export_checkpoint(run_dir)
    norm = load_file(out / "model.safetensors")["model.norm.weight"]
    assert torch.equal(norm, (load_model(SEED).state_dict()["model.norm.weight"] + 20).to(norm.dtype))
    assert "step-000030: checkpoint skipped, it is damaged: " in caplog.text
    assert problem in caplog.text


@pytest.mark.parametrize(("harm", "problem"), DAMAGES)
def test_a_damaged_checkpoint_that_is_named_is_refused(
    run_dir: Path, capsys: pytest.CaptureFixture, harm: Callable[[Path], None], problem: str
) -> None:
    harm(run_dir / "checkpoints" / "step-000030")
    error = error_of(capsys, run_dir, "step=30")
    assert error.startswith(f"error: step=30: {run_dir}/checkpoints/step-000030 is damaged: ")
    assert problem in error
    assert "name another step, or leave step= out" in error


def test_a_run_without_an_undamaged_checkpoint(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    for checkpoint in (run_dir / "checkpoints").glob("step-*"):
        flip_a_bit(checkpoint)
    error = error_of(capsys, run_dir)
    assert "every checkpoint is damaged (step-000030: " in error
    assert error.count("(checksum)") == 4
    assert error.endswith("restore the files of one, or choose a new run_dir")


def test_a_run_without_a_checkpoint(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    assert "there is no complete checkpoint; start the run again" in error_of(capsys, run_dir)


def test_folders_of_other_names_are_no_checkpoints(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    checkpoints = run_dir / "checkpoints"
    shutil.copytree(checkpoints / "step-000030", checkpoints / "step-old")
    assert "of step 11; there are [10, 15, 20, 30]" in error_of(capsys, run_dir, "step=11")
    assert export_checkpoint(run_dir).is_dir()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.yaml", "student: {path: [", "config.yaml: the saved config cannot be read (while parsing"),
        ("config.yaml", "- tiny\n", "not a mapping of keys to values; restore it (every checkpoint has a copy"),
        ("config.yaml", "recipe: tiny\nstudent: x\n", "config.yaml: student is a section, not 'x'; restore it"),
        ("summary.json", '{"steps": 30, ', "summary.json: the run's results cannot be read (JSONDecodeError"),
        ("summary.json", '{"eval": {}}', "(steps or eval is missing); remove this file to export without them"),
        ("summary.json", "[]", "summary.json: the run's results cannot be read (TypeError"),
        ("metrics.jsonl", '{"step": 1 "x": 2}\n', "metrics.jsonl:1: no JSON (Expecting ',' delimiter"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    run_dir: Path, capsys: pytest.CaptureFixture, name: str, content: str, message: str
) -> None:
    (run_dir / name).write_text(content, encoding="utf-8")
    error = error_of(capsys, run_dir)
    assert error.startswith(f"error: {run_dir}/{name}")
    assert message in error


def test_a_start_of_another_size_is_refused(run_dir: Path, capsys: pytest.CaptureFixture) -> None:
    config = run_dir / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("seeds/tiny_student", "seeds/tiny_teacher"))
    assert "holds no weights of the model that the run started from" in error_of(capsys, run_dir)


def error_of(capsys: pytest.CaptureFixture, run_dir: Path, *arguments: str) -> str:
    """The one line that `python -m opd.export` says, having written nothing."""
    assert main([f"run_dir={run_dir}", *arguments]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    *warnings, last = error.splitlines()
    assert all("checkpoint skipped, it is damaged" in line for line in warnings)
    assert not (run_dir / "export").exists()
    return last


def test_a_path_inside_the_project_is_no_hub_id(run_dir: Path, tmp_path: Path) -> None:
    assert "path: seeds/tiny_student\n" in (run_dir / "config.yaml").read_text(encoding="utf-8")
    card = ModelCard.load(export_checkpoint(run_dir) / "README.md")
    assert card.data.base_model is None
    assert "It started from `tiny_student`. Its teacher in on-policy distillation was `tiny_teacher`." in card.text
    # The run itself writes its card with absolute paths.
    config = saved_config(run_dir)
    assert config["teacher"]["path"] == str(PROJECT_ROOT / "seeds" / "tiny_teacher")
    own = ModelCard.load(write_model_card(tmp_path, {"stage": "opd", "config": config})).text
    assert card.text.split("## Settings")[1] == own.split("## Settings")[1]
    assert card.text.split("## Use")[0] == own.split("## Use")[0]


def test_absolute_is_the_opposite_of_portable() -> None:
    values = {
        "student": {"path": "ark/ARK-ASR-0.6B"},
        "teacher": {"path": None, "routes": {"a": {"path": str(SEED), "dtype": "float32"}}},
        "stage": "opd",
        "run_dir": "/runs/x",
    }
    assert portable(values)["teacher"]["routes"]["a"]["path"] == "seeds/tiny_student"
    assert absolute(portable(values)) == values
