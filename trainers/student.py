"""The driver's handle on the student: a verl RayWorkerGroup of any size behind a few verbs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup
from verl.utils.device import get_device_name

from opd.remote import WorkerError, wait
from opd.schema import Config
from opd.types import Batch
from trainers.cluster import StudentPool, free_address, rank_env
from trainers.worker import StudentWorker


@dataclass
class RolloutRefs:
    """A rollout as the driver sees it: which utterances each rank has, and references to its micro-batches.

    micro_batches   the utterances of each, as `refs`
    """

    shards: list[Batch]
    micro_batches: list[list[Batch]]
    refs: list[list[Any]]
    texts: list[str]
    bad: list[tuple[str, str, str]]
    sums: dict[str, int]
    waited_s: float


class StudentGroup(RayWorkerGroup):
    """verl's worker group; the rendezvous address is found without asking Ray for a whole CPU."""

    def __init__(self, *args: Any, timeout_s: float, **kwargs: Any) -> None:
        self._timeout_s = timeout_s
        super().__init__(*args, **kwargs)

    def _get_master_addr_port(self, pg: Any, bundle_index: int = 0, master_port_range: Any = None) -> None:
        strategy = PlacementGroupSchedulingStrategy(placement_group=pg, placement_group_bundle_index=bundle_index)
        address = free_address.options(scheduling_strategy=strategy).remote()
        self._master_addr, self._master_port = wait(address, "an address for the ranks to meet", self._timeout_s)


class Student:
    """All ranks of the student. Every call has a limit and says what was waited for when it is over."""

    def __init__(self, config: Config, path: str, pool: StudentPool | None = None) -> None:
        """pool: where the ranks go; None places them now."""
        self.config = config
        self._busy_s = 0.0
        worker = RayClassWithInitArgs(cls=ray.remote(StudentWorker), config=config.to_dict(), path=path)
        worker.update_options({"num_cpus": config.cluster.cpus_per_rank})
        self.pool = pool or StudentPool(config.cluster)
        self.group = StudentGroup(
            self.pool,
            worker,
            device_name=get_device_name(),
            worker_env=rank_env(config.cluster),
            timeout_s=config.cluster.start_timeout_s,
        )
        self._names = [f"student rank {rank}" for rank in range(self.group.world_size)]
        self._setup = self.group.setup()

    def wait_ready(self) -> list[dict[str, Any]]:
        """Facts of each rank once all have built the student."""
        limit = self.config.cluster.start_timeout_s
        facts = wait(self._setup, "the student's ranks to start", limit, self._names)
        self._names = [f"student rank {fact['rank']} (pid {fact['pid']} on {fact['node']})" for fact in facts]
        return facts

    def _call(self, refs: list[Any], what: str) -> list[Any]:
        return wait(refs, what, self.config.cluster.call_timeout_s, self._names)

    def _shards(self, utterances: list[Any]) -> list[list[Any]]:
        """Contiguous shards whose sizes differ by at most one."""
        ranks = self.group.world_size
        bounds = [len(utterances) * rank // ranks for rank in range(ranks + 1)]
        return [utterances[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]

    def prefetch(self, batch: Batch) -> None:
        """The ranks begin to read the audio of the batch that comes next. What is bad there is told when it is used."""
        self.group.prefetch(self._shards(batch))

    def generate(self, batch: Batch, step: int, drafts: list[str | None] | None = None) -> RolloutRefs:
        """The student's responses to a global batch; a draft is a text that a response may be like."""
        shards = self._shards(batch)
        drafts_of = self._shards([None] * len(batch) if drafts is None else drafts)
        calls = self.group.generate(shards, [step] * len(shards), drafts_of)
        results = self._call(calls, f"the rollout of step {step}")
        self._busy_s += max(result["busy_s"] for result in results)
        return RolloutRefs(
            shards=shards,
            micro_batches=[
                [[shard[row] for row in rows] for rows in result["micro_rows"]]
                for shard, result in zip(shards, results, strict=True)
            ],
            refs=[result["refs"] for result in results],
            texts=[text for result in results for text in result["texts"]],
            bad=[entry for result in results for entry in result["bad"]],
            sums={name: sum(result["sums"][name] for result in results) for name in results[0]["sums"]},
            waited_s=max(result["waited_s"] for result in results),
        )

    def update(self, rollout: RolloutRefs, scores: list[list[Any]], step: int) -> dict[str, float]:
        """One optimizer step of on-policy distillation; sums over all ranks for the metrics."""
        refs = self.group.update_opd(rollout.shards, rollout.refs, scores)
        return self._update(refs, [u.id for shard in rollout.shards for u in shard], step)[0]

    def update_sft(self, batch: Batch, step: int) -> dict[str, Any]:
        """One optimizer step on references; sums over all ranks for the metrics, and the bad audio of all."""
        results = self._update(self.group.update_sft(self._shards(batch)), [u.id for u in batch], step)
        bad = [entry for result in results for entry in result["bad"]]
        return results[0] | {"bad": bad, "waited_s": max(result["waited_s"] for result in results)}

    def _update(self, refs: list[Any], ids: list[str], step: int) -> list[Any]:
        try:
            results = self._call(refs, f"the update of step {step}")
        except WorkerError as error:
            if error.kind != "NonFiniteError":
                raise
            raise WorkerError(
                f"step {step}: the loss or the gradient is not finite, nothing was updated ({error}); "
                f"utterances of the batch: {', '.join(ids)}",
                error.kind,
            ) from error
        # The ranks end together, so the one that began last has not waited for the others to begin.
        self._busy_s += min(result["busy_s"] for result in results)
        return results

    def take_busy_s(self) -> float:
        """Seconds that the ranks worked on rollouts and updates since this was last asked: of each call, the longest rank's."""
        busy_s, self._busy_s = self._busy_s, 0.0
        return busy_s

    def transcribe(self, utterances: Batch) -> list[str | None]:
        """Greedy transcripts in order; None for bad audio that is skipped."""
        # Interleaved, so that a set sorted by length loads the ranks evenly.
        ranks = self.group.world_size
        results = self._call(self.group.transcribe([utterances[r::ranks] for r in range(ranks)]), "an evaluation")
        texts: list[str | None] = [None] * len(utterances)
        for rank, part in enumerate(results):
            texts[rank::ranks] = part
        return texts

    def start_save(self, path: Path) -> None:
        """The ranks copy their state and begin to write it into a folder, while they go on with other calls."""
        self._call(self.group.start_save(str(path)), f"a checkpoint into {path}")

    def is_saved(self, wait: bool) -> bool:
        """Whether all ranks have written what `start_save` began; `wait`: until they have. Raises what went wrong."""
        return all(self._call(self.group.is_saved(wait), "a checkpoint to be written"))

    def load(self, path: Path) -> None:
        self._call(self.group.load(str(path)), f"the checkpoint {path}")

    def export(self, out_dir: Path) -> None:
        self._call(self.group.export(str(out_dir)), f"the export into {out_dir}")

    def cpu_seconds(self) -> float:
        """Processor time of all ranks so far."""
        return sum(self._call(self.group.cpu_seconds(), "the ranks' clocks"))

    def peak_memory(self) -> list[dict[str, float]]:
        """Of each rank (see `opd.peak_memory`)."""
        return self._call(self.group.peak_memory(), "the ranks' memory")

    def close(self) -> None:
        """Ends the ranks and frees what Ray has set aside for them."""
        for worker in self.group.workers:
            ray.kill(worker)
        self.pool.remove()

    def round_weights(self) -> None:
        self._call(self.group.round_weights(), "rounding the weights")
