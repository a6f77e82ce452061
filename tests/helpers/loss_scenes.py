"""Student and teacher at a few positions, and a float64 oracle of every divergence over the whole vocabulary.

The oracle shares no code with what it checks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from opd.losses import LOSSES
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
