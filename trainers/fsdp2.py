"""The FSDP2 engine: parameters, gradients and optimizer state sharded over all ranks, float32 master weights."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine.base import EngineRegistry

from opd.trainable import MIN_GROUP_NUMEL, plain_state
from opd.types import DTYPES
from trainers.base_engine import StudentEngine
from trainers.trained_student import TrainedStudent

MODEL_TYPE = "arkasr"


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["fsdp2"], device=["cpu", "cuda"])
class FSDP2Engine(StudentEngine):
    """Each transformer layer is a group of its own; small layers stay with the root.

    A collective costs about a millisecond however little it moves, so a layer below `min_group_numel` parameters is
    not worth one: the tiny models are one group, ARK-ASR has one per layer.
    """

    min_group_numel = MIN_GROUP_NUMEL
    _save_group: dist.ProcessGroup | None = None

    def _wrap(self, student: TrainedStudent) -> nn.Module:
        device = get_device_name()
        if device != "cpu":
            student = student.to(torch.device(device, get_device_id()))
        options: dict[str, Any] = {
            "mesh": init_device_mesh(device, (self.world_size,)),
            "mp_policy": MixedPrecisionPolicy(
                param_dtype=DTYPES[self.config.student.dtype], reduce_dtype=torch.float32, cast_forward_inputs=False
            ),
        }
        for layer in [*student.model.audio_encoder.whisper.layers, *student.model.model.layers]:
            if sum(p.numel() for p in layer.parameters()) >= self.min_group_numel:
                fully_shard(layer, **options)
        return fully_shard(student, **options)

    def _groups(self) -> list[FSDPModule]:
        return [m for m in self.module.modules() if isinstance(m, FSDPModule)]

    @contextmanager
    def generation_mode(self) -> Iterator[None]:
        groups = self._groups()
        with self.eval_mode():
            for group in groups:
                group.set_reshard_after_forward(False, recurse=False)
                group.unshard()
            try:
                with self.merged_adapters():
                    yield
            finally:
                for group in groups:
                    # The root keeps its parameters from forward to backward, as fully_shard sets it up.
                    group.set_reshard_after_forward(group is not self.module, recurse=False)
                    group.reshard()

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The whole weights, float32 on the CPU, on rank 0 and an empty dictionary elsewhere; adapters are merged. A collective."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.module, options=options)
        return plain_state(state, self.config.lora)

    def start_saving(self, local_path: str) -> Future[Any]:
        """With torch.distributed.checkpoint: any number of ranks can load it."""
        if self._save_group is None:
            # The ranks agree on what each writes while they train: those talks must not meet the training's.
            self._save_group = dist.new_group(timeout=self.collective_limit, backend="gloo")
        model, optimizer = get_state_dict(self.module, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}
        self.save_random_state(local_path)
        saving = dcp.async_save(state, checkpoint_id=f"{local_path}/state", process_group=self._save_group)
        assert isinstance(saving, Future), "the state is copied before async_save returns"
        return told_plainly(saving)

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Restores what `save_checkpoint` wrote."""
        model, optimizer = get_state_dict(self.module, self.optimizer)
        state = {"model": model, "optimizer": optimizer, "scheduler": self.scheduler.state_dict()}
        dcp.load(state, checkpoint_id=f"{local_path}/state")
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        self.scheduler.load_state_dict(state["scheduler"])
        self.load_random_state(local_path)


def told_plainly(saving: Future[Any]) -> Future[Any]:
    """The same save, which raises what went wrong on a rank; torch would raise the tracebacks of all in one."""
    told: Future[Any] = Future()

    def tell(done: Future[Any]) -> None:
        error = done.exception()
        if isinstance(error, CheckpointException):
            failures: list[BaseException] = [failure for failure, _ in error.failures.values()]
            # A full disk is called so on some ranks only: where it is met in the midst of a file, torch has other words.
            error = next((failure for failure in failures if isinstance(failure, OSError)), failures[0])
        if error is None:
            told.set_result(done.result())
        else:
            told.set_exception(error)

    saving.add_done_callback(tell)
    return told
