"""Divergences against a float64 oracle over the whole vocabulary, which shares no code with what it checks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from loss_scenes import (
    DIVERGENCES,
    EOS,
    FINITE_KINDS,
    TEACHER_EOS,
    Keys,
    Scene,
    gap,
    make_scene,
    oracle,
    oracle_sets,
    relative,
    self_taught,
)

from opd.losses import LOSSES, position_loss
from opd.support import candidate_ids, score_support


def forward(
    scene: Scene, keys: Keys, dtype: torch.dtype, rollout_logprobs_N: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """The student's logits as a leaf, our loss (N,) and the diagnostics."""
    topk_NK = scene.allowed_student().topk(scene.student_k).indices
    candidates_NC = candidate_ids(topk_NK, scene.response_ids_N, EOS)
    teacher = score_support(
        scene.allowed_teacher().to(dtype), candidates_NC, scene.token_map(), top_k=scene.teacher_k,
        temperature=keys.temperature, support=keys.support, full=keys.kind == "full_kl", chunk_size=4,
    )  # fmt: skip
    logits_NV = scene.student_NV.clone().to(dtype).requires_grad_()
    loss_N, diagnostics = position_loss(
        logits_NV, response_ids_N=scene.response_ids_N, candidate_ids_NC=candidates_NC, teacher=teacher, eos_id=EOS,
        rollout_logprobs_N=torch.zeros(len(logits_NV)) if rollout_logprobs_N is None else rollout_logprobs_N,
        config=keys, blocked_V=scene.blocked_V(), **options,
    )  # fmt: skip
    return logits_NV, loss_N, diagnostics


