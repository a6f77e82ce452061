"""What the student is trained on: micro-batches of both stages and the loss over their positions.

An objective takes (module, micro-batch) and returns the loss summed over the micro-batch's positions and sums for the
metrics. Dividing by the positions of all ranks is the engine's job.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from data.buckets import rows_by_budget
from opd.fused import FusedLoss, fused_cross_entropy, fused_position_loss
from opd.schema import LossConfig, RolloutConfig, TrainConfig
from opd.support import candidate_ids
from opd.types import Rollout, TeacherScore

Sums = dict[str, torch.Tensor]


@dataclass
class MicroBatch:
    """Model inputs over prompt + response, the trained positions, and what they are trained on."""

    inputs: dict[str, torch.Tensor]
    response_ids_BT: torch.Tensor
    trained_BT: torch.Tensor
    rollout: Rollout | None = None
    score: TeacherScore | None = None
    eos_last_BT: torch.Tensor | None = None

    @property
    def num_positions(self) -> int:
        return int(self.trained_BT.sum())

    def untrained(self) -> MicroBatch:
        """A row of this of which nothing is trained or counted: for a rank that has fewer micro-batches than others."""
        one = {name: value[:1] for name, value in self.inputs.items()}
        rollout, score = self.rollout, self.score
        if rollout is not None and score is not None:
            rollout = Rollout.from_dict({name: value[:1] for name, value in rollout.to_dict().items()})
            rollout.response_mask_BT = torch.zeros_like(rollout.response_mask_BT)
            score = TeacherScore.from_dict({name: value[:1] for name, value in score.to_dict().items()})
        nothing = torch.zeros_like(self.trained_BT[:1])
        return MicroBatch(one, self.response_ids_BT[:1], nothing, rollout, score, nothing.cpu())


def micro_batch_rows(lengths: Sequence[int], config: TrainConfig) -> list[list[int]]:
    """Which rows of a rank's shard make a micro-batch, by their positions (audio, prompt and response)."""
    if config.micro_batch_tokens:
        return rows_by_budget(lengths, config.micro_batch_tokens)
    size, rows = config.micro_batch_size, list(range(len(lengths)))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def join_response(
    prompts: dict[str, torch.Tensor], rows: Sequence[int], ids_BT: torch.Tensor, mask_BT: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Inputs of prompt + response for some rows of a batch of prompts, without padding that only other rows need.

    prompts   may have `encoded_BED` and `encoded_mask_BE`, what a frozen encoder made of the audio, in place of audio
    """
    device = prompts["attention_mask"].device
    index = torch.tensor(rows, device=device)
    mask_BP = prompts["attention_mask"][index]
    start = mask_BP.shape[1] - int(mask_BP.sum(1).max())
    inputs = {
        "input_ids": torch.cat([prompts["input_ids"][index, start:], ids_BT.to(device)], dim=1),
        "attention_mask": torch.cat([mask_BP[:, start:], mask_BT.to(device, mask_BP.dtype)], dim=1),
    }
    if "encoded_BED" in prompts:
        frames = int(prompts["encoded_mask_BE"][index].sum(1).max())
        inputs |= {name: prompts[name][index, :frames] for name in ("encoded_BED", "encoded_mask_BE")}
        return inputs
    frames = int(prompts["audio_mask"][index].sum(1).max())
    return inputs | {
        "audios": prompts["audios"][index, :, :frames],
        "audio_mask": prompts["audio_mask"][index, :frames],
    }


def opd_micro_batch(
    prompts: dict[str, torch.Tensor],
    rows: Sequence[int],
    rollout: Rollout,
    score: TeacherScore,
    config: RolloutConfig,
    device: torch.device,
) -> MicroBatch:
    """A scored rollout as a micro-batch. Trained: written positions that the teacher could score, loops cut off."""
    trained_BT = rollout.response_mask_BT & score.aligned_mask_BT
    if not config.train_on_loops:
        trained_BT = trained_BT & (torch.arange(trained_BT.shape[1]) < rollout.loop_start_B[:, None])
    positions_T = torch.arange(trained_BT.shape[1])
    last_B = rollout.response_mask_BT.sum(1, keepdim=True) - 1
    return MicroBatch(
        inputs=join_response(prompts, rows, rollout.response_ids_BT, rollout.response_mask_BT),
        response_ids_BT=rollout.response_ids_BT.to(device),
        trained_BT=trained_BT.to(device),
        rollout=rollout,
        score=score,
        eos_last_BT=(positions_T == last_B) & rollout.finished_B[:, None] & trained_BT,
    )


def opd_objective(config: LossConfig, blocked_V: torch.Tensor, eos_id: int) -> Any:
    """The divergence between teacher and student at the student's own states (method: fused_position_loss)."""

    def objective(module: nn.Module, micro: MicroBatch) -> tuple[torch.Tensor, Sums]:
        rollout, score, keep = micro.rollout, micro.score, micro.trained_BT.cpu()
        assert rollout is not None and score is not None and micro.eos_last_BT is not None
        candidates_BTC = candidate_ids(rollout.topk_ids_BTK, rollout.response_ids_BT, eos_id)

        def head(hidden_BLD: torch.Tensor, weight_VD: torch.Tensor) -> FusedLoss:
            device = hidden_BLD.device
            return fused_position_loss(
                _trained_states(hidden_BLD, micro),
                weight_VD,
                response_ids_N=rollout.response_ids_BT[keep].to(device),
                rollout_logprobs_N=rollout.logprobs_BT[keep].to(device),
                candidate_ids_NC=candidates_BTC[keep].to(device),
                teacher={name: value[keep].to(device) for name, value in score.to_dict().items()},
                blocked_V=blocked_V,
                eos_id=eos_id,
                config=config,
            )

        loss = module(head, **micro.inputs)[0]
        device = loss.total.device
        sums = {name: value.sum() for name, value in loss.diagnostics.items()}
        at_end_N = micro.eos_last_BT[keep].to(device)
        for side in ("student", "teacher"):
            if f"{side}_eos" in loss.diagnostics:
                sums[f"{side}_eos_at_end"] = loss.diagnostics[f"{side}_eos"][at_end_N].sum()
        counts = {
            "ends": at_end_N,
            "written": rollout.response_mask_BT,
            "unaligned": rollout.response_mask_BT & ~score.aligned_mask_BT,
            "in_loops": rollout.response_mask_BT & score.aligned_mask_BT & ~keep,
        }
        sums |= {name: mask.sum().to(device) for name, mask in counts.items()}
        return loss.total, sums

    return objective


def _trained_states(hidden_BLD: torch.Tensor, micro: MicroBatch) -> torch.Tensor:
    """Hidden states that predict the trained positions: (N, D)."""
    length = micro.trained_BT.shape[1]
    return hidden_BLD[:, -length - 1 : -1][micro.trained_BT]


def response_ids(text: str | None, tokenizer: Any) -> list[int]:
    """Ids of a given text and EOS; none for None (bad audio)."""
    return [] if text is None else [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def sft_micro_batch(
    prompts: dict[str, torch.Tensor], rows: Sequence[int], ids: list[list[int]], pad_id: int
) -> MicroBatch:
    """References as a micro-batch: `ids` are those of each row's text and EOS, none where nothing is trained (bad audio)."""
    length = max(1, max(len(row) for row in ids))
    ids_BT = torch.tensor([row + [pad_id] * (length - len(row)) for row in ids])
    mask_BT = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in ids])
    device = prompts["input_ids"].device
    return MicroBatch(join_response(prompts, rows, ids_BT, mask_BT), ids_BT.to(device), mask_BT.to(device))


