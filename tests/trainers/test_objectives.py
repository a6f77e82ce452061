"""Which positions are trained, and that cutting padding from a micro-batch changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import ranks  # noqa: F401  sets the environment that verl is imported under
import torch

from opd.arkasr import load_model, load_processor
from opd.schema import RolloutConfig
from opd.types import Rollout, TeacherScore
from trainers.objectives import join_response, opd_micro_batch, response_ids, sft_micro_batch, sft_objective
from trainers.trained_student import TrainedStudent

CPU = torch.device("cpu")


def rollout_of(rows: list[list[int]], loop_start: list[int], finished: list[bool], pad: int = 0) -> Rollout:
    length = max(len(row) for row in rows)
    ids_BT = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    mask_BT = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return Rollout(
        ids_BT, mask_BT, ids_BT[..., None].repeat(1, 1, 3), torch.zeros(ids_BT.shape), torch.tensor(finished),
        torch.tensor(loop_start), torch.tensor([not row for row in rows]),
    )  # fmt: skip


def score_of(rollout: Rollout, aligned_BT: torch.Tensor) -> TeacherScore:
    zeros_BT = torch.zeros(aligned_BT.shape)
    return TeacherScore(
        rollout.topk_ids_BTK, torch.zeros(rollout.topk_ids_BTK.shape), torch.zeros(*aligned_BT.shape, 5), zeros_BT,
        zeros_BT, zeros_BT, aligned_BT,
    )  # fmt: skip


def test_loops_unaligned_positions_and_bad_audio_are_left_out(tiny_dir: Path, waveforms: list[np.ndarray]) -> None:
    prompts = load_processor(tiny_dir).build_inputs(waveforms[:4])
    eos = 9
    rollout = rollout_of([[5, 6, 6, 6], [5, 6, eos], [eos], []], [2, 4, 4, 4], [False, True, True, False])
    aligned_BT = rollout.response_mask_BT.clone()
    aligned_BT[1, 2] = False
    score = score_of(rollout, aligned_BT)
    micro = opd_micro_batch(prompts, range(4), rollout, score, RolloutConfig(), CPU)
    assert micro.trained_BT.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert micro.num_positions == 5
    assert micro.eos_last_BT is not None
    assert micro.eos_last_BT.int().tolist() == [[0] * 4, [0] * 4, [1, 0, 0, 0], [0] * 4], "an empty response trains EOS"
    whole = opd_micro_batch(prompts, range(4), rollout, score, RolloutConfig(train_on_loops=True), CPU)
    assert whole.trained_BT[0].all()


def test_cutting_padding_changes_no_logit(tiny_dir: Path, waveforms: list[np.ndarray]) -> None:
    model, processor = load_model(tiny_dir), load_processor(tiny_dir)
    clips = sorted(waveforms, key=len)
    prompts = processor.build_inputs(clips)
    ids_BT, mask_BT = torch.tensor([[5, 6, 7]]), torch.ones(1, 3, dtype=torch.bool)
    rows = [0]  # the shortest clip among longer ones: padding on all sides
    cut = join_response(prompts, rows, ids_BT, mask_BT)
    alone = join_response(processor.build_inputs(clips[:1]), rows, ids_BT, mask_BT)
    assert {name: tuple(t.shape) for name, t in cut.items()} == {name: tuple(t.shape) for name, t in alone.items()}
    assert cut["input_ids"].shape[1] < prompts["input_ids"].shape[1] + 3
    torch.testing.assert_close(model(**cut).logits, model(**alone).logits, atol=1e-5, rtol=0)


def test_references_end_in_eos_and_an_empty_micro_batch_runs_backward(
    tiny_dir: Path, waveforms: list[np.ndarray]
) -> None:
    from opd.schema import LossConfig

    model, processor = load_model(tiny_dir), load_processor(tiny_dir)
    tokenizer, vocab_size = processor.tokenizer, model.config.vocab_size
    prompts = processor.build_inputs(waveforms[:2])
    micro = sft_micro_batch(
        prompts, range(2), [response_ids(t, tokenizer) for t in ("one two", None)], tokenizer.pad_token_id
    )
    expected = [*tokenizer("one two", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert micro.response_ids_BT[0].tolist() == expected
    assert micro.trained_BT.sum(1).tolist() == [len(expected), 0]
    student = TrainedStudent(model, vocab_size)
    blocked_V = torch.zeros(vocab_size, dtype=torch.bool)
    objective = sft_objective(LossConfig(ctc_weight=0.5), blocked_V, tokenizer.pad_token_id)
    empty = sft_micro_batch(prompts, range(2), [[], []], tokenizer.pad_token_id)
    assert empty.num_positions == 0
    loss, _ = objective(student, empty)
    loss.backward()
    assert all(p.grad is None or bool((p.grad == 0).all()) for p in student.parameters())
