"""bench.data measures what it says: both sides' features are the same, and its rows are those of all benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    assert "seconds of audio a second" in capsys.readouterr().out
