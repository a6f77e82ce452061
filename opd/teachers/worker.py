"""A teacher in a process of its own, made a Ray actor by `opd.teachers.actor`.

This file and what it imports need only what requirements/teacher.txt lists: the process may run in another Python
environment than the driver, one without verl and the rest of the training stack.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch

from opd.peak_memory import peak_memory
from opd.teachers.base import make_teacher
from opd.teachers.merging import merge_scores
from opd.types import Batch, TeacherTranscript

Tensors = dict[str, torch.Tensor]


def halved_once(
    score: Callable[[Batch, Tensors], tuple[Tensors, dict[str, Any]]], utterances: Batch, rollout: Tensors
) -> tuple[Tensors, dict[str, Any]]:
    """What `score` returns, and `halved` among the counts: 0, or 1 where memory did not last for the whole batch and each
    half was scored by itself.

    Raises MemoryError, with what to change, where half is too much too.
    """
    try:
        tensors, counts = score(utterances, rollout)
        return tensors, {**counts, "halved": 0}
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or len(utterances) < 2:
            raise
    halves = [range(len(utterances) // 2), range(len(utterances) // 2, len(utterances))]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        parts = [
            score([utterances[row] for row in rows], {name: value[list(rows)] for name, value in rollout.items()})
            for rows in halves
        ]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(
            f"the teacher is out of memory with {len(halves[1])} utterances, half a micro-batch: lower train.micro_batch_size "
            "(or train.micro_batch_tokens), or give teacher workers more memory (cluster.gpus_per_teacher, teacher.dtype)"
        ) from error
    merged = merge_scores([list(rows) for rows in halves], [tensors for tensors, _ in parts])
    (_, totals), (_, others) = parts
    totals = {name: value + others[name] for name, value in totals.items()}  # numbers, and the list of bad audio
    return merged, {**totals, "halved": 1}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the machine has no memory left; on a CPU torch says so in words only."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class TeacherWorker:
    """Loads one teacher and answers for it."""

    def load(self, config: dict[str, Any], student_path: str) -> dict[str, Any]:
        """Loads the teacher and returns facts about it. Not in `__init__`, where Ray would bury what goes wrong."""
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(config["cluster"]["threads_per_teacher"])
        self.teacher = make_teacher(config, student_path)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {
            "pid": os.getpid(),
            "node": socket.gethostname(),
            "versions": versions,
            **self.teacher.facts(),
        }

    def score(
        self, utterances: Batch, rollout: Tensors, rows: list[int] | None = None
    ) -> tuple[Tensors, dict[str, Any]]:
        """The score, which goes on to the student, and a few counts and the seconds it took, which go to the driver.

        rows are those of the rollout that the utterances are; None for all.
        """
        began = time.perf_counter()
        if rows is not None:
            rollout = {name: tensor[rows] for name, tensor in rollout.items()}
        score, counts = halved_once(self.teacher.score_and_count, utterances, rollout)
        return score, {**counts, "busy_s": time.perf_counter() - began}

    def merge(self, rows: list[list[int]], *scores: Tensors) -> Tensors:
        """Scores of some rows each -> the score of all rows in their order."""
        return merge_scores(rows, list(scores))

    def transcribe(self, utterances: Batch) -> list[TeacherTranscript]:
        """The teacher's own greedy transcripts."""
        return self.teacher.transcribe(utterances)

    def cpu_seconds(self) -> float:
        """Processor time of this process so far, all threads."""
        return time.process_time()

    def peak_memory(self) -> dict[str, float]:
        """See `opd.peak_memory.peak_memory`."""
        return peak_memory()
