"""Divergences between teacher and student at the student's own states, one value per position.

Everything is normalised over the whole allowed vocabulary, then compared on O outcomes: the U ids of a support that
both sides can write and, unless renormalised, one tail that holds the rest of each side's mass. The sum over positions,
divided by the trained positions of all ranks, is the caller's job; nothing here knows a process group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint

from opd.support import FAR, NUM_EXTRA, TAIL_FLOOR, log_rest, narrow_support, union_support

Fields = dict[str, torch.Tensor]
TEACHER_FIELDS = (
    "topk_ids_BTK", "topk_logprobs_BTK", "candidate_logprobs_BTC", "tail_logprob_BT", "unmapped_mass_BT", "entropy_BT",
)  # fmt: skip
MAX_LOG_RATIO = 20.0  # k3 holds exp(log p - log q): capped, or one odd token makes the logged sum infinite


class LossKeys(Protocol):
    """What is read from `opd.config.LossConfig`, which says what each key means."""

    @property
    def kind(self) -> str: ...
    @property
    def support(self) -> str: ...
    @property
    def temperature(self) -> float: ...
    @property
    def beta(self) -> float: ...
    @property
    def renormalize(self) -> bool: ...
    @property
    def max_importance(self) -> float: ...
    @property
    def chunk_size(self) -> int: ...


# -- divergences: (log p, log q, valid, beta) -> (N,). Both sides are finite everywhere, entries not valid count 0 --


def kl(log_p_NO: torch.Tensor, log_q_NO: torch.Tensor, valid_NO: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the valid outcomes: (N,)."""
    return (log_p_NO.exp() * (log_p_NO - log_q_NO)).masked_fill(~valid_NO, 0.0).sum(-1)


def forward_kl(
    log_p_NO: torch.Tensor, log_q_NO: torch.Tensor, valid_NO: torch.Tensor, beta: float = 0.5
) -> torch.Tensor:
    """KL(teacher || student): (N,)."""
    return kl(log_p_NO, log_q_NO, valid_NO)


def reverse_kl(
    log_p_NO: torch.Tensor, log_q_NO: torch.Tensor, valid_NO: torch.Tensor, beta: float = 0.5
) -> torch.Tensor:
    """KL(student || teacher): (N,)."""
    return kl(log_q_NO, log_p_NO, valid_NO)


