"""Linear layers on CPUs where oneDNN multiplies float32 matrices faster than what torch takes by itself.

torch's own choice is MKL, which leaves the AVX-512 units of other makers' cores unused: on AMD's Zen 4 and 5, oneDNN is
twice as fast, forward and backward. Elsewhere nothing is changed.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

CPU_INFO = Path("/proc/cpuinfo")
MIN_WORK = 1 << 20  # multiplications below which starting oneDNN costs more than it saves


@functools.cache
def is_faster() -> bool:
    """Whether oneDNN's float32 products are the faster ones here. Told by the maker: a measurement could come out either
    way, and a run that is resumed should compute what it would have computed."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        return "AuthenticAMD" in CPU_INFO.read_text(encoding="utf-8")
    except OSError:
        return False


def linear(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """What `functional.linear` computes, differentiable. x is (..., I)."""
    if not _can(x, weight_OI):
        return functional.linear(x, weight_OI, bias_O)
    if torch.is_grad_enabled() and (x.requires_grad or weight_OI.requires_grad):
        # Small products too: ranks whose graphs differ would hand their gradients over in another order, and ZeRO sums
        # those of one place.
        return _Linear.apply(x, weight_OI, bias_O)
    return _product(x, weight_OI, bias_O)


def add_linear(x_NO: torch.Tensor, y_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """x + what `linear` computes of y."""
    if _can(y_NI, weight_OI) and _pays(y_NI, weight_OI):
        return linear(y_NI, weight_OI) + x_NO
    return torch.addmm(x_NO, y_NI, weight_OI.t())


def use_faster_linears(model: nn.Module) -> None:
    """Makes the linear layers of a model compute with `linear`. They stay what they are: their types, names and weights."""
    if not is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return linear(x, module.weight, module.bias)


def _can(x: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    on_cpu = x.device.type == weight_OI.device.type == "cpu"
    return on_cpu and x.dtype == weight_OI.dtype == torch.float32 and is_faster()


def _pays(x: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    return x.numel() * weight_OI.shape[0] >= MIN_WORK


def _onednn(x_NI: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_NI, weight_OI, bias_O, "none", [], "")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(..., I) as (N, I), N made one of few sizes by rows of zeros: oneDNN prepares itself for each shape, which takes as
    long as many a product, and keeps what it has prepared."""
    x_NI = x.reshape(-1, x.shape[-1])
    num_rows = x_NI.shape[0]
    step = max(16, 1 << max(0, num_rows.bit_length() - 4))  # at most an eighth more
    missing = -num_rows % step
    return functional.pad(x_NI, (0, 0, 0, missing)) if missing else x_NI


def _product(x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    if not _pays(x, weight_OI):
        return functional.linear(x, weight_OI, bias_O)
    y_NO = _onednn(_rows(x), weight_OI, bias_O)
    return y_NO[: x.numel() // x.shape[-1]].view(*x.shape[:-1], -1)


def _weight_gradient(grad_NO: torch.Tensor, x_NI: torch.Tensor) -> torch.Tensor:
    # The fewer rows the product has, the faster it is.
    if grad_NO.shape[1] < x_NI.shape[1]:
        return _onednn(grad_NO.t(), x_NI.t())
    return _onednn(x_NI.t(), grad_NO.t()).t().contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight_OI)  # x without its rows of zeros: other layers may hold it too
        return _product(x, weight_OI, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,), (x, weight_OI) = grads, ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad_x = grad_weight = None
        if _pays(x, weight_OI):
            grad_NO = _rows(grad)  # padded once for both
            if needs_x:
                grad_x = _onednn(grad_NO, weight_OI.t())[: x.numel() // x.shape[-1]].view_as(x)
            if needs_weight:
                grad_weight = _weight_gradient(grad_NO, _rows(x))
        else:
            grad_x = grad @ weight_OI if needs_x else None
            grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if needs_weight else None
        return grad_x, grad_weight, grad.flatten(0, -2).sum(0) if needs_bias else None
