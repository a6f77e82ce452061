"""The two sides of bench.loss compute the same thing, and a measured run says what it should."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks  # noqa: F401  sets the environment that verl is imported under
import torch

from bench.loss import LEAST, OTHER, SIDES, Sizes, load_side, main, make_scene, measure, missed_targets
from bench.tables import Row

SMALL = Sizes(positions=40, vocab_size=700, width=24, top_k=6, threads=1)


@pytest.mark.parametrize("case", SIDES)
def test_both_sides_compute_the_same(case: str) -> None:
    results = []
    for name in SIDES[case]:
        scene = make_scene(SMALL)
        loss_N = load_side(name)(scene)
        results.append((loss_N, scene.hidden_ND.grad, scene.weight_VD.grad))
    assert results[0][0].median() > 0.1
    for theirs, own in zip(*results, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


def test_a_scene_leaves_nothing_to_save() -> None:
    """Every id of the supports is one that both could write, and in a row each is there once."""
    scene = make_scene(SMALL)
    for ids_NK in (scene.teacher_ids_NK, scene.student_ids_NK):
        assert all(len(set(row)) == SMALL.top_k for row in ids_NK.tolist())
        assert 0 <= int(ids_NK.min()) <= int(ids_NK.max()) < SMALL.vocab_size
    both = zip(scene.teacher_ids_NK.tolist(), scene.student_ids_NK.tolist(), strict=True)
    assert sum(len({*teacher} & {*student}) for teacher, student in both) == SMALL.positions * SMALL.top_k // 2


@pytest.mark.parametrize("name", [OTHER, "tail", "renormalized"])
def test_a_run_is_measured(name: str) -> None:
    found = measure(name, SMALL, with_result=True)
    assert found["seconds"] > 0
    assert found["loss"].shape == (SMALL.positions,)
    assert found["hidden gradient"].shape == (SMALL.positions, SMALL.width)


def test_what_is_slower_or_larger_than_it_should_be_is_named() -> None:
    """1.1 times the time, a tenth of the memory, the renormalised form 6 times as fast."""
    assert list(SIDES) == list(LEAST)
    met = [
        Row("loss/tail", 1.09, OTHER, 1.0, 1 / 1.09, 99.0, 1000.0),
        Row("loss/renormalized", 1.0, OTHER, 6.1, 6.1, 70.0, 1000.0),
    ]
    assert missed_targets(met) == []
    missed = [
        Row("loss/tail", 1.2, OTHER, 1.0, 1 / 1.2, 101.0, 1000.0),
        Row("loss/renormalized", 1.0, OTHER, 5.9, 5.9, 70.0, 1000.0),
    ]
    assert missed_targets(missed) == [
        "loss/tail: 0.83 times as fast, target 0.91",
        "loss/tail: 101 MB, target 0.1 of 1,000 MB",
        "loss/renormalized: 5.90 times as fast, target 6.00",
    ]


def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.loss.in_new_process", lambda name, sizes, full=False: measure(name, sizes, full))
    sizes = ["--positions", "40", "--vocab_size", "700", "--width", "24", "--top_k", "6", "--threads", "1"]
    assert main([*sizes, "--runs", "1", "--json", str(tmp_path / "rows.json")]) == 0
    assert [row["case"] for row in json.loads((tmp_path / "rows.json").read_text())] == list(SIDES)
    assert capsys.readouterr().out.endswith("targets are checked at the default sizes only\n")
