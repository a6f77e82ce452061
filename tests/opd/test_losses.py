"""Divergences against a float64 oracle over the whole vocabulary, which shares no code with what it checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from opd.losses import LOSSES, position_loss
from opd.support import candidate_ids, score_support
from opd.vocab import TokenMap

EOS, TEACHER_EOS = 2, 7


@dataclass(frozen=True)
class Keys:
    kind: str = "forward_kl"
    support: str = "union"
    temperature: float = 1.0
    beta: float = 0.3
    renormalize: bool = False
    max_importance: float = 5.0
    chunk_size: int = 3


@dataclass
class Scene:
    """Student and teacher logits at N positions, over vocabularies that differ in order, size and content."""

    student_NV: torch.Tensor
    teacher_NV: torch.Tensor
    to_teacher: dict[int, int]
    student_blocked: list[int]
    teacher_blocked: list[int]
    response_ids_N: torch.Tensor
    student_k: int
    teacher_k: int

    def rows(self, start: int, end: int) -> Scene:
        names = ("student_NV", "teacher_NV", "response_ids_N")
        return replace(self, **{name: getattr(self, name)[start:end] for name in names})

    def token_map(self) -> TokenMap:
        to_teacher_V = torch.full((self.student_NV.shape[1],), -1)
        to_student_V = torch.full((self.teacher_NV.shape[1],), -1)
        for student_id, teacher_id in self.to_teacher.items():
            to_teacher_V[student_id], to_student_V[teacher_id] = teacher_id, student_id
        return TokenMap(to_teacher_V, to_student_V)

    def blocked_V(self) -> torch.Tensor:
        mask_V = torch.zeros(self.student_NV.shape[1], dtype=torch.bool)
        mask_V[self.student_blocked] = True
        return mask_V

    def allowed_student(self) -> torch.Tensor:
        return self.student_NV.masked_fill(self.blocked_V(), float("-inf"))

    def allowed_teacher(self) -> torch.Tensor:
        allowed_NV = self.teacher_NV.clone()
        allowed_NV[:, self.teacher_blocked] = float("-inf")
        return allowed_NV


def make_scene(vocab_size: int, seed: int = 0, num_positions: int = 7, student_k: int = 5, teacher_k: int = 9) -> Scene:
    """Teacher vocabulary: permuted, 1.2 times as large; each side has ids that the other lacks, and blocked ids."""
    generator = torch.Generator().manual_seed(seed)
    teacher_size = vocab_size + vocab_size // 5
    order = [i for i in torch.randperm(teacher_size, generator=generator).tolist() if i != TEACHER_EOS]
    ordinary = [i for i in range(vocab_size) if i not in (EOS, 5, 9, 17)]
    to_teacher = dict(zip(ordinary, order[: len(ordinary)], strict=True)) | {EOS: TEACHER_EOS}
    student_NV = 3 * torch.randn(num_positions, vocab_size, generator=generator, dtype=torch.float64)
    teacher_NV = 3 * torch.randn(num_positions, teacher_size, generator=generator, dtype=torch.float64)
    for student_id, teacher_id in to_teacher.items():  # The two agree in part, so that the top-k overlap.
        teacher_NV[:, teacher_id] += student_NV[:, student_id]
    # 17 is unmapped and likely, 11 is blocked by the student alone and likely for the teacher, 12 the reverse.
    student_NV[:, 17] += 8
    teacher_NV[:, to_teacher[11]] += 8
    teacher_NV[:, order[-1]] += 6
    student_NV[:, 12] += 8
    student_NV[:, 20] += 12
    allowed = [i for i in range(vocab_size) if i not in (20, 21, 11)]
    written = torch.tensor(allowed)[torch.randint(len(allowed), (num_positions,), generator=generator)]
    written[-1] = EOS
    return Scene(
        student_NV, teacher_NV, to_teacher, [20, 21, 11], [to_teacher[20], to_teacher[12]],
        written, student_k, teacher_k,
    )  # fmt: skip


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


# -- the oracle: Python sets per position, dense probabilities, tails as explicit sums --


def oracle_sets(scene: Scene, n: int, keys: Keys) -> list[int]:
    """U at a position, as sorted student ids."""
    student, teacher = scene.allowed_student()[n].tolist(), scene.allowed_teacher()[n].tolist()
    to_student = {t: s for s, t in scene.to_teacher.items()}
    of_student = set(sorted(range(len(student)), key=lambda i: -student[i])[: scene.student_k])
    top_teacher = sorted(range(len(teacher)), key=lambda i: -teacher[i])[: scene.teacher_k]
    of_teacher = {to_student[i] for i in top_teacher if i in to_student}
    union = {"union": of_student | of_teacher, "student": of_student, "teacher": of_teacher}[keys.support]
    union = set(range(len(student))) if keys.kind == "full_kl" else union | {EOS, int(scene.response_ids_N[n])}
    both = {i for i in union if i in scene.to_teacher and i not in scene.student_blocked}
    return sorted(i for i in both if scene.to_teacher[i] not in scene.teacher_blocked)


def oracle(scene: Scene, keys: Keys, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss (N,) and the gradient of its sum (N, V), in float64 on logits rounded to `dtype`."""
    logits_NV = scene.student_NV.clone().to(dtype).double().requires_grad_()
    blocked = torch.tensor(scene.student_blocked)
    losses = []
    for n in range(len(logits_NV)):
        allowed_V = logits_NV[n].index_fill(0, blocked, float("-inf"))
        q_V = torch.log_softmax(allowed_V / keys.temperature, -1).exp()
        p_V = torch.softmax(scene.allowed_teacher()[n].to(dtype).double() / keys.temperature, -1)
        union = oracle_sets(scene, n, keys)
        mapped = [scene.to_teacher[i] for i in union]
        p, q = p_V[mapped], q_V[union]
        if keys.renormalize:
            p, q = p / p.sum(), q / q.sum()
        else:
            rest_q = sorted(set(range(len(q_V))) - set(union) - set(scene.student_blocked))
            rest_p = sorted(set(range(len(p_V))) - set(mapped))
            p, q = torch.cat([p, p_V[rest_p].sum()[None]]), torch.cat([q, q_V[rest_q].sum()[None]])
        m = keys.beta * p + (1 - keys.beta) * q
        first, second = {"reverse_kl": (q, p), "jsd": (p, m)}.get(keys.kind, (p, q))
        value = (first * (first / second).log()).sum()
        if keys.kind == "jsd":
            value = keys.beta * value + (1 - keys.beta) * (q * (q / m).log()).sum()
        losses.append(keys.temperature**2 * value)
    loss_N = torch.stack(losses)
    (gradient_NV,) = torch.autograd.grad(loss_N.sum(), logits_NV)
    return loss_N.detach(), gradient_NV


def self_taught(scene: Scene) -> Scene:
    same = {i: i for i in range(scene.student_NV.shape[1])}
    return replace(scene, teacher_NV=scene.student_NV, to_teacher=same, teacher_blocked=scene.student_blocked)


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference; NaN, which no limit lets pass, where either has one."""
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b).norm() / b.norm())


FINITE_KINDS = [*(Keys(kind) for kind in [*LOSSES, "sampled_kl"]), Keys(renormalize=True)]
DIVERGENCES = [
    Keys("forward_kl"), Keys("forward_kl", temperature=1.7), Keys("forward_kl", support="student"),
    Keys("reverse_kl"), Keys("reverse_kl", temperature=0.6), Keys("reverse_kl", support="teacher"),
    Keys("jsd", beta=0.8), Keys("jsd", temperature=1.7), Keys("full_kl", temperature=1.7),
    Keys("forward_kl", renormalize=True, temperature=1.7), Keys("reverse_kl", renormalize=True),
    Keys("jsd", renormalize=True),
]  # fmt: skip


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
