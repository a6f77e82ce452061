"""The linear layers of oneDNN compute what torch's do, forward and backward, and leave the model what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from opd import cpu_linear
from opd.arkasr import load_model
from opd.cpu_linear import MIN_WORK, add_linear, linear, use_faster_linears
from opd.rollout.steps import can_step

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="a build of torch without oneDNN never takes these paths"
)


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes the same on any maker's cores, slower on some."""
    monkeypatch.setattr(cpu_linear, "is_faster", lambda: True)


@pytest.mark.parametrize("shape", [(700, 64), (5, 131, 64), (1, 640, 64)])
@pytest.mark.parametrize("outputs", [48, 96])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_and_gradients_are_those_of_float64(shape: tuple[int, ...], outputs: int, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).requires_grad_()
    weight = torch.randn(outputs, shape[-1], generator=generator).requires_grad_()
    bias = torch.randn(outputs, generator=generator).requires_grad_() if with_bias else None
    assert x.numel() * outputs >= MIN_WORK
    y = linear(x, weight, bias)
    assert type(y.grad_fn).__name__ == "_LinearBackward", "oneDNN has computed it"
    towards = torch.randn(y.shape, generator=generator)
    leaves = [leaf for leaf in (x, weight, bias) if leaf is not None]
    gradients = torch.autograd.grad(y, leaves, towards)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = functional.linear(doubles[0], doubles[1], doubles[2] if with_bias else None)
    torch.testing.assert_close(y.double(), expected, atol=1e-4, rtol=1e-5)
    for own, other in zip(gradients, torch.autograd.grad(expected, doubles, towards.double()), strict=True):
        assert own.is_contiguous()
        torch.testing.assert_close(own.double(), other, atol=1e-3, rtol=1e-5)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, weight = torch.randn(700, 64), torch.randn(96, 64)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), x @ weight.t(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(add_linear(x @ weight.t(), x, weight), 2 * (x @ weight.t()), atol=1e-4, rtol=1e-4)
    linear(x, weight.requires_grad_()).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    frozen, heard = weight.detach(), x.requires_grad_()
    linear(heard, frozen).sum().backward()
    torch.testing.assert_close(heard.grad, frozen.sum(0).expand_as(x), atol=1e-4, rtol=1e-4)


def test_graphs_are_the_same_for_all_sizes() -> None:
    """ZeRO sums what the ranks hand over in the order of their graphs."""
    for num_rows in (4, 700):
        x, weight = torch.randn(num_rows, 64), torch.randn(96, 64, requires_grad=True)
        y = linear(x, weight)
        assert type(y.grad_fn).__name__ == "_LinearBackward"
        (gradient,) = torch.autograd.grad(y.sum(), weight)
        torch.testing.assert_close(gradient, x.sum(0).expand_as(weight), atol=1e-4, rtol=1e-4)


def test_other_types_are_left_to_torch() -> None:
    x, weight = torch.randn(700, 64, dtype=torch.bfloat16), torch.randn(96, 64, dtype=torch.bfloat16)
    assert type(linear(x, weight.requires_grad_()).grad_fn).__name__ != "_LinearBackward"


def test_a_model_keeps_its_types_and_weights(tiny_dir: Path) -> None:
    plain, other = load_model(tiny_dir), load_model(tiny_dir)
    use_faster_linears(other)
    assert plain.state_dict().keys() == other.state_dict().keys()
    assert can_step(other)
    layer = nn.Linear(64, 96)
    use_faster_linears(layer)
    y = layer(torch.randn(700, 64))
    assert type(y.grad_fn).__name__ == "_LinearBackward"
    ids = torch.arange(1, 201)[None].expand(16, -1)
    torch.testing.assert_close(other(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
