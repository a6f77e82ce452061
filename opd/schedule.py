"""Which rollout is trained when: `sync`, each before its own update; `one_step_off`, one is scored while another trains."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from opd.schema import Config
from opd.types import Batch


@dataclass
class ScoredRollout:
    """A rollout ready to be trained: references to its scores, the share of positions that align, its age in updates."""

    batch: Batch
    rollout: Any
    scores: list[list[Any]]
    coverage: float
    staleness: int


class RolloutLine:
    """Rollouts in line for their update, oldest first; the teacher scores them meanwhile."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._line: deque[tuple[int, Batch, Any, Any]] = deque()

    def wants_rollout(self, step: int) -> bool:
        """Whether a further rollout is to be made before the update of `step`.

        With one_step_off the rollout of the next step comes before this update, and is scored during it: it is one update
        old when it is trained. Not before a step after which the run may be saved or ended: what goes on from a checkpoint
        makes its next rollout with those very weights, and so must the run that was not interrupted.
        """
        ahead = self.config.schedule == "one_step_off" and not self._may_save(step)
        return len(self._line) < (2 if ahead else 1)

    @property
    def is_empty(self) -> bool:
        return not self._line

    def rollout_step(self, step: int) -> int:
        """The step that the next rollout is made for."""
        return step + len(self._line)

    def add(self, step: int, batch: Batch, rollout: Any, pending: Any) -> None:
        """Puts a rollout made before the update of `step` in line; `pending` are its scores, being made."""
        self._line.append((step, batch, rollout, pending))

    def take(self, step: int) -> ScoredRollout:
        """The oldest rollout, once its scores are there, for the update of `step`."""
        made_before, batch, rollout, pending = self._line.popleft()
        scores, coverage = pending.wait()
        return ScoredRollout(batch, rollout, scores, coverage, staleness=step - made_before)

    def _may_save(self, step: int) -> bool:
        """Whether the run may be saved or stopped after a step, as far as that is known before it."""
        saves, evaluates = self.config.checkpoint.checkpoint_every, self.config.eval.eval_every
        last = step == self.config.train.num_steps
        return last or step % saves == 0 or bool(evaluates and step % evaluates == 0)
