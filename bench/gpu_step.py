"""A whole step of on-policy distillation on one device, ours and made of plain parts, on the same random models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from bench.gpu_models import Size, make_model
from bench.plain_step import divergence, logprobs
from opd.fused import fused_position_loss
from opd.rollout.graphs import GraphSteps
from opd.rollout.speculative import forward_cost, speculate
from opd.schema import LossConfig
from opd.support import candidate_ids, score_support
from opd.types import Rollout

Inputs = dict[str, torch.Tensor]
MICRO_BATCH = 8  # rows of a forward and backward, on both sides
SCORED = 256  # positions whose teacher logits are held at a time


class GpuStep:
    """Student, teacher of the same vocabulary and one AdamW that both sides use in turns.

    written   ids of the last rollout of ours, row by row
    kept_in   where weights and optimizer state are kept
    """

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype, master: bool) -> None:
        """master: float32 copies of the weights, where the model is in a shorter type, and AdamW's state in float32."""
        self.student = make_model(size.decoder, size.whisper, device, dtype)
        self.student.audio_encoder.whisper.embed_positions.requires_grad_(False)
        self.teacher = make_model(size.teacher_decoder, size.teacher_whisper, device, dtype).requires_grad_(False)
        self.steps = GraphSteps(self.student)
        self.trained = [p for p in self.student.parameters() if p.requires_grad]
        self.masters: list[nn.Parameter] | None = None
        if master and dtype != torch.float32:
            self.masters = [nn.Parameter(p.detach().float()) for p in self.trained]
        kept = self.trained if self.masters is None else self.masters
        self.kept_in = str(kept[0].dtype).removeprefix("torch.")
        self.optimizer = torch.optim.AdamW(kept, lr=1e-6, fused=device.type == "cuda")
        self.table = torch.arange(size.decoder["vocab_size"], device=device)
        self.config = LossConfig()
        decoder_size = sum(p.numel() for p in self.student.model.parameters())
        layers = size.decoder["num_hidden_layers"]
        self.cost = forward_cost(decoder_size, layers, device.type, torch.get_num_threads())
        self.written: list[list[int]] = []

    def _update(self, update: bool) -> None:
        if not update:
            self._zero()
            return
        if self.masters is not None:
            for master, parameter in zip(self.masters, self.trained, strict=True):
                master.grad = None if parameter.grad is None else parameter.grad.float()
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], 1.0)
        self.optimizer.step()
        if self.masters is not None:
            with torch.no_grad():
                torch._foreach_copy_(self.trained, self.masters)
        self._zero()

    def _zero(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        for parameter in self.trained:
            parameter.grad = None

    # -- ours --

    def ours(self, inputs: Inputs, arguments: dict[str, Any], drafts: Any, update: bool = True) -> float:
        """Rollout, scores at response positions, fused loss and update; returns the loss."""
        with torch.no_grad():
            rollout, _ = speculate(
                self.student, inputs, steps=self.steps.bind(self.student), drafts=drafts, forward_cost=self.cost,
                **arguments,
            )  # fmt: skip
        mask_BT = rollout.response_mask_BT
        self.written = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids_BT, mask_BT, strict=True)]
        positions, loss = int(mask_BT.sum()), 0.0
        for start in range(0, len(mask_BT), MICRO_BATCH):
            rows = slice(start, start + MICRO_BATCH)
            part = Rollout.from_dict({name: value[rows] for name, value in rollout.to_dict().items()})
            total = self._our_loss({name: tensor[rows] for name, tensor in inputs.items()}, part, arguments)
            (total / positions).backward()
            loss += float(total.detach()) / positions
        self._update(update)
        return loss

    def _our_loss(self, inputs: Inputs, rollout: Rollout, arguments: dict[str, Any]) -> torch.Tensor:
        device, eos_id = inputs["input_ids"].device, arguments["eos_id"]
        keep_BT = rollout.response_mask_BT.to(device)
        ids_BT = rollout.response_ids_BT.to(device)
        candidates_NC = candidate_ids(rollout.topk_ids_BTK.to(device), ids_BT, eos_id)[keep_BT]
        ids_map = SimpleNamespace(student_to_teacher=self.table, teacher_to_student=self.table)
        with torch.no_grad():
            states_ND = self._states(self.teacher, inputs, ids_BT, keep_BT)
            parts = [
                score_support(self.teacher.lm_head(states_nD), candidates_nC, ids_map, top_k=arguments["top_k"])
                for states_nD, candidates_nC in zip(states_ND.split(SCORED), candidates_NC.split(SCORED), strict=True)
            ]
        return fused_position_loss(
            self._states(self.student, inputs, ids_BT, keep_BT),
            self.student.lm_head.weight,
            response_ids_N=ids_BT[keep_BT],
            rollout_logprobs_N=rollout.logprobs_BT.to(device)[keep_BT],
            candidate_ids_NC=candidates_NC,
            teacher={name: torch.cat([part[name] for part in parts]) for name in parts[0]},
            eos_id=eos_id,
            config=self.config,
            blocked_V=None,
        ).total

    @staticmethod
    def _states(model: Any, inputs: Inputs, ids_BT: torch.Tensor, keep_BT: torch.Tensor) -> torch.Tensor:
        """Hidden states that predict the written ids: (N, D)."""
        joined = dict(inputs) | {
            "input_ids": torch.cat([inputs["input_ids"], ids_BT], dim=1),
            "attention_mask": torch.cat([inputs["attention_mask"], keep_BT.long()], dim=1),
        }
        hidden_BLD = model.model(**model.decoder_inputs(**joined), use_cache=False).last_hidden_state
        return hidden_BLD[:, -ids_BT.shape[1] - 1 : -1][keep_BT]

    # -- plain parts --

    def plain(self, inputs: Inputs, arguments: dict[str, Any], update: bool = True) -> float:
        """`generate`, logits of both models at all positions, log-softmax, gather, update; returns the loss."""
        eos_id = arguments["eos_id"]
        with torch.no_grad():
            ids_BL = self.student.generate(
                **inputs, max_new_tokens=arguments["max_new_tokens"], do_sample=False, eos_token_id=eos_id,
                pad_token_id=arguments["pad_id"],
            )  # fmt: skip
        ids_BT = ids_BL[:, inputs["input_ids"].shape[1] :]
        ended_BT = (ids_BT == eos_id).long().cumsum(1)
        mask_BT = (ended_BT == 0) | ((ids_BT == eos_id) & (ended_BT == 1))
        positions, loss = int(mask_BT.sum()), 0.0
        for start in range(0, len(ids_BT), MICRO_BATCH):
            rows = slice(start, start + MICRO_BATCH)
            part = {name: tensor[rows] for name, tensor in inputs.items()}
            blocked_V = arguments["blocked_V"]
            with torch.no_grad():
                log_p_BTV = logprobs(self.teacher, part, ids_BT[rows], mask_BT[rows], blocked_V)
            log_q_BTV = logprobs(self.student, part, ids_BT[rows], mask_BT[rows], blocked_V)
            tables = (self.table, self.table)
            loss_BT = divergence(log_p_BTV, log_q_BTV, ids_BT[rows], tables, eos_id, arguments["top_k"])
            total = loss_BT[mask_BT[rows]].sum()
            (total / positions).backward()
            loss += float(total.detach()) / positions
        self._update(update)
        return loss
