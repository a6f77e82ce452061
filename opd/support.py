"""The ids a divergence runs over: candidates, union supports as tensors, and the mass outside them.

Both sides use the functions here: the teacher's worker (`score_support`) and the loss, so that they agree on what is
inside a support and what is in its tail.
"""

from __future__ import annotations

from typing import Protocol

import torch

SUPPORTS = ("union", "student", "teacher")
NUM_EXTRA = 2  # candidates behind the student's top-k: the written id, then EOS
TAIL_FLOOR = -100.0  # log of the least tail: below what any probability here resolves, and reverse KL stays finite
FAR = -1e30  # stands for log 0 where -inf would give a gradient of NaN


class IdMap(Protocol):
    """The two tables of `opd.vocab.TokenMap`; -1 where an id has no counterpart."""

    student_to_teacher: torch.Tensor
    teacher_to_student: torch.Tensor


def candidate_ids(topk_ids_BTK: torch.Tensor, response_ids_BT: torch.Tensor, eos_id: int) -> torch.Tensor:
    """The ids the teacher is asked about: student top-k, written id, EOS. (B, T, C = K + 2) int64; EOS is always in."""
    eos_BT1 = torch.full_like(response_ids_BT, eos_id)[..., None]
    return torch.cat([topk_ids_BTK, response_ids_BT[..., None], eos_BT1], dim=-1)


def check_top_k(top_k: int, blocked_V: torch.Tensor) -> None:
    """Raises ValueError where the student has fewer ids that may be written than loss.top_k asks for."""
    allowed, vocab_size = int((~blocked_V).sum()), len(blocked_V)
    if top_k > allowed:
        raise ValueError(
            f"loss.top_k={top_k}: the student's vocabulary has {vocab_size} ids, of which {allowed} may be written; set it "
            f"to {allowed} or less"
        )


