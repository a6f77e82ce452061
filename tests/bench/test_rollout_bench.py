"""bench.rollout times two sides that write the same, names its cases always alike, and fails where a target is missed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import rollout
from bench.rollout import CASES, LEAST, OTHER, Scene, decoding_arguments, responses_of
from opd.arkasr import load_model, load_processor
from opd.rollout.decode import decode

SEED = Path(__file__).resolve().parents[2] / "seeds" / "tiny_student"


@pytest.fixture(scope="module")
def scene(waveforms: list[np.ndarray]) -> Scene:
    """Two batches of spoken digits."""
    model, processor = load_model(SEED), load_processor(SEED)
    arguments = decoding_arguments(model, processor)
    batches = [processor.build_inputs(waveforms[rows]) for rows in (slice(0, 3), slice(3, 6))]
    responses = [responses_of(decode(model, inputs, **arguments)) for inputs in batches]
    written = [[ids for ids in rows if ids is not None] for rows in responses]
    assert [len(rows) for rows in written] == [3, 3]
    return Scene(model, processor, batches, written, arguments)


@torch.inference_mode()
def test_a_case_is_measured(scene: Scene) -> None:
    row, note, forwards = rollout.measure("rollout/x", scene, None, 1)
    assert (row.case, row.other, row.ratio) == ("rollout/x", OTHER, row.other_s / row.ours_s)
    assert forwards <= 1
    assert "forwards an utterance instead of" in note
    _, _, with_drafts = rollout.measure("rollout/x", scene, 0.0, 1)
    assert with_drafts < forwards


@torch.inference_mode()
def test_sides_that_differ_are_not_timed(scene: Scene) -> None:
    changed = Scene(scene.model, scene.processor, scene.batches, scene.responses, dict(scene.arguments))
    changed.arguments["blocked_V"] = scene.arguments["blocked_V"].clone()
    changed.arguments["blocked_V"][scene.responses[0][0][0]] = True  # generate writes it all the same
    with pytest.raises(SystemExit, match="different tokens; nothing was timed"):
        rollout.measure("rollout/x", changed, 0.1, 1)


def test_the_cases_and_their_rows(
    scene: Scene, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rollout, "make_scene", lambda path, num_batches: scene)
    status = rollout.main(["--runs", "1", "--threads", "1", "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert list(CASES) == ["wer10", "wer25", "useless_draft"]
    assert [row["case"] for row in rows] == [
        f"{name}/{case}" for name in ("rollout", "rollout_large") for case in CASES
    ]
    for row in rows:
        assert list(row) == ["case", "ours_s", "other", "other_s", "ratio", "ours_mb", "other_mb"]
        assert row["ratio"] == pytest.approx(row["other_s"] / row["ours_s"])
    out = capsys.readouterr().out
    missed = [line for line in out.splitlines() if line.startswith("missed: ")]
    assert status == bool(missed)
    for row in rows:
        if row["ratio"] < rollout.TARGETS.get(row["case"], LEAST):
            assert any(line.startswith(f"missed: {row['case']}: {row['ratio']:.2f} times as fast") for line in missed)
