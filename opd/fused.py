"""Losses straight from hidden states: output matrix, loss and both gradients in one pass over chunks of positions.

Logits exist for one chunk at a time, in one buffer that the chunk's gradient then overwrites; (N, V) never does. The
gradients come with the loss: the backward pass recomputes nothing, it only scales them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from opd.losses import (
    Fields,
    LossKeys,
    StudentLogits,
    floats_to,
    loss_at_support,
    loss_fields,
    other_ids,
    support_of,
)
from opd.support import FAR

TILE_SIZE = 8192  # rows of an output matrix in half precision that are multiplied at a time
SUMS_HALVES = "dtype" in torch.ops.aten.mm.overloads()  # torch.mm has out_dtype (from torch 2.8 on)
Loss = Callable[[StudentLogits], tuple[torch.Tensor, Fields]]  # of one chunk: (n,) with gradient, (n,) without


class FusedLoss(NamedTuple):
    """`total`, the sum over positions, carries the gradient; loss_N and the diagnostics (N,) carry none."""

    total: torch.Tensor
    loss_N: torch.Tensor
    diagnostics: Fields


def fused_position_loss(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    *,
    response_ids_N: torch.Tensor,
    rollout_logprobs_N: torch.Tensor,
    candidate_ids_NC: torch.Tensor,
    teacher: Mapping[str, torch.Tensor],
    eos_id: int,
    config: LossKeys,
    blocked_V: torch.Tensor | None = None,
) -> FusedLoss:
    """What `losses.position_loss` says of the logits hidden @ weight.T, summed over positions, with both gradients.

    hidden_ND, weight_VD  the decoder's output at trained positions and the output matrix, of any float types; products
                          are summed in float32, in float64 where one of the two is float64
    chunk_size            of the config: positions whose logits are held at a time

    The rest is as in `position_loss`. The renormalised form reads and writes only the support's rows of the matrix.
    N = 0 gives a total of 0 that runs backward. Raises ValueError as `position_loss` does.
    """
    fields = loss_fields(response_ids_N, rollout_logprobs_N, candidate_ids_NC, teacher, config)
    run = _Pass(hidden_ND, weight_VD, blocked_V, config.temperature)
    only_support = config.renormalize and config.kind != "full_kl"

    def chunk(rows: slice) -> tuple[torch.Tensor, Fields]:
        part = floats_to({name: value[rows] for name, value in fields.items()}, run.dtype)
        support = support_of(part, config)

        def loss(student: StudentLogits) -> tuple[torch.Tensor, Fields]:
            return loss_at_support(student, support, part, config)

        if only_support:
            return run.over_support(rows, support.ids_NU, loss)
        return run.over_vocabulary(rows, support.ids_NU, support.valid_NU, other_ids(part, eos_id), loss)

    return run.over_chunks(chunk, config.chunk_size)


def fused_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    ids_N: torch.Tensor,
    *,
    blocked_V: torch.Tensor | None = None,
    chunk_size: int = 256,
) -> FusedLoss:
    """Cross-entropy of the ids over the allowed vocabulary; the diagnostic `correct` is 1 where an id is the likeliest.

    Types, chunks and N = 0 as in `fused_position_loss`.
    """
    run = _Pass(hidden_ND, weight_VD, blocked_V, 1.0)

    def loss(student: StudentLogits) -> tuple[torch.Tensor, Fields]:
        assert student.rest_N is not None and student.best_N is not None
        own_N = student.support_NU[:, 0]
        correct_N = (own_N >= student.best_N).to(own_N.dtype)
        return functional.softplus(student.rest_N - own_N), {"correct": correct_N}

    def chunk(rows: slice) -> tuple[torch.Tensor, Fields]:
        ids_n1 = ids_N[rows, None]
        return run.over_vocabulary(rows, ids_n1, torch.ones_like(ids_n1, dtype=torch.bool), ids_n1[:, :0], loss)

    return run.over_chunks(chunk, chunk_size)


class _Pass:
    """One pass over the positions: the inputs, the buffer and the gradients as they grow."""

    def __init__(
        self, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, blocked_V: torch.Tensor | None, temperature: float
    ) -> None:
        assert not hasattr(weight_VD, "full_tensor"), "a sharded output matrix is whole only in the root's forward"
        self.inputs = hidden_ND, weight_VD
        self.hidden_ND, self.weight_VD = hidden_ND.detach(), weight_VD.detach()
        self.blocked_V, self.temperature = blocked_V, temperature
        self.blocked_ids = None if blocked_V is None else blocked_V.nonzero()[:, 0]
        self.dtype = torch.promote_types(torch.promote_types(hidden_ND.dtype, weight_VD.dtype), torch.float32)
        wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in self.inputs]
        self.grad_hidden_ND = torch.empty_like(self.hidden_ND) if wanted[0] else None
        self.grad_weight_VD = torch.zeros_like(self.weight_VD, dtype=self.dtype) if wanted[1] else None
        self.buffer: torch.Tensor | None = None

    def over_chunks(self, chunk: Callable[[slice], tuple[torch.Tensor, Fields]], size: int) -> FusedLoss:
        """`chunk` over slices of the positions, joined. N = 0 is one empty chunk, so that every name is there."""
        with torch.no_grad():
            starts = range(0, max(1, len(self.hidden_ND)), size)
            losses, diagnostics = zip(*(chunk(slice(start, start + size)) for start in starts), strict=True)
            loss_N = torch.cat(losses)
            joined = {name: torch.cat([part[name] for part in diagnostics]) for name in diagnostics[0]}
        total = loss_N.sum()
        if self.grad_hidden_ND is not None or self.grad_weight_VD is not None:
            total = _WithGradients.apply(total, *self.inputs, self.grad_hidden_ND, self.grad_weight_VD)
        return FusedLoss(total, loss_N, joined)

    def over_vocabulary(
        self, rows: slice, ids_nU: torch.Tensor, valid_nU: torch.Tensor, others_nE: torch.Tensor, loss: Loss
    ) -> tuple[torch.Tensor, Fields]:
        """One chunk whose loss reads logits of a support, of E other ids, and the sum over the rest."""
        logits_nV = self._logits(self.hidden_ND[rows])
        support_nU, others_logits_nE = logits_nV.gather(1, ids_nU), logits_nV.gather(1, others_nE)
        inside_nU = valid_nU & (support_nU > float("-inf"))
        # Adding 0 at entries that are not valid: their id may belong to a valid entry of the same row.
        logits_nV.scatter_add_(1, ids_nU, torch.zeros_like(support_nU).masked_fill_(inside_nU, float("-inf")))
        exp_nV, best_n1, sum_n1 = exponentials(logits_nV)
        rest_n = (best_n1 + sum_n1.log())[:, 0].clamp(min=FAR)
        loss_n, diagnostics, (d_support_nU, d_others_nE, d_rest_n) = self._differentiate(
            lambda u, e, rest: loss(StudentLogits(u, e, rest, best_n1[:, 0])), support_nU, others_logits_nE, rest_n
        )
        if d_rest_n is not None:
            grad_nV = gradient_of_rest(exp_nV, sum_n1, d_rest_n)
            grad_nV.scatter_add_(1, ids_nU, d_support_nU)
            grad_nV.scatter_add_(1, others_nE, d_others_nE)
            self._spread_gradient(rows, grad_nV)
        return loss_n, diagnostics

    def over_support(self, rows: slice, ids_nU: torch.Tensor, loss: Loss) -> tuple[torch.Tensor, Fields]:
        """One chunk whose loss reads the logits of a support and nothing else."""
        hidden_nD = self.hidden_ND[rows].to(self.dtype)
        rows_nUD = self.weight_VD[ids_nU].to(self.dtype)
        support_nU = torch.bmm(rows_nUD, hidden_nD[:, :, None])[:, :, 0] / self.temperature
        if self.blocked_V is not None:
            support_nU = support_nU.masked_fill(self.blocked_V[ids_nU], float("-inf"))
        loss_n, diagnostics, (d_support_nU,) = self._differentiate(lambda u: loss(StudentLogits(u)), support_nU)
        if d_support_nU is not None and self.grad_hidden_ND is not None:
            self.grad_hidden_ND[rows] = torch.bmm(d_support_nU[:, None], rows_nUD)[:, 0].to(self.grad_hidden_ND.dtype)
        if d_support_nU is not None and self.grad_weight_VD is not None:
            torch.mul(d_support_nU[:, :, None], hidden_nD[:, None], out=rows_nUD)
            self.grad_weight_VD.index_add_(0, ids_nU.flatten(), rows_nUD.flatten(0, 1))
        return loss_n, diagnostics

    def _differentiate(
        self, loss: Callable[..., tuple[torch.Tensor, Fields]], *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, Fields, tuple[Any, ...]]:
        """A chunk's loss, diagnostics, and the gradient in its inputs (in the undivided logits; None: not wanted)."""
        if self.grad_hidden_ND is None and self.grad_weight_VD is None:
            return *loss(*inputs), (None,) * len(inputs)
        leaves = tuple(tensor.detach().requires_grad_() for tensor in inputs)
        with torch.enable_grad():
            loss_n, diagnostics = loss(*leaves)
            gradients = torch.autograd.grad(loss_n.sum(), leaves, materialize_grads=True)
        return loss_n.detach(), diagnostics, tuple(gradient / self.temperature for gradient in gradients)

    # -- products with the output matrix --

    def _tiles(self) -> list[slice]:
        size = len(self.weight_VD) if self.weight_VD.dtype == self.dtype else TILE_SIZE
        return [slice(start, start + size) for start in range(0, len(self.weight_VD), size)]

    def _logits(self, hidden_nD: torch.Tensor) -> torch.Tensor:
        """Logits of a chunk in the buffer, divided by the temperature, -inf at blocked ids: (n, V)."""
        if self.buffer is None:
            self.buffer = torch.empty(len(hidden_nD), len(self.weight_VD), dtype=self.dtype, device=hidden_nD.device)
        logits_nV = self.buffer[: len(hidden_nD)]
        for tile in self._tiles():
            self._add_product(logits_nV[:, tile], hidden_nD, self.weight_VD[tile].T, beta=0)
        if self.temperature != 1:
            logits_nV.div_(self.temperature)
        if self.blocked_ids is not None:
            logits_nV.index_fill_(1, self.blocked_ids, float("-inf"))
        return logits_nV

    def _spread_gradient(self, rows: slice, grad_nV: torch.Tensor) -> None:
        """Adds a chunk's gradient in the logits to those of the hidden states and of the output matrix."""
        hidden_nD = self.hidden_ND[rows]
        grad_nD = torch.zeros(hidden_nD.shape, dtype=self.dtype, device=hidden_nD.device)
        for tile in self._tiles():
            if self.grad_hidden_ND is not None:
                self._add_product(grad_nD, grad_nV[:, tile], self.weight_VD[tile])
            if self.grad_weight_VD is not None:
                self._add_product(self.grad_weight_VD[tile], grad_nV[:, tile].T, hidden_nD)
        if self.grad_hidden_ND is not None:
            self.grad_hidden_ND[rows] = grad_nD.to(self.grad_hidden_ND.dtype)

    def _add_product(self, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: int = 1) -> None:
        """out = beta out + a @ b, summed in the type of `out`."""
        half = self.weight_VD.dtype
        if takes_halves(out.device.type, out.dtype, half):
            product = torch.mm(a.to(half), b.to(half), out_dtype=out.dtype)
            out.add_(product) if beta else out.copy_(product)
        else:
            out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)


