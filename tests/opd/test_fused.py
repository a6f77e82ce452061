"""Losses from hidden states: against the float64 oracle, against the same loss from logits, and what they hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_scenes import DIVERGENCES, EOS, FINITE_KINDS, Keys, Scene, make_scene, oracle, relative

from opd.fused import FusedLoss, fused_cross_entropy, fused_position_loss, takes_halves
from opd.losses import position_loss
from opd.support import candidate_ids, score_support

EXTRA_WIDTH = 9  # the output matrix is wider than the positions are many
SAMPLED = [Keys("sampled_kl"), Keys("sampled_kl", temperature=1.7)]


def factors(scene: Scene, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, Scene]:
    """Hidden states and an output matrix whose product is the student's logits; and the scene of what they round to."""
    generator = torch.Generator().manual_seed(1)
    size = len(scene.student_NV) + EXTRA_WIDTH
    hidden_ND = torch.randn(len(scene.student_NV), size, generator=generator, dtype=torch.float64)
    free_VD = torch.randn(scene.student_NV.shape[1], size, generator=generator, dtype=torch.float64)
    inverse_DN = torch.linalg.pinv(hidden_ND)
    weight_VD = scene.student_NV.T @ inverse_DN.T + free_VD - free_VD @ (inverse_DN @ hidden_ND).T
    hidden_ND, weight_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
    rounded = replace(
        scene, student_NV=hidden_ND.double() @ weight_VD.double().T, teacher_NV=scene.teacher_NV.to(dtype).double()
    )
    return hidden_ND, weight_VD, rounded


def arguments(scene: Scene, keys: Keys, dtype: torch.dtype) -> dict[str, Any]:
    """All that a loss reads beside the student's logits."""
    candidates_NC = candidate_ids(scene.allowed_student().topk(scene.student_k).indices, scene.response_ids_N, EOS)
    teacher = score_support(
        scene.allowed_teacher().to(dtype), candidates_NC, scene.token_map(), top_k=scene.teacher_k,
        temperature=keys.temperature, support=keys.support, full=keys.kind == "full_kl",
    )  # fmt: skip
    return {
        "response_ids_N": scene.response_ids_N, "rollout_logprobs_N": torch.full((len(scene.student_NV),), -2.0),
        "candidate_ids_NC": candidates_NC, "teacher": teacher, "eos_id": EOS, "config": keys,
        "blocked_V": scene.blocked_V(),
    }  # fmt: skip


def fused(
    scene: Scene, keys: Keys, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, factor: float = 1.0
) -> tuple[FusedLoss, torch.Tensor, torch.Tensor]:
    """The loss and the gradients of `factor` times its sum."""
    hidden_ND, weight_VD = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    dtype = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
    loss = fused_position_loss(hidden_ND, weight_VD, **arguments(scene, keys, dtype))
    gradients = torch.autograd.grad(loss.total * factor, (hidden_ND, weight_VD))
    return loss, *gradients


@pytest.mark.parametrize("vocab_size", [50, 3000])
@pytest.mark.parametrize("keys", DIVERGENCES, ids=str)
def test_value_and_gradients_match_the_oracle(keys: Keys, vocab_size: int) -> None:
    for dtype, value_limit, gradient_limit in ((torch.float64, 1e-6, 1e-6), (torch.float32, 5e-5, 1e-4)):
        hidden_ND, weight_VD, scene = factors(make_scene(vocab_size), dtype)
        loss, grad_hidden_ND, grad_weight_VD = fused(scene, keys, hidden_ND, weight_VD, factor=3.0)
        expected_N, expected_NV = oracle(scene, keys)
        assert expected_N.median() > 0.1
        assert loss.loss_N.dtype == grad_hidden_ND.dtype == grad_weight_VD.dtype == dtype
        torch.testing.assert_close(loss.loss_N.double(), expected_N, rtol=0, atol=value_limit)
        torch.testing.assert_close(loss.total.double(), expected_N.sum(), rtol=0, atol=7 * value_limit)
        assert relative(grad_hidden_ND / 3, expected_NV @ weight_VD.double()) < gradient_limit
        assert relative(grad_weight_VD / 3, expected_NV.T @ hidden_ND.double()) < gradient_limit


