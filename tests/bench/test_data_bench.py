"""bench.data measures what it says: both sides' features are the same, and its rows are those of all benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import data


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "RUNS", 1)
    monkeypatch.setattr(data, "BATCH_SIZE", 2)
    assert data.main(["--lines", "30", "--batches", "1", "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in rows] == ["data/loader", "data/beside_steps"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["other_s"] / row["ours_s"])
    assert rows[1]["ours_s"] >= 0.5  # the step beside which it reads
    out = capsys.readouterr().out
    assert "seconds of audio a second" in out
    assert out.endswith("targets are checked at the default sizes only\n")


def test_a_loader_that_is_waited_for_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    features = [torch.zeros(1)]
    monkeypatch.setattr(data, "run", lambda u, threads, batches, step_s: (1.2 if threads else 1.0, 0.1, features))
    assert data.main(["--lines", "30"]) == 1
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "missed: data/loader: 0.83 times as fast, target 0.9",
        "missed: data/beside_steps: 8.3% of the time waited for audio, target 5%",
    ]
