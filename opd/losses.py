"""Divergences between teacher and student at the student's own states, one value per position.

Everything is normalised over the whole allowed vocabulary, then compared on O outcomes: the U ids of a support that
both sides can write and, unless renormalised, one tail that holds the rest of each side's mass. The sum over positions,
divided by the trained positions of all ranks, is the caller's job; nothing here knows a process group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

import torch
from torch.utils.checkpoint import checkpoint

from opd.support import FAR, NUM_EXTRA, TAIL_FLOOR, log_tail, narrow_support, union_support

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


# -- the entry --


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
    check_keys(config, teacher)
    names = TEACHER_FIELDS + (("full_logprobs_BTV",) if config.kind == "full_kl" else ())
    fields: Fields = {name: teacher[name] for name in names}
    fields |= {"response_ids_N": response_ids_N, "rollout_logprobs_N": rollout_logprobs_N}
    fields["candidate_ids_NC"] = candidate_ids_NC
    for name, value in fields.items():
        assert value.shape[0] == logits_NV.shape[0], f"{name} has another number of positions than the logits"
    rows = partial(_loss_of_rows, blocked_V=blocked_V, eos_id=eos_id, config=config)
    if mask_N is None:
        return _in_chunks(rows, logits_NV, fields, config.chunk_size)
    kept = {name: value[mask_N] for name, value in fields.items()}
    loss_n, diagnostics = _in_chunks(rows, logits_NV[mask_N], kept, config.chunk_size)
    return _spread(loss_n, mask_N), {name: _spread(value, mask_N) for name, value in diagnostics.items()}


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


# -- one chunk --


def _loss_of_rows(
    logits_NV: torch.Tensor, fields: Fields, *, blocked_V: torch.Tensor | None, eos_id: int, config: LossKeys
) -> tuple[torch.Tensor, Fields]:
    """Loss and diagnostics of one chunk."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    fields = {name: value.to(dtype) if value.is_floating_point() else value for name, value in fields.items()}
    logits_NV = logits_NV.to(dtype)
    if blocked_V is not None:
        logits_NV = logits_NV.masked_fill(blocked_V, float("-inf"))
    log_q_NV = (logits_NV / config.temperature).log_softmax(-1)
    log_q_N = log_q_NV.gather(-1, fields["response_ids_N"][:, None])[:, 0]
    # An id the teacher cannot write would be infinitely bad: the floor bounds it.
    log_p_N = fields["candidate_logprobs_BTC"][:, -NUM_EXTRA].clamp(min=TAIL_FLOOR)
    outcomes = _outcomes(log_q_NV, fields, config)
    if config.kind == "sampled_kl":
        loss_N = sampled_kl(log_p_N, log_q_N, fields["rollout_logprobs_N"], config.max_importance)
    else:
        compared = _renormalized(*outcomes) if config.renormalize else outcomes
        loss_N = LOSSES[config.kind](*compared, config.beta)
    with torch.no_grad():
        diagnostics = {
            **_diagnostics(*outcomes, fields),
            **_estimates(log_p_N, log_q_N),
            "student_eos": log_q_NV[:, eos_id].exp(),
            "teacher_eos": fields["candidate_logprobs_BTC"][:, -1].exp(),
        }
    return loss_N * config.temperature**2, diagnostics


def _outcomes(
    log_q_NV: torch.Tensor, fields: Fields, config: LossKeys
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p, log q and valid over the outcomes, the tail being the last: (N, U + 1) each.

    Where an outcome is not valid both logs are 0, so that nothing computed from them is infinite.
    """
    if config.kind == "full_kl":
        log_p_NU = fields["full_logprobs_BTV"]
        ids_NU = torch.arange(log_q_NV.shape[-1], device=log_q_NV.device).expand_as(log_q_NV)
        valid_NU = log_p_NU > float("-inf")
    else:
        ids = narrow_support(config.support, fields["candidate_ids_NC"], fields["topk_ids_BTK"])
        logprobs = narrow_support(config.support, fields["candidate_logprobs_BTC"], fields["topk_logprobs_BTK"])
        ids_NU, valid_NU = union_support(*ids, logprobs[0] > float("-inf"))
        log_p_NU = torch.cat(logprobs, dim=-1)
    log_q_NU = log_q_NV.gather(-1, ids_NU)
    shared_NU = valid_NU & (log_q_NU > float("-inf"))
    # The teacher's tail knows nothing of ids that only the student blocks: their mass joins it here.
    blocked_only_N = log_p_NU.masked_fill(~valid_NU | shared_NU, FAR).logsumexp(-1)
    log_p_tail_N = torch.logaddexp(fields["tail_logprob_BT"], blocked_only_N).clamp(min=TAIL_FLOOR)
    log_q_tail_N = log_tail(log_q_NV, ids_NU, shared_NU)
    log_p_NO = torch.cat([log_p_NU.masked_fill(~shared_NU, 0.0), log_p_tail_N[:, None]], dim=-1)
    log_q_NO = torch.cat([log_q_NU.masked_fill(~shared_NU, 0.0), log_q_tail_N[:, None]], dim=-1)
    return log_p_NO, log_q_NO, torch.cat([shared_NU, torch.ones_like(shared_NU[:, :1])], dim=-1)


def _renormalized(
    log_p_NO: torch.Tensor, log_q_NO: torch.Tensor, valid_NO: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The paper's form (arXiv 2605.28139): both sides normalised over the support alone, no tail. (N, U) each."""
    valid_NU = valid_NO[:, :-1]

    def normalized(log_NO: torch.Tensor) -> torch.Tensor:
        log_NU = log_NO[:, :-1]
        log_mass_N1 = log_NU.masked_fill(~valid_NU, FAR).logsumexp(-1, keepdim=True)
        return (log_NU - log_mass_N1).masked_fill(~valid_NU, 0.0)

    return normalized(log_p_NO), normalized(log_q_NO), valid_NU


def _diagnostics(log_p_NO: torch.Tensor, log_q_NO: torch.Tensor, valid_NO: torch.Tensor, fields: Fields) -> Fields:
    """What is logged of a support: its size, overlap |S n T| / k (the smaller k), each side's mass on it. (N,) each."""
    valid_NU = valid_NO[:, :-1]
    student_NK, teacher_NK = fields["candidate_ids_NC"][:, :-NUM_EXTRA], fields["topk_ids_BTK"]
    in_both_NK = (teacher_NK[:, :, None] == student_NK[:, None, :]).any(-1)
    least_k = max(1, min(student_NK.shape[1], teacher_NK.shape[1]))
    dtype = log_q_NO.dtype
    return {
        "support_size": valid_NU.sum(-1).to(dtype),
        "overlap": in_both_NK.sum(-1).to(dtype) / least_k,
        "student_mass": log_q_NO[:, :-1].exp().masked_fill(~valid_NU, 0.0).sum(-1),
        "teacher_mass": log_p_NO[:, :-1].exp().masked_fill(~valid_NU, 0.0).sum(-1),
        "unmapped_mass": fields["unmapped_mass_BT"],
        "teacher_entropy": fields["entropy_BT"],
        "kl": kl(log_p_NO, log_q_NO, valid_NO),
    }


def _estimates(log_p_N: torch.Tensor, log_q_N: torch.Tensor) -> Fields:
    """k1 and k3, estimates of KL(q || p) at the written ids. Metrics only: differentiated, k3 gives forward KL."""
    log_ratio_N = (log_p_N - log_q_N).clamp(max=MAX_LOG_RATIO)
    return {"k1": -log_ratio_N, "k3": log_ratio_N.expm1() - log_ratio_N}
