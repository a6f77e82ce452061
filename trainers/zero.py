"""The DeepSpeed engine: ZeRO stages 1, 2 and 3, float32 master weights and optimizer state spread over all ranks."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import CheckpointCommitInfo, TorchCheckpointEngine
from deepspeed.utils import groups, safe_get_full_fp32_param
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine.base import EngineRegistry

from opd.arkasr import ArkasrForConditionalGeneration
from opd.schema import Config
from opd.trainable import plain_state
from opd.types import DTYPES
from opd.zero_checkpoint import FACTS, STATE
from trainers.base_engine import StudentEngine, torch_save
from trainers.fsdp2 import MODEL_TYPE
from trainers.trained_student import TrainedStudent


def deepspeed_config(config: Config, on_gpu: bool) -> dict[str, Any]:
    """DeepSpeed's settings for a config of ours. Steps and learning rates are counted by us."""
    host = {"device": "cpu", "pin_memory": on_gpu}
    zero: dict[str, Any] = {"stage": config.zero.stage}
    if config.optim.offload:
        zero["offload_optimizer"] = host
    if config.zero.offload_params:
        zero["offload_param"] = host
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,  # the engine says itself which micro-batch of a step is the last
        "gradient_clipping": config.optim.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's own AdamW, as in the other engine
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's would be compiled at run time
        "steps_per_print": None,
    }
    if config.student.dtype == "bfloat16":
        settings["bf16"] = {"enabled": True, "check_grad_overflow": True}
        settings["communication_data_type"] = "fp32"
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


class BackgroundWriter(TorchCheckpointEngine):
    """DeepSpeed's way to the disk: what it saves is copied to the host's memory and written by a thread."""

    def __init__(self) -> None:
        super().__init__()
        self.thread = ThreadPoolExecutor(1, "save")
        self._copied: list[tuple[Any, str]] = []

    def create(self, info: CheckpointCommitInfo) -> None:
        self._copied = []  # of one that could not be begun

    def save(self, state_dict: Any, path: str) -> None:
        # The copy of torch.distributed.checkpoint, which FSDP2's checkpoints go by too.
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
        )
        self._copied.append((DefaultStager(options).stage(state_dict), path))

    def write(self) -> Future[None]:
        """Begins to write what has been saved since `create`."""
        copied, self._copied = self._copied, []
        return self.thread.submit(self._write, copied)

    @staticmethod
    def _write(copied: list[tuple[Any, str]]) -> None:
        while copied:
            torch_save(*copied.pop(0))  # and its memory is given back


