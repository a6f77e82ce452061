"""A teacher in a process of its own, made a Ray actor by `opd.teachers.actor`.

This file and what it imports need only what requirements/teacher.txt lists: the process may run in another Python
environment than the driver, one without verl and the rest of the training stack.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from opd.teachers.base import make_teacher
from opd.teachers.merging import merge_scores
from opd.types import Batch, TeacherTranscript

Tensors = dict[str, torch.Tensor]


class TeacherWorker:
    """Loads one teacher and answers for it."""

    def load(self, config: dict[str, Any], student_path: str) -> dict[str, Any]:
        """Loads the teacher and returns facts about it. Not in `__init__`, where Ray would bury what goes wrong."""
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(config["cluster"]["threads_per_teacher"])
        self.teacher = make_teacher(config, student_path)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {"pid": os.getpid(), "versions": versions, **self.teacher.facts()}

    def score(
        self, utterances: Batch, rollout: Tensors, rows: list[int] | None = None
    ) -> tuple[Tensors, dict[str, int]]:
        """The score, which goes on to the student, and a few counts, which go to the driver.

        rows are those of the rollout that the utterances are; None for all.
        """
        if rows is not None:
            rollout = {name: tensor[rows] for name, tensor in rollout.items()}
        return self.teacher.score_and_count(utterances, rollout)

    def merge(self, rows: list[list[int]], *scores: Tensors) -> Tensors:
        """Scores of some rows each -> the score of all rows in their order."""
        return merge_scores(rows, list(scores))

    def transcribe(self, utterances: Batch) -> list[TeacherTranscript]:
        """The teacher's own greedy transcripts."""
        return self.teacher.transcribe(utterances)

    def cpu_seconds(self) -> float:
        """Processor time of this process so far, all threads."""
        return time.process_time()
