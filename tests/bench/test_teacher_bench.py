"""The two sides of bench.teacher give the same numbers, and what differs is noticed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.tables import Row
from bench.teacher import (
    LEAST,
    OTHER,
    SCENES,
    Scene,
    Sizes,
    check,
    compare,
    make_random_teacher,
    make_scene,
    missed_targets,
    ours,
    random_scene,
)

SEEDS = Path(__file__).resolve().parents[2] / "seeds"
SMALL = Sizes(rows=2, seconds=1.0, tokens=5, vocab_size=1000, width=64, num_layers=2)


@pytest.fixture(scope="module", params=["tiny", "random"])
def scene(
    request: pytest.FixtureRequest, waveforms: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Scene:
    if request.param == "tiny":
        return make_scene(str(SEEDS / "tiny_student"), str(SEEDS / "tiny_teacher"), waveforms, None)
    folder = tmp_path_factory.mktemp("random") / "teacher"
    make_random_teacher(folder, SMALL)
    return random_scene(str(folder), SMALL)


def test_both_sides_give_the_same_numbers(scene: Scene) -> None:
    row, note = compare("teacher/x", scene, 1)
    assert row.ratio == pytest.approx(row.other_s / row.ours_s)
    assert f"{int(scene.rollout.response_mask_BT.sum())} positions" in note


def test_the_random_teacher_knows_every_id(tmp_path: Path) -> None:
    make_random_teacher(tmp_path / "teacher", SMALL)
    scene = random_scene(str(tmp_path / "teacher"), SMALL)
    assert scene.teacher.token_map.coverage == 1.0
    score = ours(scene)
    assert (score["candidate_logprobs_BTC"] > float("-inf")).all()
    assert (score["unmapped_mass_BT"] < 1e-6).all()


def test_numbers_that_differ_are_not_timed(scene: Scene) -> None:
    tables = scene.tables
    try:
        scene.tables = (tables[0].roll(1), tables[1])
        with pytest.raises(SystemExit):
            check(scene)
    finally:
        scene.tables = tables


def test_what_is_slower_or_larger_than_it_should_be_is_named() -> None:
    assert list(SCENES) == list(LEAST)
    met = [
        Row("teacher/tiny", 1.0, OTHER, 0.95, 0.95, 20.0, 19.0),
        Row("teacher/large_vocab", 1.0, OTHER, 2, 2, 20, 90),
    ]
    assert missed_targets(met) == []
    missed = [Row("teacher/tiny", 1.0, OTHER, 0.8, 0.8, 9, 9), Row("teacher/large_vocab", 1.0, OTHER, 1.4, 1.4, 30, 90)]
    assert missed_targets(missed) == [
        "teacher/tiny: 0.80 times as fast, target 0.9",
        "teacher/large_vocab: 1.40 times as fast, target 1.5",
        "teacher/large_vocab: 30 MB, target 0.25 of 90 MB",
    ]