def narrow_support(
    support: str, candidates_NC: torch.Tensor, topk_NK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidate and teacher columns that a kind of support uses; written id and EOS stay in every kind.

    Works on ids and on their log-probabilities alike. Raises ValueError for an unknown kind.
    """
    if support not in SUPPORTS:
        raise ValueError(f"loss.support={support}: must be one of {', '.join(SUPPORTS)}")
    if support == "student":
        return candidates_NC, topk_NK[:, :0]
    if support == "teacher":
        return candidates_NC[:, -NUM_EXTRA:], topk_NK
    return candidates_NC, topk_NK


def union_support(
    candidate_ids_NC: torch.Tensor, teacher_topk_ids_NK: torch.Tensor, candidate_mapped_NC: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates followed by the teacher's top-k, all in one vocabulary: ids (N, U) and valid (N, U), U = C + K.

    Valid marks the first occurrence of each id that both vocabularies have. An id of -1 is never valid. Ids that are
    not valid are set to 0, so they can be gathered.
    """
    mapped_NU = torch.cat([candidate_mapped_NC, teacher_topk_ids_NK >= 0], dim=-1)
    ids_NU = torch.cat([candidate_ids_NC, teacher_topk_ids_NK], dim=-1).masked_fill(~mapped_NU, -1)
    sorted_NU, order_NU = ids_NU.sort(dim=-1, stable=True)
    first_sorted_NU = torch.ones_like(mapped_NU)
    first_sorted_NU[:, 1:] = sorted_NU[:, 1:] != sorted_NU[:, :-1]
    first_NU = torch.zeros_like(mapped_NU).scatter_(-1, order_NU, first_sorted_NU)
    valid_NU = first_NU & (ids_NU >= 0)
    return ids_NU.masked_fill(~valid_NU, 0), valid_NU


def inside_mask(ids_NU: torch.Tensor, valid_NU: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The support as a mask over the vocabulary: (N, V) bool."""
    # Entries that are not valid go to a spare column: their id may belong to a valid entry of the same row.
    target_NU = torch.where(valid_NU, ids_NU, vocab_size)
    mask_NV = torch.zeros(ids_NU.shape[0], vocab_size + 1, dtype=torch.bool, device=ids_NU.device)
    return mask_NV.scatter_(-1, target_NU, True)[:, :vocab_size]


def log_rest(log_NV: torch.Tensor, ids_NU: torch.Tensor, valid_NU: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp over the ids outside the support, at least FAR: (N,), differentiable. -inf entries are fine."""
    inside_NV = inside_mask(ids_NU, valid_NU, log_NV.shape[-1])
    return log_NV.masked_fill(inside_NV, FAR).logsumexp(-1).clamp(min=FAR)


def log_tail(probs_NV: torch.Tensor, ids_NU: torch.Tensor, valid_NU: torch.Tensor) -> torch.Tensor:
    """Log of the mass outside the support, never below TAIL_FLOOR: (N,). Takes that of the support out of `probs_NV`.

    The sum runs over the ids outside, as 1 - (mass inside) loses a small tail to rounding: in float32 everything below
    1e-7.
    """
    inside_NU = probs_NV.gather(-1, ids_NU).masked_fill_(~valid_NU, 0.0)
    # Adding: the id of an entry that is not valid may belong to a valid entry of the same row.
    outside_NV = probs_NV.scatter_add_(-1, ids_NU, -inside_NU)
    return outside_NV.sum(-1).log().clamp(min=TAIL_FLOOR)


@torch.no_grad()
def score_support(
    logits_NV: torch.Tensor,
    candidate_ids_NC: torch.Tensor,
    token_map: IdMap,
    *,
    top_k: int,
    temperature: float = 1.0,
    support: str = "union",
    full: bool = False,
    chunk_size: int = 256,
) -> dict[str, torch.Tensor]:
    """What a teacher says at N positions: the fields of `TeacherScore`, flattened over N and without the aligned mask.

    logits_NV         over the teacher's vocabulary, blocked ids -inf
    candidate_ids_NC  *student* ids, as from `candidate_ids`
    token_map         see `opd.vocab.TokenMap`
    full              adds full_logprobs over the student's vocabulary; the tail is then the mass on unmapped ids

    Log-probabilities are over the teacher's whole allowed vocabulary, after dividing the logits by the temperature;
    the tail is all the mass outside the support, unmapped ids included. float64 for float64 logits, else float32.
    """
    to_teacher_V = token_map.student_to_teacher.to(logits_NV.device)
    to_student_V = token_map.teacher_to_student.to(logits_NV.device)
    assert logits_NV.shape[-1] == to_student_V.shape[0], "the token map was built for another teacher vocabulary"
    parts = [
        _score_rows(logits_nV, candidates_nC, to_teacher_V, to_student_V, top_k, temperature, support, full)
        for logits_nV, candidates_nC in zip(
            logits_NV.split(chunk_size), candidate_ids_NC.split(chunk_size), strict=True
        )
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _score_rows(
    logits_NV: torch.Tensor,
    candidate_ids_NC: torch.Tensor,
    to_teacher_V: torch.Tensor,
    to_student_V: torch.Tensor,
    top_k: int,
    temperature: float,
    support: str,
    full: bool,
) -> dict[str, torch.Tensor]:
    """`score_support` of one chunk of positions."""
    dtype = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
    scaled_NV = logits_NV.to(dtype)
    logprobs_NV = (scaled_NV if temperature == 1 else scaled_NV / temperature).log_softmax(-1)
    candidates_NC = to_teacher_V[candidate_ids_NC]
    mapped_NC = candidates_NC >= 0
    candidate_logprobs_NC = logprobs_NV.gather(-1, candidates_NC.clamp(min=0)).masked_fill(~mapped_NC, float("-inf"))
    topk_logprobs_NK, topk_NK = logprobs_NV.topk(min(top_k, logprobs_NV.shape[-1]), dim=-1)
    # With few allowed ids the top-k reaches into the blocked ones.
    topk_ids_NK = to_student_V[topk_NK].masked_fill(topk_logprobs_NK == float("-inf"), -1)
    fields = {
        "topk_ids_BTK": topk_ids_NK,
        "topk_logprobs_BTK": topk_logprobs_NK,
        "candidate_logprobs_BTC": candidate_logprobs_NC,
    }
    if full:
        full_NV = logprobs_NV[:, to_teacher_V.clamp(min=0)]
        fields["full_logprobs_BTV"] = full_NV.masked_fill(to_teacher_V < 0, float("-inf"))
    probs_NV = logprobs_NV.exp()
    fields["unmapped_mass_BT"] = probs_NV @ (to_student_V < 0).to(dtype)
    # A product of matrices needs no third (N, V); 0 times the clamped logarithm is 0.
    fields["entropy_BT"] = -torch.bmm(probs_NV[:, None], logprobs_NV.clamp_(min=FAR)[..., None])[:, 0, 0]
    if full:
        fields["tail_logprob_BT"] = fields["unmapped_mass_BT"].log().clamp(min=TAIL_FLOOR)
    else:
        columns = narrow_support(support, candidates_NC, topk_NK.masked_fill(topk_ids_NK < 0, -1))
        mapped_NC = mapped_NC[:, -columns[0].shape[1] :]
        fields["tail_logprob_BT"] = log_tail(probs_NV, *union_support(*columns, mapped_NC))
    return fields
