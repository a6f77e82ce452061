"""bench.memory measures a step in a new process, names its cases always alike, and fails where the estimate is off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import memory


def test_a_case_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small model, of whose figures nothing but their form is asked for."""
    assert list(memory.CASES) == [
        "plain", "activation_checkpointing", "lora", "frozen_encoder", "frozen_decoder", "one_micro_batch",
        "one_micro_batch_checkpointed",
    ]  # fmt: skip
    for name, value in (("MALLOC_MMAP_THRESHOLD_", "65536"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)  # main sets them too; this takes them back
    monkeypatch.setattr(memory, "SIZES", memory.TINY)
    monkeypatch.setattr(memory, "VOCAB_SIZE", 2_000)
    status = memory.main(["--cases", "lora", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in rows] == ["memory/lora/rollout", "memory/lora/update"]
    for row in rows:
        assert list(row) == ["case", "estimated_mb", "measured_mb", "ratio"]
        assert row["measured_mb"] > 0
        assert row["ratio"] == pytest.approx(row["estimated_mb"] / row["measured_mb"])
    beyond = [row["case"] for row in rows if abs(row["ratio"] - 1) > memory.LIMIT]
    assert status == bool(beyond)
    if beyond:
        assert f"more than 15% apart: {', '.join(beyond)}" in capsys.readouterr().out
