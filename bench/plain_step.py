"""The other side of bench.step: a step of on-policy distillation made of plain parts of torch and transformers.

It shares no code of the method with ours: no rollout, no loss, no support and no teacher of `opd`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from opd.arkasr import load_model, load_processor
from opd.schema import Config

Inputs = dict[str, torch.Tensor]

if TYPE_CHECKING:
    from bench.step import Step


def token_tables(
    student: Any, teacher: Any, blocked_V: torch.Tensor, teacher_blocked_V: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's id of each of the student's and the other way round, by the tokens' strings; -1 where there is none."""
    to_teacher_V, to_student_V = torch.full(blocked_V.shape, -1), torch.full(teacher_blocked_V.shape, -1)
    theirs, unwritten, unread = teacher.get_vocab(), blocked_V.tolist(), teacher_blocked_V.tolist()
    for token, index in student.get_vocab().items():
        other = theirs.get(token)
        if other is not None and not unwritten[index] and not unread[other]:
            to_teacher_V[index], to_student_V[other] = other, index
    return to_teacher_V, to_student_V


class PlainSide:
    """Student, teacher and optimizer of the other side.

    Where a response has an id that the teacher's tokenizer lacks, a step raises SystemExit: plain parts cannot score it.
    """

    def __init__(self, config: Config, blocked_V: torch.Tensor, teacher_blocked_V: torch.Tensor) -> None:
        """blocked_V, teacher_blocked_V: ids that student and teacher may not write."""
        from bench.step import make_optimizer

        self.config = config
        self.model = load_model(config.student.path, attn_implementation=config.student.attn_implementation)
        self.model.audio_encoder.whisper.embed_positions.requires_grad_(False)  # read by nothing
        self.teacher = load_model(config.teacher.path, attn_implementation=config.teacher.attn_implementation).eval()
        student, teacher = (load_processor(part.path).tokenizer for part in (config.student, config.teacher))
        self.eos_id, self.pad_id = student.eos_token_id, student.pad_token_id
        self.optimizer, self.scheduler = make_optimizer(self.model, config)
        self.blocked_V, self.teacher_blocked_V = blocked_V, teacher_blocked_V
        self.tables = token_tables(student, teacher, blocked_V, teacher_blocked_V)

    @torch.no_grad()
    def copy_weights(self, model: torch.nn.Module) -> None:
        for own, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            own.copy_(theirs)

    def step(self, inputs: Inputs, teacher_inputs: Inputs, update: bool) -> Step:
        """One step; without `update` it ends with the gradients."""
        from bench.step import Clock, Step, apply_update

        clock, config = Clock(), self.config
        self.model.eval()
        with torch.no_grad():
            ids_BL = self.model.generate(
                **inputs, max_new_tokens=config.rollout.max_new_tokens, do_sample=False,
                eos_token_id=self.eos_id, pad_token_id=self.pad_id,
            )  # fmt: skip
        ids_BT = ids_BL[:, inputs["input_ids"].shape[1] :]
        ended_BT = (ids_BT == self.eos_id).long().cumsum(1)
        mask_BT = (ended_BT == 0) | ((ids_BT == self.eos_id) & (ended_BT == 1))
        clock.lap("rollout")
        teacher_ids_BT = self.tables[0][ids_BT].masked_fill(~mask_BT, 0)
        if bool((teacher_ids_BT < 0).any()):
            raise SystemExit("a response does not map into the teacher's vocabulary")
        with torch.no_grad():
            log_p_BTW = logprobs(self.teacher, teacher_inputs, teacher_ids_BT, mask_BT, self.teacher_blocked_V)
        clock.lap("teacher")
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()
        log_q_BTV = logprobs(self.model, inputs, ids_BT, mask_BT, self.blocked_V)
        loss_BT = divergence(log_p_BTW, log_q_BTV, ids_BT, self.tables, self.eos_id, config.loss.top_k)
        loss = loss_BT[mask_BT].sum() / mask_BT.sum()
        loss.backward()
        if update:
            apply_update(self.model, self.optimizer, self.scheduler, config)
        clock.lap("update")
        return Step(ids_BT, float(loss.detach()), clock.seconds, clock.cpu_seconds)


def divergence(
    log_p_BTW: torch.Tensor,
    log_q_BTV: torch.Tensor,
    ids_BT: torch.Tensor,
    tables: tuple[torch.Tensor, torch.Tensor],
    eos_id: int,
    top_k: int,
) -> torch.Tensor:
    """Forward KL at each position, on both top-k, the written id and EOS, with the rest as one tail: (B, T).

    log_p_BTW is over the teacher's vocabulary; tables are those of `token_tables`. Ids that only one side has are in the
    tail of both.
    """
    to_teacher_V, to_student_W = tables
    eos_BT1 = torch.full_like(ids_BT, eos_id)[..., None]
    teacher_BTK = to_student_W[log_p_BTW.topk(top_k, dim=-1).indices]
    teacher_BTK = torch.where(teacher_BTK < 0, eos_BT1, teacher_BTK)
    student_BTK = log_q_BTV.detach().topk(top_k, dim=-1).indices
    ids_BTU = torch.cat([teacher_BTK, student_BTK, ids_BT[..., None], eos_BT1], dim=-1).sort(-1).values
    teacher_ids_BTU = to_teacher_V[ids_BTU]
    shared_BTU = functional.pad(ids_BTU[..., 1:] != ids_BTU[..., :-1], (1, 0), value=True) & (teacher_ids_BTU >= 0)
    spare = log_p_BTW.shape[-1], log_q_BTV.shape[-1]  # the column of what is not shared
    tails = [
        functional.pad(log_BTV, (0, 1), value=float("-inf"))
        .scatter(-1, torch.where(shared_BTU, index_BTU, last), float("-inf"))
        .logsumexp(-1)
        for log_BTV, index_BTU, last in zip((log_p_BTW, log_q_BTV), (teacher_ids_BTU, ids_BTU), spare, strict=True)
    ]
    log_p_BTU = log_p_BTW.gather(-1, teacher_ids_BTU.clamp(min=0))
    log_q_BTU = log_q_BTV.gather(-1, ids_BTU)
    difference_BTU = (log_p_BTU - log_q_BTU).masked_fill(~shared_BTU, 0.0)
    return (log_p_BTU.exp() * difference_BTU).sum(-1) + tails[0].exp() * (tails[0] - tails[1])


def logprobs(
    model: Any,
    inputs: Inputs,
    ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    blocked_V: torch.Tensor,
    all_positions: bool = False,
) -> torch.Tensor:
    """Log-probabilities of what may be written, at the positions that predict the response: (B, T, V).

    all_positions  normalise where the response is not predicted, too
    """
    joined = dict(inputs) | {
        "input_ids": torch.cat([inputs["input_ids"], ids_BT], dim=1),
        "attention_mask": torch.cat([inputs["attention_mask"], mask_BT.long()], dim=1),
    }
    logits_BLV = model(**joined, use_cache=False).logits.float()
    response = slice(-ids_BT.shape[1] - 1, -1)
    if all_positions:
        return logits_BLV.masked_fill(blocked_V, float("-inf")).log_softmax(-1)[:, response]
    return logits_BLV[:, response].masked_fill(blocked_V, float("-inf")).log_softmax(-1)
