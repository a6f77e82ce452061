"""The driver's handle on the teachers: Ray actors, each in the Python environment that the config names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import count
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from opd.config import PROJECT_ROOT
from opd.remote import wait, wait_for_placement
from opd.schema import Config, TeacherConfig
from opd.teachers.environment import interpreter
from opd.teachers.routing import Router
from opd.teachers.worker import TeacherWorker
from opd.types import Batch, TeacherTranscript

NO_COUNTS = {"positions": 0, "aligned": 0, "responses": 0, "retokenised": 0, "halved": 0}


@dataclass
class PendingScores:
    """Scores of one step, being made: `refs` are one per micro-batch of the rollout."""

    group: TeacherGroup
    refs: list[list[Any]]
    counts: dict[str, list[Any]]
    step: int

    def wait(self) -> tuple[list[list[Any]], float]:
        """References to the scores, once all are there, and the share of positions that align.

        Raises ValueError where less than min_coverage of a teacher's positions align.
        """
        return self.refs, self.group.coverage(self.counts, self.step)


class TeacherGroup:
    """Teacher workers that share the micro-batches of a step among them; with routes, each utterance goes to its own.

    The config's paths are absolute (`opd.resolve`).
    Raises TimeoutError where the cluster has no room for them within cluster.placement_timeout_s.

    counts are those of the last scores that were waited for, over all teachers: positions (written), aligned, responses, retokenised,
    and micro-batches that were halved for want of memory. bad_audio has (utterance id, path, reason) of what the teachers could
    not read in them, and the student could.
    """

    def __init__(self, config: Config, student_path: str) -> None:
        self.config = config
        self.router = Router(config)
        self.counts = dict(NO_COUNTS)
        self.bad_audio: list[tuple[str, str, str]] = []
        self._busy_s = 0.0
        self.pools: dict[str, list[Any]] = {}
        self._ready: dict[str, list[Any]] = {}
        self._facts: dict[str, list[dict[str, Any]]] = {}
        self._groups = self._place()
        for name, teacher in self.router.teachers.items():
            settings = config.to_dict()
            settings["teacher"] |= vars(teacher)
            actor, options = ray.remote(TeacherWorker), self._options(teacher)
            places = [self._place_of(name, index) for index in range(self._num_workers(name))]
            workers = [actor.options(**options, **place).remote() for place in places]
            self.pools[name] = workers
            self._ready[name] = [worker.load.remote(settings, student_path) for worker in workers]

    def _num_workers(self, route: str) -> int:
        own = self.config.teacher.routes[route].get("num_workers") if route else None
        return own or self.config.cluster.num_teachers

    def _place(self) -> dict[str, PlacementGroup]:
        """What Ray sets aside for each teacher's workers; none where they take nothing."""
        cluster = self.config.cluster
        amounts = {"CPU": cluster.cpus_per_teacher, "GPU": cluster.gpus_per_teacher if cluster.use_gpu else 0.0}
        bundle = {kind: amount for kind, amount in amounts.items() if amount}
        if not bundle:
            return {}
        counts = {name: self._num_workers(name) for name in self.router.teachers}
        groups = {name: placement_group([dict(bundle)] * count) for name, count in counts.items()}
        what = f"{sum(counts.values())} teacher workers"
        wait_for_placement(list(groups.values()), what, bundle, cluster.placement_timeout_s)
        return groups

    def _place_of(self, route: str, index: int) -> dict[str, Any]:
        """Options of an actor for the place of a worker."""
        group = self._groups.get(route)
        return {} if group is None else {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, index)}

    def _options(self, teacher: TeacherConfig) -> dict[str, Any]:
        cluster = self.config.cluster
        options: dict[str, Any] = {
            "num_cpus": cluster.cpus_per_teacher,
            "num_gpus": cluster.gpus_per_teacher if cluster.use_gpu else 0,
        }
        if teacher.python_path is not None:
            # This package is not installed there.
            paths = [str(PROJECT_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            options["runtime_env"] = {
                "py_executable": interpreter(teacher.python_path),
                "env_vars": {"PYTHONPATH": os.pathsep.join(paths)},
            }
        return options

    def wait_ready(self) -> list[dict[str, Any]]:
        """Facts of each worker once all have loaded their teacher; `route` names it where there are several."""
        facts = []
        for name, refs in self._ready.items():
            what = f"the teacher of route {name} to load" if name else "the teacher to load"
            try:
                loaded = wait(refs, what, self.config.cluster.start_timeout_s, self._names(name))
            except TimeoutError as error:
                python_path = self.router.teachers[name].python_path
                if python_path is None:
                    raise
                raise TimeoutError(f"{error}; teacher.python_path={python_path} must be on every node") from error
            self._facts[name] = loaded
            facts += [{"route": name, **fact} for fact in loaded]
        return facts

    def _names(self, route: str) -> list[str]:
        """What the workers of a route are called in errors."""
        of_route = f" of route {route}" if route else ""
        facts = self._facts.get(route) or [{} for _ in self.pools[route]]
        places = [f" (pid {fact['pid']} on {fact['node']})" if fact else "" for fact in facts]
        return [f"teacher worker {index}{of_route}{place}" for index, place in enumerate(places)]

    def start_score(self, micro_batches: list[list[Batch]], rollout_refs: list[list[Any]], step: int) -> PendingScores:
        """The workers begin to score the rollout of a step; the driver may go on meanwhile.

        Utterances and reference of each micro-batch, by rank.
        """
        calls = {name: count() for name in self.pools}  # each teacher's workers take turns
        parts: list[list[dict[str, tuple[list[int], Any]]]] = []
        counts: dict[str, list[Any]] = {name: [] for name in self.pools}
        for shard, refs in zip(micro_batches, rollout_refs, strict=True):
            parts.append([])
            for utterances, ref in zip(shard, refs, strict=True):
                parts[-1].append({})
                for name, rows in self.router.split(utterances).items():
                    turn = next(calls[name]) % len(self.pools[name])
                    worker = self.pools[name][turn]
                    members, chosen = [utterances[row] for row in rows], rows if len(rows) < len(utterances) else None
                    # A top-level argument: Ray brings the dictionary to the worker, past the driver.
                    score, counted = worker.score.options(num_returns=2).remote(members, ref, chosen)
                    parts[-1][-1][name] = (rows, score)
                    counts[name].append((turn, counted))
        # After all calls to score, so that no merge waits before one of them.
        scores = [[self._merged(part) for part in shard_parts] for shard_parts in parts]
        return PendingScores(self, scores, counts, step)

    def _merged(self, part: dict[str, tuple[list[int], Any]]) -> Any:
        """One reference for a micro-batch whose rows went to several teachers."""
        if len(part) == 1:
            return next(iter(part.values()))[1]
        name = list(part)[-1]
        rows, scores = zip(*part.values(), strict=True)
        return self.pools[name][0].merge.remote(list(rows), *scores)

    def coverage(self, counts: dict[str, list[Any]], step: int) -> float:
        """Waits for all scores of a step; adds up their counts (see `PendingScores.wait`)."""
        self.counts, self.bad_audio = dict(NO_COUNTS), []
        busy_s = 0.0
        for name, refs in counts.items():
            names = self._names(name)
            done = wait(
                [ref for _, ref in refs],
                f"the teacher's scores of step {step}",
                self.config.cluster.call_timeout_s,
                [names[turn] for turn, _ in refs],
            )
            worked = dict.fromkeys(range(len(names)), 0.0)
            for (turn, _), part in zip(refs, done, strict=True):
                worked[turn] += part["busy_s"]
            busy_s = max(busy_s, *worked.values())
            totals = {key: sum(part[key] for part in done) for key in NO_COUNTS}
            self.bad_audio += [one for part in done for one in part["bad_audio"]]
            coverage = totals["aligned"] / max(1, totals["positions"])
            limit = self.router.teachers[name].min_coverage
            if totals["positions"] and coverage < limit:
                key = f"teacher.routes.{name}.min_coverage" if name else "teacher.min_coverage"
                raise ValueError(
                    f"step {step}: only {coverage:.1%} of the response positions map into the teacher's vocabulary, below "
                    f"{key}={limit:g}: choose a teacher with a closer tokenizer or lower the limit"
                )
            self.counts = {key: self.counts[key] + totals[key] for key in totals}
        self._busy_s += busy_s
        return self.counts["aligned"] / max(1, self.counts["positions"])

    def metrics(self) -> dict[str, float]:
        """Halved micro-batches, utterances that only the teacher could not read, and responses that did not map id for id."""
        return {
            "teacher/halved": self.counts["halved"],
            "teacher/bad_audio": len(self.bad_audio),
            "align/retokenised_share": self.counts["retokenised"] / max(1, self.counts["responses"]),
        }

    def take_busy_s(self) -> float:
        """Seconds of scoring since this was last asked: of each step, the longest worker's."""
        busy_s, self._busy_s = self._busy_s, 0.0
        return busy_s

    def transcribe(self, utterances: Batch) -> list[TeacherTranscript]:
        """The teachers' transcripts, in order."""
        size = self.config.eval.batch_size
        calls = []
        for name, rows in self.router.split(utterances).items():
            pool = self.pools[name]
            for turn, start in enumerate(range(0, len(rows), size)):
                part = rows[start : start + size]
                ref = pool[turn % len(pool)].transcribe.remote([utterances[row] for row in part])
                calls.append((part, ref, self._names(name)[turn % len(pool)]))
        refs, names = [ref for _, ref, _ in calls], [name for _, _, name in calls]
        results = wait(refs, "the teacher's transcripts", self.config.cluster.call_timeout_s, names)
        transcripts: dict[int, TeacherTranscript] = {}
        for (part, _, _), written in zip(calls, results, strict=True):
            transcripts |= zip(part, written, strict=True)
        return [transcripts[row] for row in range(len(utterances))]

    @property
    def num_workers(self) -> int:
        return sum(map(len, self.pools.values()))

    def cpu_seconds(self) -> float:
        """Processor time of all workers so far."""
        refs = [worker.cpu_seconds.remote() for pool in self.pools.values() for worker in pool]
        names = [name for route in self.pools for name in self._names(route)]
        return sum(wait(refs, "the teacher's clocks", self.config.cluster.call_timeout_s, names))

    def peak_memory(self) -> list[dict[str, float]]:
        """Of each worker (see `opd.peak_memory`)."""
        refs = [worker.peak_memory.remote() for pool in self.pools.values() for worker in pool]
        return wait(refs, "the teacher's memory", self.config.cluster.call_timeout_s)

    def close(self) -> None:
        """Ends the workers and frees what Ray has set aside for them."""
        for pool in self.pools.values():
            for worker in pool:
                ray.kill(worker)
        for group in self._groups.values():
            remove_placement_group(group)
        self.pools, self._groups = {}, {}