def jsd(log_p_NO: torch.Tensor, log_q_NO: torch.Tensor, valid_NO: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, 0 < beta < 1: (N,)."""
    log_m_NO = torch.logaddexp(log_p_NO + math.log(beta), log_q_NO + math.log1p(-beta))
    return beta * kl(log_p_NO, log_m_NO, valid_NO) + (1 - beta) * kl(log_q_NO, log_m_NO, valid_NO)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "full_kl": forward_kl,  # the support is then the whole vocabulary
}


def sampled_kl(
    log_p_N: torch.Tensor, log_q_N: torch.Tensor, rollout_logprobs_N: torch.Tensor, max_importance: float
) -> torch.Tensor:
    """Reverse KL by the score function, at the written ids: w stop_grad[log q - log p] log q, (N,).

    Its *gradient* estimates that of KL(q || p) when the ids were sampled; its value means nothing. w = q / q_rollout,
    at most max_importance and without a gradient, corrects for a rollout by an older student or at another temperature.
    """
    log_weight_N = (log_q_N.detach() - rollout_logprobs_N).clamp(max=math.log(max_importance))
    return log_weight_N.exp() * (log_q_N.detach() - log_p_N) * log_q_N


# -- the loss at a support: everything the student's vocabulary has to say comes in as U logits and one sum --


@dataclass(frozen=True)
class Support:
    """The ids that a divergence runs over at N positions.

    ids_NU    student ids, ready to be gathered
    valid_NU  bool, the first occurrence of each id that both vocabularies have
    log_p_NU  the teacher's log-probabilities
    """

    ids_NU: torch.Tensor
    valid_NU: torch.Tensor
    log_p_NU: torch.Tensor


@dataclass(frozen=True)
class StudentLogits:
    """What a loss reads of the student: logits divided by the temperature, -inf at blocked ids.

    support_NU  at the ids of the support
    others_N2   at the written id and at EOS
    rest_N      log-sum-exp over the rest: all ids but those of the support that both sides can write; at least FAR
    best_N      the greatest logit of the rest, where it is known

    Only the renormalised form can do without others and rest.
    """

    support_NU: torch.Tensor
    others_N2: torch.Tensor | None = None
    rest_N: torch.Tensor | None = None
    best_N: torch.Tensor | None = None


def support_of(fields: Fields, config: LossKeys) -> Support:
    """The support that the config asks for, from `loss_fields`."""
    if config.kind == "full_kl":
        log_p_NV = fields["full_logprobs_BTV"]
        ids_NV = torch.arange(log_p_NV.shape[-1], device=log_p_NV.device).expand_as(log_p_NV)
        return Support(ids_NV, log_p_NV > float("-inf"), log_p_NV)
    ids = narrow_support(config.support, fields["candidate_ids_NC"], fields["topk_ids_BTK"])
    logprobs = narrow_support(config.support, fields["candidate_logprobs_BTC"], fields["topk_logprobs_BTK"])
    ids_NU, valid_NU = union_support(*ids, logprobs[0] > float("-inf"))
    return Support(ids_NU, valid_NU, torch.cat(logprobs, dim=-1))


def loss_at_support(
    student: StudentLogits, support: Support, fields: Fields, config: LossKeys
) -> tuple[torch.Tensor, Fields]:
    """The loss at N positions (N,), differentiable in the student's logits, and diagnostics (N,) without gradient.

    What needs the student's whole vocabulary (its mass on the support, EOS, k1 and k3) is not among the diagnostics of
    the renormalised form.
    """
    shared_NU = support.valid_NU & (student.support_NU > float("-inf"))
    with torch.no_grad():
        diagnostics = _teacher_diagnostics(support, shared_NU, fields)
    if config.renormalize:
        compared = _renormalized(support.log_p_NU, student.support_NU, shared_NU)
    else:
        log_q_NU, log_q_tail_N, log_q_N2 = _normalized(student, shared_NU)
        # An id the teacher cannot write would be infinitely bad: the floor bounds it.
        log_p_N = fields["candidate_logprobs_BTC"][:, -NUM_EXTRA].clamp(min=TAIL_FLOOR)
        compared = _with_tail(support, shared_NU, fields, log_q_NU, log_q_tail_N)
        with torch.no_grad():
            mass_N = log_q_NU.exp().masked_fill(~shared_NU, 0.0).sum(-1)
            diagnostics |= {"student_mass": mass_N, "student_eos": log_q_N2[:, 1].exp()}
            diagnostics |= _estimates(log_p_N, log_q_N2[:, 0])
    with torch.no_grad():
        diagnostics["kl"] = kl(*compared)
    if config.kind == "sampled_kl":
        loss_N = sampled_kl(log_p_N, log_q_N2[:, 0], fields["rollout_logprobs_N"], config.max_importance)
    else:
        loss_N = LOSSES[config.kind](*compared, config.beta)
    return loss_N * config.temperature**2, diagnostics


def _normalized(student: StudentLogits, shared_NU: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The student's log-probabilities: at the support (N, U), of its tail (N,), at the other ids (N, 2)."""
    assert student.rest_N is not None and student.others_N2 is not None, "only the renormalised form needs no rest"
    # Relative to the greatest: float32 would lose digits of the likeliest ids' log-probabilities.
    top_N1 = torch.maximum(student.support_NU.amax(-1), student.rest_N).detach()[:, None]
    support_NU, others_N2 = student.support_NU - top_N1, student.others_N2 - top_N1
    rest_N1 = student.rest_N[:, None] - top_N1
    log_mass_N1 = support_NU.masked_fill(~shared_NU, FAR).logsumexp(-1, keepdim=True)
    log_z_N1 = torch.logaddexp(log_mass_N1, rest_N1)
    return support_NU - log_z_N1, (rest_N1 - log_z_N1)[:, 0], others_N2 - log_z_N1


def _with_tail(
    support: Support, shared_NU: torch.Tensor, fields: Fields, log_q_NU: torch.Tensor, log_q_tail_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p, log q and valid over the outcomes, the tail being the last: (N, U + 1) each.

    Where an outcome is not valid both logs are 0, so that nothing computed from them is infinite.
    """
    # The teacher's tail knows nothing of ids that only the student blocks: their mass joins it here.
    blocked_only_N = support.log_p_NU.masked_fill(~support.valid_NU | shared_NU, FAR).logsumexp(-1)
    log_p_tail_N = torch.logaddexp(fields["tail_logprob_BT"], blocked_only_N)

    def outcomes(log_NU: torch.Tensor, log_tail_N: torch.Tensor) -> torch.Tensor:
        return torch.cat([log_NU.masked_fill(~shared_NU, 0.0), log_tail_N.clamp(min=TAIL_FLOOR)[:, None]], dim=-1)

    valid_NO = torch.cat([shared_NU, torch.ones_like(shared_NU[:, :1])], dim=-1)
    return outcomes(support.log_p_NU, log_p_tail_N), outcomes(log_q_NU, log_q_tail_N), valid_NO


def _renormalized(
    log_p_NU: torch.Tensor, log_q_NU: torch.Tensor, valid_NU: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The paper's form (arXiv 2605.28139): both sides normalised over the support alone, no tail. (N, U) each."""

    def normalized(log_NU: torch.Tensor) -> torch.Tensor:
        log_mass_N1 = log_NU.masked_fill(~valid_NU, FAR).logsumexp(-1, keepdim=True)
        return (log_NU - log_mass_N1).masked_fill(~valid_NU, 0.0)

    return normalized(log_p_NU), normalized(log_q_NU), valid_NU


def _teacher_diagnostics(support: Support, shared_NU: torch.Tensor, fields: Fields) -> Fields:
    """What is logged whatever the student's vocabulary holds: support size, overlap |S n T| / k (the smaller k), masses."""
    student_NK, teacher_NK = fields["candidate_ids_NC"][:, :-NUM_EXTRA], fields["topk_ids_BTK"]
    in_both_NK = (teacher_NK[:, :, None] == student_NK[:, None, :]).any(-1)
    least_k = max(1, min(student_NK.shape[1], teacher_NK.shape[1]))
    dtype = support.log_p_NU.dtype
    return {
        "support_size": shared_NU.sum(-1).to(dtype),
        "overlap": in_both_NK.sum(-1).to(dtype) / least_k,
        "teacher_mass": support.log_p_NU.exp().masked_fill(~shared_NU, 0.0).sum(-1),
        "unmapped_mass": fields["unmapped_mass_BT"],
        "teacher_entropy": fields["entropy_BT"],
        "teacher_eos": fields["candidate_logprobs_BTC"][:, -1].exp(),
    }


def _estimates(log_p_N: torch.Tensor, log_q_N: torch.Tensor) -> Fields:
    """k1 and k3, estimates of KL(q || p) at the written ids. Metrics only: differentiated, k3 gives forward KL."""
    log_ratio_N = (log_p_N - log_q_N).clamp(max=MAX_LOG_RATIO)
    return {"k1": -log_ratio_N, "k3": log_ratio_N.expm1() - log_ratio_N}


# -- from logits --


def position_loss(
    logits_NV: torch.Tensor,
    *,
    response_ids_N: torch.Tensor,
    rollout_logprobs_N: torch.Tensor,
    candidate_ids_NC: torch.Tensor,
    teacher: Mapping[str, torch.Tensor],
    eos_id: int,
    config: LossKeys,
    blocked_V: torch.Tensor | None = None,
    mask_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Fields]:
    """The loss at N positions (N,) and, without gradient, diagnostics (N,) by name.

    For logits that are at hand; training goes from hidden states by `opd.fused`, which never holds (N, V).

    logits_NV           the student's, any float type; computed in float32, in float64 where they are float64
    response_ids_N      the written ids; rollout_logprobs_N their log-probability when they were written
    candidate_ids_NC    as from `support.candidate_ids`
    teacher             the fields of a `TeacherScore` flattened over N, at the same temperature and support
    blocked_V           bool, ids the student may not write; None where their logits are -inf already
    mask_N              bool; where False the loss and its gradient are exactly 0, whatever the inputs hold

    Divergences, jsd and sampled_kl too, are scaled by temperature^2, so that gradients keep their size as it changes.
    An id that only one side can write is in the tail of both. N = 0 gives empty tensors whose sum runs backward.
    Float32 copies of the logits exist for chunk_size positions at a time and are recomputed in the backward pass.

    Raises ValueError for keys of the config that do not go together or a teacher score that lacks what they need.
    """
    fields = loss_fields(response_ids_N, rollout_logprobs_N, candidate_ids_NC, teacher, config)
    assert len(logits_NV) == len(response_ids_N), "logits and ids are of another number of positions"
    rows = partial(_loss_of_rows, blocked_V=blocked_V, eos_id=eos_id, config=config)
    if mask_N is None:
        return _in_chunks(rows, logits_NV, fields, config.chunk_size)
    kept = {name: value[mask_N] for name, value in fields.items()}
    loss_n, diagnostics = _in_chunks(rows, logits_NV[mask_N], kept, config.chunk_size)
    return _spread(loss_n, mask_N), {name: _spread(value, mask_N) for name, value in diagnostics.items()}


def loss_fields(
    response_ids_N: torch.Tensor,
    rollout_logprobs_N: torch.Tensor,
    candidate_ids_NC: torch.Tensor,
    teacher: Mapping[str, torch.Tensor],
    config: LossKeys,
) -> Fields:
    """All that a loss reads beside the student's logits, in one dictionary that can be cut along N.

    Raises ValueError for keys of the config that do not go together or a teacher score that lacks what they need.
    """
    check_keys(config, teacher)
    names = TEACHER_FIELDS + (("full_logprobs_BTV",) if config.kind == "full_kl" else ())
    fields: Fields = {name: teacher[name] for name in names}
    fields |= {"response_ids_N": response_ids_N, "rollout_logprobs_N": rollout_logprobs_N}
    fields["candidate_ids_NC"] = candidate_ids_NC
    for name, value in fields.items():
        assert len(value) == len(response_ids_N), f"{name} has another number of positions than the written ids"
    return fields


def floats_to(fields: Fields, dtype: torch.dtype) -> Fields:
    """The fields with their floats in the type that the loss is computed in."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in fields.items()}


def check_keys(config: LossKeys, teacher: Mapping[str, torch.Tensor]) -> None:
    """Raises ValueError for keys that do not go together, or a score that lacks what they need."""
    kinds = (*LOSSES, "sampled_kl")
    if config.kind not in kinds:
        raise ValueError(f"loss.kind={config.kind}: must be one of {', '.join(kinds)}")
    if config.kind == "jsd" and not 0 < config.beta < 1:
        raise ValueError(f"loss.beta={config.beta:g}: jsd needs a weight between 0 and 1, at either end it is always 0")
    if config.kind == "sampled_kl" and config.renormalize:
        raise ValueError("loss.renormalize=true: sampled_kl has no support to renormalise over")
    if config.kind == "full_kl" and teacher.get("full_logprobs_BTV") is None:
        raise ValueError("loss.kind=full_kl: the teacher's score has no full_logprobs; score with full=True")


def _in_chunks(
    rows: Callable[[torch.Tensor, Fields], tuple[torch.Tensor, Fields]],
    logits_NV: torch.Tensor,
    fields: Fields,
    chunk_size: int,
) -> tuple[torch.Tensor, Fields]:
    """`rows` over chunks of positions, joined. N = 0 is one empty chunk, so the graph is there all the same."""
    # split, not slices: its backward writes one (N, V) gradient, that of slices one per chunk.
    pieces = {name: value.split(chunk_size) for name, value in fields.items()}
    losses, diagnostics = [], []
    for index, logits_nV in enumerate(logits_NV.split(chunk_size)):
        piece = {name: value[index] for name, value in pieces.items()}
        loss_n, diagnostics_n = checkpoint(rows, logits_nV, piece, use_reentrant=False, preserve_rng_state=False)
        losses.append(loss_n)
        diagnostics.append(diagnostics_n)
    return torch.cat(losses), {name: torch.cat([d[name] for d in diagnostics]) for name in diagnostics[0]}


def _spread(values_n: torch.Tensor, mask_N: torch.Tensor) -> torch.Tensor:
    """Values of the kept positions at their places among all, 0 elsewhere: (N,)."""
    return values_n.new_zeros(mask_N.shape).masked_scatter(mask_N, values_n)


def _loss_of_rows(
    logits_NV: torch.Tensor, fields: Fields, *, blocked_V: torch.Tensor | None, eos_id: int, config: LossKeys
) -> tuple[torch.Tensor, Fields]:
    """Loss and diagnostics of one chunk."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    fields = floats_to(fields, dtype)
    logits_NV = logits_NV.to(dtype) / config.temperature
    if blocked_V is not None:
        logits_NV = logits_NV.masked_fill(blocked_V, float("-inf"))
    support = support_of(fields, config)
    support_NU = logits_NV.gather(-1, support.ids_NU)
    shared_NU = support.valid_NU & (support_NU > float("-inf"))
    others_N2 = logits_NV.gather(-1, other_ids(fields, eos_id))
    student = StudentLogits(support_NU, others_N2, log_rest(logits_NV, support.ids_NU, shared_NU))
    return loss_at_support(student, support, fields, config)


def other_ids(fields: Fields, eos_id: int) -> torch.Tensor:
    """The ids that are read beside the support: the written one and EOS, (N, 2)."""
    ids_N = fields["response_ids_N"]
    return torch.stack([ids_N, torch.full_like(ids_N, eos_id)], dim=-1)