def exponentials(logits_nV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """exp(logits - largest) in the logits' place (n, V), the largest of each row (n, 1), and the sums (n, 1)."""
    best_n1 = logits_nV.amax(1, keepdim=True).clamp(min=FAR)
    exp_nV = logits_nV.sub_(best_n1).exp_()
    return exp_nV, best_n1, exp_nV.sum(1, keepdim=True)


def gradient_of_rest(exp_nV: torch.Tensor, sum_n1: torch.Tensor, d_rest_n: torch.Tensor) -> torch.Tensor:
    """The gradient in the logits, in the place of `exponentials`, where d_rest_n is that in the logarithm of their sum."""
    # A sum of 0 has terms of 0 only.
    return exp_nV.mul_(d_rest_n[:, None] / sum_n1.clamp(min=torch.finfo(exp_nV.dtype).tiny))


def takes_halves(device: str, out_dtype: torch.dtype, half: torch.dtype) -> bool:
    """Whether tensor cores can multiply factors of the type `half` and sum them in float32. Elsewhere factors are converted
    to the type of the sum: the same to within its rounding, and slower."""
    is_half = half in (torch.float16, torch.bfloat16)
    return SUMS_HALVES and device == "cuda" and out_dtype == torch.float32 and is_half


class _WithGradients(torch.autograd.Function):
    """A sum whose gradients are known already."""

    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, *gradients: Any) -> Any:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden.dtype, weight.dtype
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: torch.Tensor) -> Any:
        # In place: a second copy of the output matrix's gradient would double the memory of the whole loss.
        scaled = [
            None if gradient is None else gradient.mul_(factor).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, *scaled, None, None
