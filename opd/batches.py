"""The global batches of a run, one after the other, and the place in the data that a checkpoint goes on from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.buckets import LengthSpread
from data.feed import Feed
from opd.checkpoint import atomic_write_text
from opd.gate import TeacherGate
from opd.schema import Config
from opd.types import Batch


class Batches:
    """Draws the batch of each step; the audio of the next one is read meanwhile.

    feed      where utterances come from
    gate      leaves out what the teacher gets wrong; None: everything passes. A gate looks at a batch before its audio can
              be read ahead, so it is one batch ahead itself
    prefetch  begins to read a batch's audio
    """

    def __init__(
        self, config: Config, feed: Feed, gate: TeacherGate | None, prefetch: Callable[[Batch], None], log: BatchLog
    ) -> None:
        self.config, self.feed, self.gate, self.prefetch, self.log = config, feed, gate, prefetch, log
        spread = LengthSpread(config.num_ranks, config.data.read_timeout_s)
        self._spread = spread if config.data.group_by_length else list
        self._passed: tuple[dict[str, Any], Batch] | None = None  # the next batch and the place before it, with a gate
        self._before = feed.state_dict()  # the place before the batch that was handed out last

    def next(self) -> Batch:
        """The next global batch: what the feed draws and, where there is one, the gate lets pass."""
        size = self.config.train.batch_size
        if self.gate is None:
            self._before = self.feed.state_dict()
            batch = self._spread(self.feed.next_batch(size))
            self.prefetch(self._spread(self.feed.peek_batch(size)))
        else:
            self._before, batch = self._passed or self._next_passed(self.gate)
            self._passed = None
            if self.log.step + 1 < self.config.train.num_steps:
                self._passed = self._next_passed(self.gate)
                self.prefetch(self._passed[1])
        self.log.add(batch)
        return batch

    def state_dict(self, is_waiting: bool) -> dict[str, Any]:
        """The feed's `state_dict` for a checkpoint: what was drawn and not trained is drawn again by what goes on from it.

        is_waiting  whether the batch that was handed out last waits for its update
        """
        if is_waiting:
            return self._before
        return self._passed[0] if self._passed else self.feed.state_dict()

    def _next_passed(self, gate: TeacherGate) -> tuple[dict[str, Any], Batch]:
        before = self.feed.state_dict()
        return before, self._spread(gate.fill(self.feed, self.config.train.batch_size))


class BatchLog:
    """The ids of each step's utterances, a line a step, where `data.log_batches` asks for it."""

    def __init__(self, path: Path, step: int, is_on: bool) -> None:
        """step: the newest checkpoint's. What was logged after it is dropped: those steps are run again."""
        self.path = path
        self.step = step
        self.is_on = is_on
        if path.exists():
            lines = path.read_text(encoding="utf-8").split("\n")
            kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
            atomic_write_text(path, "".join(f"{line}\n" for line in kept))

    def add(self, batch: Batch) -> None:
        """The batch of the next step."""
        self.step += 1
        if self.is_on:
            row: dict[str, Any] = {"step": self.step, "ids": [utterance.id for utterance in batch]}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
