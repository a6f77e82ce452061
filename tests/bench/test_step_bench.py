"""bench.step compares two sides that compute the same, and does not time sides that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import ranks  # noqa: F401  sets the environment that verl is imported under
import torch

from bench.plain_step import PlainSide
from bench.step import OurSide, compare
from data.manifest import read_manifest
from opd.config import load_config
from opd.resolve import resolve
from opd.types import Batch

Sides = tuple[OurSide, PlainSide, Callable[[], Batch]]


@pytest.fixture(params=[4, 8])
def sides(speech: dict[str, Path], request: pytest.FixtureRequest) -> Sides:
    """With micro-batches of half the batch, and of all of it: then the update goes on from the rollout's encoder output."""
    keys = [
        f"data.train_manifest={speech['unlabelled']}",
        "data.eval_manifests={}",
        "train.batch_size=8",
        f"train.micro_batch_size={request.param}",
        "cluster.ranks_per_node=1",
    ]
    config = resolve(load_config(["recipe=tiny", *keys]))
    ours = OurSide(config)
    utterances = read_manifest(speech["unlabelled"])
    turns = iter(range(100))

    def batches() -> Batch:
        start = 8 * (next(turns) % 2)
        return utterances[start : start + 8]

    return ours, PlainSide(config, ours.blocked_V, ours.teacher.blocked_V), batches


def test_both_sides_take_the_same_steps(sides: Sides) -> None:
    ours, other, batches = sides
    before = torch.nn.utils.parameters_to_vector(ours.module.parameters())
    row, note = compare("step/first_epoch", ours, other, batches, 1)
    assert row.ratio == pytest.approx(row.other_s / row.ours_s)
    assert "tokens an utterance" in note
    assert not torch.equal(torch.nn.utils.parameters_to_vector(ours.module.parameters()), before)
    drafted = ours.forwards
    assert set(ours.drafts.earlier) == {u.id for u in batches() + batches()}
    # What was written is the draft of the next time round.
    compare("step/later_epoch", ours, other, batches, 2)
    assert ours.forwards < drafted


def test_sides_that_differ_are_not_timed(sides: Sides) -> None:
    ours, other, batches = sides
    other.blocked_V = other.blocked_V.clone()
    other.blocked_V[other.eos_id] = True  # it writes EOS all the same, and its loss is another
    with pytest.raises(SystemExit, match="different losses"):
        compare("step/first_epoch", ours, other, batches, 1)
