"""The teacher's Ray actors and the driver's handle on them.

The actors exchange dictionaries of tensors and import neither verl nor trainers, so a teacher can run in a Python
environment that has other library versions than the student's.
"""

from __future__ import annotations

import os
from typing import Any

import ray

from opd.config import Config
from opd.remote import wait
from opd.types import Batch


class TeacherWorker:
    """One teacher in a process of its own. Made by `TeacherGroup` as a Ray actor."""

    def load(self, config: dict[str, Any], student_path: str) -> dict[str, Any]:
        """Loads the teacher and returns facts about it. Not in `__init__`, where Ray would bury what goes wrong."""
        import torch

        from opd.teachers import make_teacher

        torch.set_num_threads(config["cluster"]["threads_per_teacher"])
        self.teacher = make_teacher(config, student_path)
        return {"pid": os.getpid(), **self.teacher.facts()}

    def score(self, utterances: Batch, rollout: dict[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
        """The score, which goes on to the student, and a few counts, which go to the driver."""
        score = self.teacher.score(utterances, rollout)
        written = rollout["response_mask_BT"]
        return score, {"positions": int(written.sum()), "aligned": int((score["aligned_mask_BT"] & written).sum())}

    def transcribe(self, utterances: Batch) -> list[str]:
        return self.teacher.transcribe(utterances)


class TeacherGroup:
    """Teacher workers that share the micro-batches of a step among them."""

    def __init__(self, config: Config, student_path: str) -> None:
        self.config = config
        cluster = config.cluster
        actor = ray.remote(TeacherWorker).options(
            num_cpus=cluster.cpus_per_teacher, num_gpus=cluster.gpus_per_teacher if cluster.use_gpu else 0
        )
        self.workers = [actor.remote() for _ in range(cluster.num_teachers)]
        self._ready = [worker.load.remote(config.to_dict(), student_path) for worker in self.workers]

    def wait_ready(self) -> list[dict[str, Any]]:
        """Facts of each worker once all have loaded the teacher."""
        return wait(self._ready, "the teacher to load", self.config.cluster.start_timeout_s)

    def score(self, shards: list[Batch], rollout_refs: list[list[Any]], step: int) -> tuple[list[list[Any]], float]:
        """References to the scores, one per micro-batch of the rollout, and the share of positions that align.

        Returns when all are scored. Raises ValueError where less than teacher.min_coverage of the positions align.
        """
        size = self.config.train.micro_batch_size
        scores: list[list[Any]] = []
        counts: list[Any] = []
        for shard, refs in zip(shards, rollout_refs, strict=True):
            scores.append([])
            for index, ref in enumerate(refs):
                worker = self.workers[len(counts) % len(self.workers)]
                # A top-level argument: Ray brings the dictionary to the worker, past the driver.
                score, count = worker.score.options(num_returns=2).remote(shard[index * size : (index + 1) * size], ref)
                scores[-1].append(score)
                counts.append(count)
        done = wait(counts, f"the teacher's scores of step {step}", self.config.cluster.call_timeout_s)
        coverage = sum(c["aligned"] for c in done) / max(1, sum(c["positions"] for c in done))
        if coverage < self.config.teacher.min_coverage:
            raise ValueError(
                f"step {step}: only {coverage:.1%} of the response positions map into the teacher's vocabulary, below "
                f"teacher.min_coverage={self.config.teacher.min_coverage:g}: choose a teacher with a closer tokenizer "
                "or lower the limit"
            )
        return scores, coverage

    def transcribe(self, utterances: Batch) -> list[str]:
        """The teacher's transcripts, in order."""
        size = self.config.eval.batch_size
        parts = [utterances[start : start + size] for start in range(0, len(utterances), size)]
        refs = [self.workers[i % len(self.workers)].transcribe.remote(part) for i, part in enumerate(parts)]
        results = wait(refs, "the teacher's transcripts", self.config.cluster.call_timeout_s)
        return [text for part in results for text in part]
