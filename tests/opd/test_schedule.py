"""Which rollout is trained when, and that nothing is in line at a step where the run may be saved."""

from __future__ import annotations

import pytest

from opd.config import load_config
from opd.schedule import RolloutLine


class Done:
    """Scores that are there."""

    def wait(self) -> tuple[list, float]:
        return [], 1.0


def order(*overrides: str, start: int = 0, steps: int = 8) -> list[tuple[int, int, int]]:
    """(update, the step its rollout was made for, its age) of each update, as the main flow asks for them."""
    arguments = [f"train.num_steps={steps}", "checkpoint.checkpoint_every=4"]
    line = RolloutLine(load_config(["recipe=tiny", *arguments, *overrides]))
    done = []
    for step in range(start + 1, steps + 1):
        while line.wants_rollout(step):
            line.add(step, [], line.rollout_step(step), Done())
        scored = line.take(step)
        done.append((step, scored.rollout, scored.staleness))
    return done


def test_sync_trains_each_rollout_at_once() -> None:
    assert order() == [(step, step, 0) for step in range(1, 9)]


@pytest.mark.parametrize("start", [0, 4])
def test_one_step_off_is_one_update_behind_but_not_across_a_checkpoint(start: int) -> None:
    """What goes on from the checkpoint of step 4 makes the same rollouts as a run that was not interrupted."""
    whole = [(1, 1, 0), (2, 2, 1), (3, 3, 1), (4, 4, 1), (5, 5, 0), (6, 6, 1), (7, 7, 1), (8, 8, 1)]
    assert order("schedule=one_step_off", start=start) == whole[start:]


def test_an_evaluation_may_save_and_stop_too() -> None:
    ages = [age for _, _, age in order("schedule=one_step_off", "eval.eval_every=2", "checkpoint.checkpoint_every=100")]
    assert ages == [0, 1, 0, 1, 0, 1, 0, 1]