@pytest.mark.parametrize("keys", [*DIVERGENCES, *SAMPLED], ids=str)
def test_it_is_the_loss_from_logits(keys: Keys) -> None:
    hidden_ND, weight_VD, scene = factors(make_scene(50), torch.float64)
    loss, grad_hidden_ND, grad_weight_VD = fused(scene, keys, hidden_ND, weight_VD)
    hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    loss_N, diagnostics = position_loss(hidden_ND @ weight_VD.T, **arguments(scene, keys, torch.float64))
    expected = torch.autograd.grad(loss_N.sum(), (hidden_ND, weight_VD))
    for a, b in zip((loss.loss_N, grad_hidden_ND, grad_weight_VD), (loss_N, *expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    assert loss.diagnostics.keys() == diagnostics.keys()
    for name, value in diagnostics.items():
        torch.testing.assert_close(loss.diagnostics[name], value, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("keys", [Keys(), Keys(renormalize=True), Keys("full_kl"), Keys("sampled_kl")], ids=str)
@pytest.mark.parametrize("matrix", [torch.bfloat16, torch.float32])
def test_half_precision_is_summed_in_float32(keys: Keys, matrix: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.fused.TILE_SIZE", 17)
    hidden_ND, weight_VD, scene = factors(make_scene(50), torch.bfloat16)
    exact = fused(scene, keys, hidden_ND.double(), weight_VD.double())
    loss, grad_hidden_ND, grad_weight_VD = fused(scene, keys, hidden_ND, weight_VD.to(matrix))
    assert (grad_hidden_ND.dtype, grad_weight_VD.dtype) == (torch.bfloat16, matrix)
    torch.testing.assert_close(loss.loss_N.double(), exact[0].loss_N, rtol=1e-6, atol=5e-5)
    assert relative(grad_hidden_ND, exact[1]) < 5e-3  # handed back in bfloat16, summed in float32
    assert relative(grad_weight_VD, exact[2]) < (5e-3 if matrix == torch.bfloat16 else 1e-5)


def test_products_of_halves_where_torch_and_the_device_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere, and under a torch before 2.8, it is the product of the test above."""
    assert takes_halves("cuda", torch.float32, torch.bfloat16)
    assert not takes_halves("cpu", torch.float32, torch.bfloat16)
    assert not takes_halves("cuda", torch.float64, torch.bfloat16)
    assert not takes_halves("cuda", torch.float32, torch.float32)
    monkeypatch.setattr("opd.fused.SUMS_HALVES", False)
    assert not takes_halves("cuda", torch.float32, torch.bfloat16)


@pytest.mark.parametrize("keys", FINITE_KINDS, ids=str)
def test_chunks_change_nothing_and_extremes_stay_finite(keys: Keys) -> None:
    scene = make_scene(50)
    peaked = replace(scene, student_NV=scene.student_NV * 100, teacher_NV=scene.teacher_NV * 100)
    scene.student_blocked = [i for i in range(50) if i not in (EOS, 30, 31)]
    scene.response_ids_N = torch.tensor([30, 31, 30, 31, EOS, EOS, EOS])
    for case in (peaked, scene):
        hidden_ND, weight_VD, case = factors(case, torch.float32)
        whole, *gradients = fused(case, replace(keys, chunk_size=100), hidden_ND, weight_VD)
        parts, *other_gradients = fused(case, replace(keys, chunk_size=2), hidden_ND, weight_VD)
        for a, b in zip((whole.loss_N, *gradients), (parts.loss_N, *other_gradients), strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
        assert all(value.isfinite().all() for value in parts.diagnostics.values())


@pytest.mark.parametrize("keys", FINITE_KINDS, ids=str)
def test_no_positions_still_run_backward(keys: Keys) -> None:
    hidden_ND, weight_VD, scene = factors(make_scene(50), torch.float32)
    loss, grad_hidden_ND, grad_weight_VD = fused(scene.rows(0, 0), keys, hidden_ND[:0], weight_VD)
    assert loss.total == 0
    assert grad_hidden_ND.shape == (0, weight_VD.shape[1])
    assert torch.equal(grad_weight_VD, torch.zeros_like(weight_VD))
    assert loss.diagnostics.keys() == fused(scene, keys, hidden_ND, weight_VD)[0].diagnostics.keys()


def test_only_the_gradients_that_are_wanted_are_computed() -> None:
    hidden_ND, weight_VD, scene = factors(make_scene(50), torch.float32)
    both = fused(scene, Keys(), hidden_ND, weight_VD)
    for keys, expected in ((Keys(), both), (Keys(renormalize=True), None)):
        for index, leaf in enumerate((hidden_ND.clone(), weight_VD.clone())):
            inputs = [hidden_ND, weight_VD]
            inputs[index] = leaf.requires_grad_()
            loss = fused_position_loss(*inputs, **arguments(scene, keys, torch.float32))
            (gradient,) = torch.autograd.grad(loss.total, leaf)
            if expected is not None:
                torch.testing.assert_close(gradient, expected[1 + index])
            with torch.no_grad():
                assert not fused_position_loss(*inputs, **arguments(scene, keys, torch.float32)).total.requires_grad


@pytest.mark.parametrize(
    "keys", [*(Keys(kind, chunk_size=8) for kind in ("forward_kl", "sampled_kl")), Keys(renormalize=True, chunk_size=8)],
    ids=str,
)  # fmt: skip
def test_no_tensor_of_all_positions_and_the_vocabulary_is_made(keys: Keys) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    hidden_ND, weight_VD, scene = factors(make_scene(3000, num_positions=64), torch.float32)
    given = arguments(scene, keys, torch.float32)
    hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor) and tensor.numel() != weight_VD.numel():
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        fused_position_loss(hidden_ND, weight_VD, **given).total.backward()
    width, support_size = weight_VD.shape[1], 5 + 9 + 2
    assert largest == (8 * support_size * width if keys.renormalize else 8 * 3000)


def test_the_renormalised_form_moves_only_the_rows_of_the_support() -> None:
    hidden_ND, weight_VD, scene = factors(make_scene(3000), torch.float32)
    _, _, grad_weight_VD = fused(scene, Keys(renormalize=True), hidden_ND, weight_VD)
    touched = grad_weight_VD.abs().sum(1) > 0
    assert 10 < int(touched.sum()) <= 7 * (5 + 9 + 2)
    poisoned_VD = weight_VD.clone()
    # Id 0 stands in for entries that are not valid: read, but without influence.
    poisoned_VD[(~touched).nonzero()[1:, 0]] = float("nan")
    loss = fused_position_loss(
        hidden_ND, poisoned_VD, **arguments(scene, Keys(renormalize=True), torch.float32)
    )  # fmt: skip
    assert loss.total.isfinite()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_cross_entropy(dtype: torch.dtype) -> None:
    hidden_ND, weight_VD, scene = factors(make_scene(50), dtype)
    blocked_V = scene.blocked_V()
    hidden_ND.requires_grad_(), weight_VD.requires_grad_()
    logits_NV = (hidden_ND.double() @ weight_VD.double().T).masked_fill(blocked_V, float("-inf"))
    best_N = logits_NV.argmax(-1)
    ids_N = torch.where(torch.arange(7) % 2 == 0, best_N, scene.response_ids_N)
    loss = fused_cross_entropy(hidden_ND, weight_VD, ids_N, blocked_V=blocked_V, chunk_size=3)
    expected_N = torch.nn.functional.cross_entropy(logits_NV, ids_N, reduction="none")
    torch.testing.assert_close(loss.loss_N.double(), expected_N, rtol=0, atol=1e-10 if dtype == torch.float64 else 1e-5)
    assert torch.equal(loss.diagnostics["correct"].bool(), best_N == ids_N)
    ours = torch.autograd.grad(loss.total, (hidden_ND, weight_VD))
    for a, b in zip(ours, torch.autograd.grad(expected_N.sum(), (hidden_ND, weight_VD)), strict=True):
        assert relative(a, b.double()) < (1e-12 if dtype == torch.float64 else 1e-5)
    empty = fused_cross_entropy(hidden_ND[:0], weight_VD, ids_N[:0], blocked_V=blocked_V)
    empty.total.backward()
    assert weight_VD.grad is not None and not weight_VD.grad.any()