@EngineRegistry.register(model_type=MODEL_TYPE, backend=["deepspeed"], device=["cpu", "cuda"])
class ZeroEngine(StudentEngine):
    """The same steps as FSDP2's. What differs: a checkpoint belongs to the number of ranks that wrote it, and weights
    that are not trained are held in the compute type, as they are in a published checkpoint."""

    # -- building --------------------------------------------------------------------------------------------------

    def _wrap(self, student: TrainedStudent) -> nn.Module:
        device = get_device_name()
        self.device = torch.device(device) if device == "cpu" else torch.device(device, get_device_id())
        self.shadow: nn.Module | None = None
        self.rounded_to: torch.dtype | None = None
        return student

    def _build_optimizer(self) -> torch.optim.Optimizer:
        if self.device.type == "cpu":
            # Would be compiled now, which takes minutes; gloo does the same.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault(
            "LOCAL_RANK", str(self.device.index or 0)
        )  # DeepSpeed asks for what its launcher would set
        limit = self.collective_limit
        deepspeed.init_distributed("gloo" if self.device.type == "cpu" else "nccl", verbose=False, timeout=limit)
        groups._WORLD_GROUP = dist.new_group(timeout=limit)  # DeepSpeed's own copy would wait for torch's half hour
        buffers = {name: buffer.to(self.device, copy=True) for name, buffer in self.module.named_buffers()}
        optimizer = super()._build_optimizer()
        self.zero, *_ = deepspeed.initialize(
            model=self.module,
            optimizer=optimizer,
            config=deepspeed_config(self.config, self.device.type != "cpu"),
            dist_init_required=False,
        )
        self.trained = self.zero
        self.writer = self.zero.checkpoint_engine = BackgroundWriter()
        set_buffers(self.module, buffers)  # DeepSpeed has rounded the rotary frequencies to the compute type
        return optimizer

    def _optimizer_class(self) -> type[torch.optim.AdamW]:
        return torch.optim.AdamW  # DeepSpeed moves its state itself

    # -- one training step -----------------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Adds the gradient of a scalar loss, as it is; the last micro-batch of a step completes the average over the ranks."""
        self.zero.set_gradient_accumulation_boundary(is_last)
        self.zero.backward(loss, scale_wrt_gas=False)

    def clip_and_step(self) -> float:
        """DeepSpeed clips within its step, and leaves everything as it is where the norm is not finite."""
        self.zero.set_gradient_accumulation_boundary(True)
        self.zero.step()
        if self.zero.optimizer.overflow:
            return math.inf
        return float(self.zero.get_global_grad_norm())

    def optimizer_zero_grad(self) -> None:
        self.zero.optimizer.zero_grad()

    # -- generation ------------------------------------------------------------------------------------------------

    @contextmanager
    def generation_mode(self) -> Iterator[None]:
        """A plain model of the whole weights where the trained one cannot decode on its own: its weights are spread over
        the ranks (stage 3), it has adapters that are to be merged, or it was rounded for an export."""
        with self.eval_mode():
            if not self.decodes_with_trained:
                self.shadow = self._plain_student()
            try:
                yield
            finally:
                self.shadow = None

    @property
    def decodes_with_trained(self) -> bool:
        return self.config.zero.stage < 3 and not self.config.lora.rank and self.rounded_to is None

    @property
    def generation_module(self) -> nn.Module:
        return self.module if self.shadow is None else self.shadow

    def _plain_student(self) -> TrainedStudent:
        compute = DTYPES[self.config.student.dtype]
        whole = self._whole(lambda parameter: parameter.detach().clone())
        state = plain_state(whole, self.config.lora)
        with torch.device("meta"):
            model = ArkasrForConditionalGeneration(self.model_config)
            student = TrainedStudent(model, self.module.ctc_head.out_features if self.module.ctc_head else 0)
        rounded = self.rounded_to or compute
        model.load_state_dict(
            {name: tensor.to(rounded).to(compute) for name, tensor in state.items()}, assign=True, strict=False
        )
        model.tie_weights()
        set_buffers(model, {name: buffer.clone() for name, buffer in self.module.model.named_buffers()})
        if student.ctc_head is not None:
            head = {name: tensor for name, tensor in whole.items() if name.startswith("ctc_head.")}
            student.load_state_dict(head, assign=True, strict=False)
        return student.eval()

    def round_weights(self, dtype: str) -> None:
        self.rounded_to = DTYPES[dtype]

    # -- state -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _whole(self, read: Callable[[nn.Parameter], torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """What `read` makes of each parameter while it is gathered. A collective."""
        found = {}
        for name, parameter in self.module.named_parameters():
            gathered = deepspeed.zero.GatheredParameters([parameter]) if self.config.zero.stage == 3 else nullcontext()
            with gathered:
                value = read(parameter)
            if value is not None:
                found[name] = value
        return found

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The whole weights, float32 on the CPU, on rank 0 and an empty dictionary elsewhere; adapters are merged. A collective."""

        def read(parameter: nn.Parameter) -> torch.Tensor | None:
            # Gathered on every rank, kept on the first. What is not trained has no master weight.
            master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            whole = parameter.detach() if master is None else master
            return whole.float().cpu().clone() if self.rank == 0 else None

        state = plain_state(self._whole(read), self.config.lora)
        if state and self.model_config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        return state

    def start_saving(self, local_path: str) -> Future[Any]:
        """In DeepSpeed's form, a file for each rank."""
        client_state = {"scheduler": self.scheduler.state_dict()}
        self.zero.save_checkpoint(local_path, tag=STATE, client_state=client_state, save_latest=False)
        self.save_random_state(local_path)
        if self.rank == 0:
            facts = {"ranks": self.world_size, "stage": self.config.zero.stage}
            Path(local_path, FACTS).write_text(json.dumps(facts) + "\n", encoding="utf-8")
        return self.writer.write()

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Restores what `save_checkpoint` wrote. Raises ValueError for another number of ranks, stage or engine."""
        path = Path(local_path, FACTS)
        if not path.is_file():
            raise ValueError(
                f"{local_path}: no checkpoint of engine=deepspeed (no {FACTS}); resume with the engine that wrote it, or "
                "start a new run from its export"
            )
        facts = json.loads(path.read_text(encoding="utf-8"))
        own = {"ranks": self.world_size, "stage": self.config.zero.stage}
        if facts != own:
            raise ValueError(
                f"{local_path}: written by {facts['ranks']} ranks at zero.stage={facts['stage']}, not by {own['ranks']} at "
                f"{own['stage']}; DeepSpeed resumes with the same number and stage only: restore them, start a new run from "
                "the checkpoint's export, or train with engine=fsdp2, which can change its number of ranks"
            )
        _, client_state = self.zero.load_checkpoint(local_path, tag=STATE)
        self.scheduler.load_state_dict(client_state["scheduler"])
        self.load_random_state(local_path)

    @property
    def is_param_offload_enabled(self) -> bool:
        return self.config.zero.offload_params


def set_buffers(module: nn.Module, buffers: dict[str, torch.Tensor]) -> None:
    """Puts buffers in the place of those of the same name."""
    for name, buffer in buffers.items():
        owner, _, own_name = name.rpartition(".")
        module.get_submodule(owner)._buffers[own_name] = buffer
