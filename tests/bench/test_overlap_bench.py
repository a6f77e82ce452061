"""bench.overlap reads its figures from the metrics of two runs; one row says what they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import overlap
from bench.quality import SET

SECONDS = {"sync": 0.2, "one_step_off": 0.16}


def finished(recipe: str, run_dir: Path, *overrides: str) -> dict[str, Any]:
    """Writes what a run of 30 steps leaves: the first ones are slow, and a line of an evaluation has no step."""
    schedule = run_dir.name.split("-seed")[0]
    assert overrides[0] == f"schedule={schedule}"
    assert overrides[-1] == "train.num_steps=30"
    run_dir.mkdir(parents=True)
    lines: list[dict[str, float]] = [
        {"step": step, "time/step": SECONDS[schedule] * (10 if step <= overlap.WARM_UP else 1), "time/overhead": 0.01}
        for step in range(1, 31)
    ]
    if schedule == "one_step_off":
        lines = [line | {"rollout/staleness": 1.0} for line in lines]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 30, "eval/wer/unseen": 0.1}])
    (run_dir / "metrics.jsonl").write_text(text)
    return {"eval": {SET: {"before": {"wer": 0.2}, "after": {"wer": 0.07}}}}


def test_figures_leave_out_the_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "run", finished)
    found = overlap.measure("sync", 0, tmp_path, ["train.num_steps=30"])
    assert found == {"time/step": 0.2, "time/overhead": 0.01, "before": 0.2, "after": 0.07, "staleness": 0.0}


def test_the_case_and_its_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "run", finished)
    arguments = ["train.num_steps=30", "--seeds", "0", "1", "--out_dir", str(tmp_path / "runs")]
    assert overlap.main([*arguments, "--json", str(tmp_path / "rows.json")]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row == {
        "case": "overlap/tiny", "ours_s": 0.16, "other": "sync", "other_s": 0.2, "ratio": pytest.approx(1.25),
        "ours_mb": None, "other_mb": None,
    }  # fmt: skip
    out = capsys.readouterr().out
    assert "| 1 | 0.200 | 0.160 | 20.0% | 7.0% | 7.0% |" in out
    assert "2 seeds; rollouts 1.00 updates old" in out
