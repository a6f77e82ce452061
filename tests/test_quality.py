"""What the README says the quickstart brings, measured anew (make nightly)."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.quality import distil, honest_start

pytestmark = pytest.mark.nightly


def test_distillation_closes_half_of_the_gap_in_four_minutes(tmp_path: Path) -> None:
    (row,) = distil([0], tmp_path)
    assert row["before"] <= 0.30
    assert row["cut"] >= 0.25
    assert row["gap_closed"] >= 0.5
    assert row["seconds"] <= 240


def test_the_student_has_learnt_what_its_labels_teach(tmp_path: Path) -> None:
    assert honest_start(tmp_path)["cut"] < 0.10
