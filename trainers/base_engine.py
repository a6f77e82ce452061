"""What every engine of the student shares: building the model, one training step, schedule, generation, export.

An engine is a verl `BaseEngine`; the subclasses say how parameters are spread over ranks and how state is saved.
"""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from verl.utils.device import get_device_id, get_device_name
from verl.workers.engine.base import BaseEngine

from opd.arkasr import load_model
from opd.cpu_linear import use_faster_linears
from opd.encoding import encode_by_length, serves_update
from opd.rollout.graphs import GraphSteps
from opd.rollout.steps import DecoderSteps, can_step
from opd.schema import Config, OptimConfig
from opd.trainable import ADAPTER, choose_trained, lora_layers
from opd.types import DTYPES
from trainers.offload import OffloadedAdamW
from trainers.trained_student import TrainedStudent

Objective = Callable[[Callable[..., Any], Any], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class NonFiniteError(RuntimeError):
    """The loss or the gradient of a step is not finite. Nothing was updated."""


def learning_rate_factor(step: int, optim: OptimConfig, num_steps: int) -> float:
    """Share of the peak learning rate at a step (0-based): linear warm-up, then cosine or constant."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    if optim.lr_schedule == "constant":
        return 1.0
    done = (step - optim.warmup_steps) / max(1, num_steps - optim.warmup_steps)
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and other 1-D parameters do not."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # under LoRA alone there is nothing but matrices


class StudentEngine(BaseEngine):
    """Base of the student's engines. `path` is the arkasr folder that the student starts from."""

    def __init__(self, config: Config, path: str) -> None:
        self.config = config
        self.path = path
        self.mode: str | None = None
        self._graph_steps: GraphSteps | None = None
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    # -- building --------------------------------------------------------------------------------------------------

    @property
    def collective_limit(self) -> timedelta:
        """For groups that an engine makes beside the ranks' own: torch's default would be half an hour."""
        return timedelta(seconds=self.config.cluster.collective_timeout_s)

    def initialize(self) -> None:
        """Loads the student in float32 (master weights), spreads it over the ranks, makes optimizer and schedule."""
        torch.manual_seed(self.config.seed)
        model = load_model(self.path, dtype=torch.float32, attn_implementation=self.config.student.attn_implementation)
        self.model_config = model.config
        use_faster_linears(model)
        choose_trained(model, self.config.student.freeze, self.config.lora)
        if self.config.student.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with_ctc = self.config.loss.ctc_weight > 0
        student = TrainedStudent(model, model.config.vocab_size if with_ctc else 0)
        self.module = self._wrap(student)
        # What computes the loss is called through this; an engine may put something around the module.
        self.trained: Callable[..., Any] = self.module
        self.optimizer = self._build_optimizer()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: learning_rate_factor(step, self.config.optim, self.config.train.num_steps),
        )

    @abstractmethod
    def _wrap(self, student: TrainedStudent) -> nn.Module:
        """Moves the student to its device and spreads its parameters over the ranks."""

    def _build_optimizer(self) -> torch.optim.Optimizer:
        optim = self.config.optim
        return self._optimizer_class()(
            parameter_groups(self.module, optim.weight_decay),
            lr=optim.lr,
            betas=(optim.betas[0], optim.betas[1]),
            eps=optim.eps,
            foreach=True,  # one dispatch per operation instead of one per parameter
        )

    def _optimizer_class(self) -> type[torch.optim.AdamW]:
        return OffloadedAdamW if self.config.optim.offload else torch.optim.AdamW

    # -- one training step -----------------------------------------------------------------------------------------

    def forward_backward_batch(self, data: list[Any], loss_function: Objective, forward_only: bool = False) -> dict:
        """Forward and backward over micro-batches.

        data            micro-batches of this rank, each with `num_positions` (trained positions in it) and `untrained`
                        (a part of it that trains nothing)
        loss_function   (module, micro-batch) -> (sum of the loss over its positions, sums for the metrics)
        Returns sums over all ranks; `loss` is divided by the trained positions of all ranks.

        The gradient is that of (sum over all ranks) / (positions of all ranks). Ranks average gradients, hence the
        factor world_size; each rank runs as many micro-batches as the one with most, since every backward takes part in the
        same collectives.
        """
        counts = torch.zeros(1 + self.world_size, dtype=torch.float64)
        counts[0], counts[1 + self.rank] = sum(int(micro.num_positions) for micro in data), len(data)
        counts = self.all_reduce_sum(counts)
        positions = counts[0].clamp(min=1.0).item()
        data = data + [data[-1].untrained()] * (int(counts[1:].max()) - len(data))
        sums: dict[str, torch.Tensor] = {}
        for index, micro in enumerate(data):
            loss_sum, micro_sums = loss_function(self.trained, micro)
            if not forward_only:
                self.backward(loss_sum * (self.world_size / positions), is_last=index == len(data) - 1)
            for name, value in (micro_sums | {"loss": loss_sum}).items():
                sums[name] = sums.get(name, 0) + value.detach().double()
        totals = self.reduce_sums(sums)
        totals["loss"] /= positions
        totals["positions"] = positions
        return totals

    def train_batch(self, data: list[Any], loss_function: Objective) -> dict[str, float]:  # type: ignore[override]
        """One optimizer step. Raises NonFiniteError, with nothing updated, on a loss or gradient that is not finite."""
        self.optimizer_zero_grad()
        totals = self.forward_backward_batch(data, loss_function)
        totals["lr"] = self.scheduler.get_last_lr()[0]
        totals["grad_norm"] = self.clip_and_step() if math.isfinite(totals["loss"]) else math.nan
        self.optimizer_zero_grad()  # the next rollout needs the memory
        if not math.isfinite(totals["grad_norm"]):
            raise NonFiniteError(f"loss {totals['loss']}, gradient norm {totals['grad_norm']}")
        self.lr_scheduler_step()
        return totals

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Adds the gradient of a micro-batch to what there is; the last one of a step comes before `clip_and_step`."""
        loss.backward()

    def clip_and_step(self) -> float:
        """Clips the gradient and, where it is finite, takes the optimizer's step. Returns the norm before clipping."""
        grad_norm = self.clip_gradient()
        if math.isfinite(grad_norm):
            self.optimizer_step()
        return grad_norm

    def clip_gradient(self) -> float:
        """Clips to optim.max_grad_norm and returns the norm before clipping, the same on all ranks."""
        limit = self.config.optim.max_grad_norm or math.inf
        trained = [p for p in self.module.parameters() if p.requires_grad and p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, limit)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def optimizer_zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def optimizer_step(self) -> None:
        self.optimizer.step()

    def lr_scheduler_step(self) -> float:
        self.scheduler.step()
        return self.scheduler.get_last_lr()[0]

    # -- collectives -----------------------------------------------------------------------------------------------

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; takes and returns a CPU tensor."""
        device = torch.device(get_device_name(), get_device_id()) if get_device_name() != "cpu" else "cpu"
        moved = tensor.to(device)
        dist.all_reduce(moved)
        return moved.cpu()

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.all_reduce_sum(torch.tensor(float(flag))) > 0)

    def reduce_sums(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """Sums of all ranks, by one packed reduction. All ranks hand in the same names."""
        names = sorted(sums)
        packed = self.all_reduce_sum(torch.stack([sums[name].reshape(()) for name in names]))
        return dict(zip(names, packed.tolist(), strict=True))

    # -- modes -----------------------------------------------------------------------------------------------------

    @contextmanager
    def train_mode(self, **kwargs: Any) -> Iterator[None]:
        self.mode = "train"
        self.module.train()
        try:
            yield
        finally:
            self.mode = None

    @contextmanager
    def merged_adapters(self) -> Iterator[None]:
        """Adds the LoRA adapters to the weights that they stand beside. For parameters that are gathered copies: nothing
        is taken back at the end, the copies are expected to be dropped."""
        layers = lora_layers(self.module)
        with torch.no_grad():
            for layer in layers:
                layer.merge()
        try:
            yield
        finally:
            for layer in layers:
                layer.merged_adapters.clear()

    @contextmanager
    def eval_mode(self, **kwargs: Any) -> Iterator[None]:
        self.mode = "eval"
        self.module.eval()
        kept = None
        try:
            with torch.no_grad():
                yield
            # Where the weights were gathered for the rollout they come to lie elsewhere, and the memory is the update's.
            if self._graph_steps is not None and self._graph_steps.reads(self.generation_module.model):
                kept = self._graph_steps
        finally:
            self._graph_steps = kept
            self.mode = None

    @abstractmethod
    def generation_mode(self) -> AbstractContextManager[None]:
        """eval_mode with all parameters gathered, so that ranks may decode any number of tokens each on its own."""

    def generate_forward(self, **inputs: Any) -> Any:
        """The plain model forward, for decoding."""
        return self.generation_module(**inputs)[0]

    def encodes_once(self, num_rows: int) -> bool:
        """Whether what the encoder makes of a rank's batch for the rollout serves the update too."""
        whisper = self.model_config.whisper_config
        dropout = max(whisper.dropout, whisper.attention_dropout, whisper.activation_dropout)
        is_same = "encoder" in self.config.student.freeze or (self.decodes_with_trained and not dropout)
        return is_same and serves_update(self.config, num_rows)

    @property
    def decodes_with_trained(self) -> bool:
        """Whether generation_mode's module has the parameters that are trained, not copies of them."""
        return True

    def encode(self, inputs: dict[str, torch.Tensor], with_graph: bool = False) -> dict[str, torch.Tensor]:
        """Prompts with what the encoder makes of their audio in its place (`TrainedStudent.forward`). In generation_mode.

        inputs      with audios (B, M, F) and audio_mask (B, F); those that are returned have encoded_BED and encoded_mask_BE
        with_graph  so that a loss on later forwards reaches the encoder's parameters
        """

        def encode(audios_BMF: torch.Tensor, mask_BF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            encoded_BED, _, mask_BE = self.generation_module(encode_only=True, audios=audios_BMF, audio_mask=mask_BF)
            return encoded_BED, mask_BE

        encoder = self.generation_module.model.audio_encoder
        # Only a module that trains is checkpointed; it computes the same, since `encodes_once` asks for no dropout.
        encoder.train(with_graph)
        with torch.set_grad_enabled(with_graph):
            encoded_BED, mask_BE = encode_by_length(encode, inputs["audios"], inputs["audio_mask"])
        encoder.eval()
        rest = {name: value for name, value in inputs.items() if name not in ("audios", "audio_mask")}
        return rest | {"encoded_BED": encoded_BED, "encoded_mask_BE": mask_BE}

    def decoder_steps(self) -> DecoderSteps | GraphSteps | None:
        """What computes the later forwards of a rollout in less time; None where only the modules can. In generation_mode."""
        model = self.generation_module.model
        if not can_step(model):
            return None
        if not self.fixed_memory:
            return DecoderSteps(model)
        self._graph_steps = GraphSteps(model) if self._graph_steps is None else self._graph_steps.bind(model)
        return self._graph_steps

    @property
    def fixed_memory(self) -> bool:
        """Whether a rollout's short forwards run on fixed memory, as CUDA graphs need it."""
        return self.config.rollout.cuda_graphs and get_device_name() == "cuda"

    @property
    def generation_module(self) -> nn.Module:
        """The student with whole weights, in generation_mode."""
        return self.module

    # -- state -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The student's whole state dict (float32, CPU) on rank 0, an empty one elsewhere. A collective.

        On one rank it shares memory with the parameters.
        """

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Writes model, optimizer, schedule and random state into a folder; returns when all ranks have."""
        self.start_saving(local_path).result()
        dist.barrier()

    @abstractmethod
    def start_saving(self, local_path: str) -> Future[Any]:
        """As `save_checkpoint`, in the background: when this returns the state is copied, and training may go on.

        The future raises what goes wrong in this rank's writing.
        """

    def save_random_state(self, local_path: str) -> None:
        torch_save(torch.get_rng_state(), self._random_state_path(local_path))

    def load_random_state(self, local_path: str) -> None:
        """Where this rank saved one; else, by fewer ranks, nothing: nothing of ours draws from it."""
        with contextlib.suppress(FileNotFoundError):
            torch.set_rng_state(torch.load(self._random_state_path(local_path)))

    def _random_state_path(self, local_path: str) -> str:
        return f"{local_path}/rng-rank{self.rank}.pt"

    def get_per_tensor_param(self) -> tuple[Any, None]:
        return iter(self.full_state_dict().items()), None

    @torch.no_grad()
    def round_weights(self, dtype: str) -> None:
        """Rounds the weights to what an export of this type holds. The training state is spoilt by this."""
        for layer in lora_layers(self.module):  # what is rounded in an export is the sum
            layer.get_base_layer().weight.add_(layer.get_delta_weight(ADAPTER))
            layer.lora_B[ADAPTER].weight.zero_()
        for parameter in self.module.parameters():
            parameter.copy_(parameter.to(DTYPES[dtype]).to(parameter.dtype))

    # -- verl's remaining interface ----------------------------------------------------------------------------------

    @property
    def is_param_offload_enabled(self) -> bool:
        return False

    @property
    def is_optimizer_offload_enabled(self) -> bool:
        return self.config.optim.offload

    def get_data_parallel_size(self) -> int:
        return self.world_size

    def get_data_parallel_rank(self) -> int:
        return self.rank

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return dist.group.WORLD

    def is_mp_src_rank_with_outputs(self) -> bool:
        return True


def torch_save(value: Any, path: str) -> None:
    """`torch.save` that raises OSError on a full disk; given a path, torch itself would tell of positions in a file."""
    with open(path, "wb") as file:
        torch.save(value, file)


def num_elements(parameter: torch.Tensor) -> int:
    """Elements of a parameter over all ranks, one that ZeRO-3 has taken apart included."""
    return getattr(parameter, "ds_numel", parameter.numel())


def init_process_group(timeout_s: float, use_gpu: bool) -> None:
    """Joins the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe."""
    backend = "cpu:gloo,cuda:nccl" if use_gpu else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