def sft_objective(config: LossConfig, blocked_V: torch.Tensor, blank_id: int) -> Any:
    """Cross-entropy of the references over the allowed vocabulary and, with a weight, the CTC aid on the encoder."""

    def objective(module: nn.Module, micro: MicroBatch) -> tuple[torch.Tensor, Sums]:
        def head(hidden_BLD: torch.Tensor, weight_VD: torch.Tensor) -> FusedLoss:
            return fused_cross_entropy(
                _trained_states(hidden_BLD, micro),
                weight_VD,
                micro.response_ids_BT[micro.trained_BT],
                blocked_V=blocked_V,
                chunk_size=config.chunk_size,
            )

        with_ctc = config.ctc_weight > 0
        cross_entropy, ctc_BFV, frame_mask_BF = module(head, with_ctc=with_ctc, **micro.inputs)
        loss = cross_entropy.total
        sums = {"ce": loss, "correct": cross_entropy.diagnostics["correct"].sum()}
        if with_ctc:
            assert ctc_BFV is not None and frame_mask_BF is not None
            ctc = _ctc_loss(ctc_BFV, frame_mask_BF, micro, blank_id)
            loss = loss + config.ctc_weight * ctc
            sums["ctc"] = ctc
        return loss, sums

    return objective


def _ctc_loss(ctc_BFV: torch.Tensor, frame_mask_BF: torch.Tensor, micro: MicroBatch, blank_id: int) -> torch.Tensor:
    """CTC summed over utterances, its targets being the response without EOS.

    Too little audio for a text counts 0, and so does a row that is not trained at all (bad audio).
    """
    positions_B = micro.trained_BT.sum(1)
    loss_B = functional.ctc_loss(
        ctc_BFV.float().log_softmax(-1).transpose(0, 1),
        micro.response_ids_BT,
        frame_mask_BF.sum(1).long(),
        (positions_B - 1).clamp(min=0),
        blank=blank_id,
        reduction="none",
        zero_infinity=True,
    )
    return loss_B.masked_fill(positions_B == 0, 0.0).sum()