def ours(
    scene: Scene, keys: Keys, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Our loss (N,), the gradient of its sum in the student's logits (N, V) and the diagnostics."""
    logits_NV, loss_N, diagnostics = forward(scene, keys, dtype, **options)
    (gradient_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
    return loss_N.detach(), gradient_NV, diagnostics


@pytest.mark.parametrize("vocab_size", [50, 3000])
@pytest.mark.parametrize("keys", DIVERGENCES, ids=str)
def test_value_and_gradient_match_the_oracle(keys: Keys, vocab_size: int) -> None:
    scene = make_scene(vocab_size)
    loss_N, gradient_NV, _ = ours(scene, keys)
    expected_N, expected_NV = oracle(scene, keys)
    assert expected_N.median() > 0.1  # a scene where both sides agree would prove nothing
    shown = {"float64 value": gap(loss_N, expected_N), "float64 gradient": relative(gradient_NV, expected_NV)}
    assert gap(loss_N, expected_N) < 1e-6
    assert relative(gradient_NV, expected_NV) < 1e-6
    loss_N, gradient_NV, _ = ours(scene, keys, torch.float32)
    assert loss_N.dtype == gradient_NV.dtype == torch.float32
    expected_N, expected_NV = oracle(scene, keys, torch.float32)
    shown |= {"float32 value": gap(loss_N, expected_N), "float32 gradient": relative(gradient_NV, expected_NV)}
    print({name: f"{value:.1e}" for name, value in shown.items()})  # pytest -rP shows it
    assert gap(loss_N, expected_N) < 5e-5
    assert relative(gradient_NV, expected_NV) < 1e-4


def test_bfloat16_logits_are_computed_in_float32() -> None:
    scene, keys = make_scene(50), Keys()
    scene.student_NV, scene.teacher_NV = scene.student_NV.bfloat16().double(), scene.teacher_NV.bfloat16().double()
    loss_N, gradient_NV, _ = ours(scene, keys, torch.bfloat16)
    expected_N, expected_NV = oracle(scene, keys)
    assert loss_N.dtype == torch.float32
    torch.testing.assert_close(loss_N.double(), expected_N, rtol=0, atol=5e-5)
    assert relative(gradient_NV, expected_NV) < 1e-2  # the gradient is handed back in bfloat16


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_teacher_that_is_the_student_gives_zero(kind: str, renormalize: bool) -> None:
    scene = self_taught(make_scene(50, student_k=4, teacher_k=6))
    loss_N, gradient_NV, _ = ours(scene, Keys(kind, renormalize=renormalize, temperature=1.3))
    assert torch.cat([loss_N, gradient_NV.flatten()]).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_union_that_is_the_vocabulary_gives_full_kl(dtype: torch.dtype) -> None:
    scene = make_scene(50)
    full_N, full_NV, _ = ours(scene, Keys("full_kl", temperature=1.3), dtype)
    everything = replace(scene, student_k=50 - len(scene.student_blocked), teacher_k=60)
    union_N, union_NV, diagnostics = ours(everything, Keys("forward_kl", temperature=1.3), dtype)
    atol = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(union_N, full_N, rtol=0, atol=atol)
    torch.testing.assert_close(union_NV, full_NV, rtol=0, atol=atol)
    part_N, _, _ = ours(scene, Keys("forward_kl", temperature=1.3), dtype)
    assert (part_N - full_N).abs().max() > 1e-3
    assert (diagnostics["support_size"] == 50 - 7).all()  # 3 unmapped ids, 3 the student blocks, 1 the teacher alone


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_sampled_kl_has_the_gradient_of_reverse_kl_in_expectation(stale: bool, temperature: float) -> None:
    """Exactly: every id of the vocabulary is written once and weighted with the probability of writing it."""
    size = 30
    generator = torch.Generator().manual_seed(3)
    student_V, teacher_V, old_V = torch.randn(3, size, generator=generator, dtype=torch.float64).unbind()
    scene = Scene(
        student_V.expand(size, size).clone(), teacher_V.expand(size, size).clone(), {i: i for i in range(size)},
        [], [], torch.arange(size), 4, 4,
    )  # fmt: skip
    rollout_V = (old_V if stale else student_V / temperature).log_softmax(-1)
    keys = Keys("sampled_kl", temperature=temperature, max_importance=1e6)
    _, per_id_NV, diagnostics = ours(scene, keys, rollout_logprobs_N=rollout_V)
    expected_V = (rollout_V.exp()[:, None] * per_id_NV).sum(0)
    logits_V = student_V.clone().requires_grad_()
    log_q_V, log_p_V = (logits_V / temperature).log_softmax(-1), (teacher_V / temperature).log_softmax(-1)
    reverse_kl = (log_q_V.exp() * (log_q_V - log_p_V)).sum() * temperature**2
    torch.testing.assert_close(expected_V, torch.autograd.grad(reverse_kl, logits_V)[0], rtol=0, atol=1e-12)
    if temperature == 1 and not stale:  # the two estimates, in expectation
        for name in ("k1", "k3"):
            torch.testing.assert_close((rollout_V.exp() * diagnostics[name]).sum(), reverse_kl.detach())


def test_the_importance_weight_is_capped() -> None:
    scene = make_scene(50)
    free, _, _ = ours(scene, Keys("sampled_kl", max_importance=1e9), rollout_logprobs_N=torch.full((7,), -30.0))
    capped, _, _ = ours(scene, Keys("sampled_kl", max_importance=2.0), rollout_logprobs_N=torch.full((7,), -30.0))
    fresh = ours(scene, Keys("sampled_kl"))[0]  # weight q / 1
    assert (free.abs() > 100 * capped.abs()).all()
    q_N = scene.allowed_student().softmax(-1).gather(1, scene.response_ids_N[:, None])[:, 0]
    torch.testing.assert_close(capped, fresh / q_N * 2)


@pytest.mark.parametrize("kind", [*LOSSES, "sampled_kl"])
def test_chunks_change_nothing(kind: str) -> None:
    scene = make_scene(50)
    whole = ours(scene, Keys(kind, chunk_size=100))
    parts = ours(scene, Keys(kind, chunk_size=2))
    for a, b in zip(whole[:2], parts[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    assert whole[2].keys() == parts[2].keys()
    for name, value in whole[2].items():
        assert value.shape == (7,)
        assert not value.requires_grad
        torch.testing.assert_close(value, parts[2][name])


@pytest.mark.parametrize("kind", [*LOSSES, "sampled_kl"])
def test_no_float32_copy_of_the_batch_is_held_for_the_backward_pass(kind: str) -> None:
    scene = make_scene(500, num_positions=64)
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return held.setdefault(tensor.untyped_storage().data_ptr(), tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(scene, Keys(kind, chunk_size=8), torch.float32)
    assert sum(tensor.numel() for tensor in held.values()) < 64 * 500


def test_micro_batches_of_one_sum_to_the_batch() -> None:
    scene = make_scene(50, num_positions=12)
    total = ours(scene, Keys(), torch.float32)
    losses, gradients = [], []
    for start in range(0, 12, 3):
        loss_N, gradient_NV, _ = ours(scene.rows(start, start + 3), Keys(), torch.float32)
        losses, gradients = [*losses, loss_N.sum() / 12], [*gradients, gradient_NV / 12]
    torch.testing.assert_close(torch.stack(losses).sum(), total[0].sum() / 12, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(gradients), total[1] / 12, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [*LOSSES, "sampled_kl"])
def test_no_positions_still_run_backward(kind: str) -> None:
    scene = make_scene(50)
    loss_N, gradient_NV, diagnostics = ours(
        scene.rows(0, 0), Keys(kind)
    )  # the gradient of an unconnected sum is an error
    assert loss_N.shape == (0,)
    assert gradient_NV.shape == (0, 50)
    assert diagnostics.keys() == ours(scene, Keys(kind))[2].keys()


@pytest.mark.parametrize("kind", [*LOSSES, "sampled_kl"])
def test_masked_positions_count_exactly_zero_whatever_they_hold(kind: str) -> None:
    scene = make_scene(50)
    expected_N, expected_NV, _ = ours(scene, Keys(kind))
    broken = replace(scene, student_NV=scene.student_NV.clone(), teacher_NV=scene.teacher_NV.clone())
    broken.student_NV[1], broken.teacher_NV[4] = float("nan"), float("-inf")
    mask_N = torch.tensor([True, False, True, True, False, True, True])
    loss_N, gradient_NV, diagnostics = ours(broken, Keys(kind), mask_N=mask_N)
    for values in (loss_N, gradient_NV, diagnostics["support_size"]):
        assert (values[~mask_N] == 0).all()
    torch.testing.assert_close(loss_N[mask_N], expected_N[mask_N])
    torch.testing.assert_close(gradient_NV[mask_N], expected_NV[mask_N])
    nothing_N, nothing_NV, _ = ours(broken, Keys(kind), mask_N=torch.zeros(7, dtype=torch.bool))
    assert (torch.cat([nothing_N, nothing_NV.flatten()]) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("keys", FINITE_KINDS, ids=str)
def test_peaked_distributions_stay_finite(keys: Keys, dtype: torch.dtype) -> None:
    """Tails far below the floor on either side, teacher and student sure of the same or of different ids."""
    scene = make_scene(50)
    scene.student_NV, scene.teacher_NV = scene.student_NV * 100, scene.teacher_NV * 100
    for student_NV in (scene.student_NV, scene.student_NV.flip(0), scene.student_NV * 0):
        loss_N, gradient_NV, diagnostics = ours(replace(scene, student_NV=student_NV), keys, dtype)
        assert all(value.isfinite().all() for value in (loss_N, gradient_NV, *diagnostics.values()))


@pytest.mark.parametrize("keys", FINITE_KINDS, ids=str)
def test_almost_everything_blocked_stays_finite(keys: Keys) -> None:
    """Each side may write three ids, top-k reaches into the blocked ones and both tails are empty."""
    scene = make_scene(50)
    student_allowed, teacher_allowed = (EOS, 30, 31), (TEACHER_EOS, scene.to_teacher[30], scene.to_teacher[32])
    scene.student_blocked = [i for i in range(50) if i not in student_allowed]
    scene.teacher_blocked = [i for i in range(60) if i not in teacher_allowed]
    scene.response_ids_N = torch.tensor([30, 31, 30, 31, EOS, EOS, EOS])
    loss_N, gradient_NV, diagnostics = ours(scene, keys)
    assert all(value.isfinite().all() for value in (loss_N, gradient_NV, *diagnostics.values()))
    assert (diagnostics["support_size"] == 2).all()
    if keys.kind == "forward_kl":
        torch.testing.assert_close(loss_N, oracle(scene, keys)[0])


def test_diagnostics() -> None:
    scene = make_scene(50)
    _, _, diagnostics = ours(scene, Keys(temperature=1.7))
    q_NV, p_NV = (scene.allowed_student() / 1.7).softmax(-1), (scene.allowed_teacher() / 1.7).softmax(-1)
    for n in range(7):
        union = oracle_sets(scene, n, Keys())
        mapped = [scene.to_teacher[i] for i in union]
        unmapped = sorted(set(range(60)) - set(scene.to_teacher.values()))
        written = int(scene.response_ids_N[n])
        expected = {
            "support_size": float(len(union)),
            "student_mass": q_NV[n, union].sum().item(),
            "teacher_mass": p_NV[n, mapped].sum().item(),
            "unmapped_mass": p_NV[n, unmapped].sum().item(),
            "teacher_entropy": torch.special.entr(p_NV[n]).sum().item(),
            "student_eos": q_NV[n, EOS].item(),
            "teacher_eos": p_NV[n, TEACHER_EOS].item(),
        }
        if written in scene.to_teacher:
            expected["k1"] = math.log(q_NV[n, written] / p_NV[n, scene.to_teacher[written]])
        for name, value in expected.items():
            assert diagnostics[name][n].item() == pytest.approx(value, abs=1e-9), name
    torch.testing.assert_close(diagnostics["kl"], oracle(scene, Keys(temperature=1.7))[0] / 1.7**2)
    assert (ours(self_taught(scene), Keys())[2]["overlap"] == 1).all()
    assert 0 < diagnostics["overlap"].mean() < 1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (Keys("k3"), "loss.kind=k3"), (Keys("jsd", beta=1.0), "loss.beta=1"), (Keys("full_kl"), "full_logprobs"),
        (Keys("sampled_kl", renormalize=True), "loss.renormalize"),
    ],
    ids=str,
)  # fmt: skip
def test_keys_that_cannot_be_run_are_refused(keys: Keys, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        position_loss(
            torch.zeros(1, 5), response_ids_N=torch.zeros(1), rollout_logprobs_N=torch.zeros(1), teacher={},
            candidate_ids_NC=torch.zeros(1, 3), eos_id=EOS, config=keys,
        )  # fmt: skip
