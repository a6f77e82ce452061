"""What a worker does with a part of a micro-batch, and how the parts come together again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tiny_teachers import STUDENT

from data.manifest import read_manifest
from opd.arkasr import load_processor
from opd.rollout.decode import decode
from opd.teachers.merging import merge_scores
from opd.teachers.worker import TeacherWorker
from opd.types import TeacherScore
from opd.vocab import blocked_mask


def test_parts_of_two_teachers_come_together_in_order(make_config: Callable, speech: dict[str, Path]) -> None:
    utterances = read_manifest(speech["eval"])[:5]
    workers = [TeacherWorker(), TeacherWorker()]
    facts = [
        worker.load(make_config(kind), str(STUDENT)) for worker, kind in zip(workers, ("arkasr", "hf"), strict=True)
    ]
    assert facts[0]["vocab_coverage"] > 0.9
    assert facts[0]["versions"]["torch"] == torch.__version__
    assert "English" in facts[1]["languages"]
    arkasr = workers[0].teacher
    student = load_processor(STUDENT)
    rollout = decode(
        arkasr.forward, arkasr.prompts(utterances)[0][1], eos_id=student.tokenizer.eos_token_id,
        pad_id=student.tokenizer.pad_token_id, blocked_V=blocked_mask([], 384), max_new_tokens=6, top_k=8,
    ).to_dict()  # fmt: skip
    rollout["response_ids_BT"] %= 300  # ids that both teachers have a counterpart for, or not
    whole = [worker.score(utterances, rollout) for worker in workers]
    rows = [[1, 4], [0, 2, 3]]
    parts = [
        worker.score([utterances[i] for i in members], rollout, members)
        for worker, members in zip(workers, rows, strict=True)
    ]
    assert parts[0][1]["responses"] == 2
    merged = workers[0].merge(rows, *(part[0] for part in parts))
    assert TeacherScore.from_dict(merged).to_dict().keys() == whole[0][0].keys()
    for own, members in zip(whole, rows, strict=True):
        for name, value in merged.items():
            torch.testing.assert_close(value[members], own[0][name][members], rtol=0, atol=1e-4)


def test_a_teacher_with_fewer_ids_has_a_smaller_top_k() -> None:
    def score(num_rows: int, top_k: int, value: float) -> dict[str, torch.Tensor]:
        return {
            "topk_ids_BTK": torch.full((num_rows, 2, top_k), int(value)),
            "topk_logprobs_BTK": torch.full((num_rows, 2, top_k), -value),
            "entropy_BT": torch.full((num_rows, 2), value),
            "aligned_mask_BT": torch.ones(num_rows, 2, dtype=torch.bool),
        }

    merged = merge_scores([[2], [0, 1]], [score(1, 3, 7.0), score(2, 1, 5.0)])
    assert merged["topk_ids_BTK"][:, 0].tolist() == [[5, -1, -1], [5, -1, -1], [7, 7, 7]]
    inf = float("inf")
    assert merged["topk_logprobs_BTK"][:, 1].tolist() == [[-5, -inf, -inf], [-5, -inf, -inf], [-7, -7, -7]]
    assert merged["entropy_BT"].tolist() == [[5, 5], [5, 5], [7, 7]]
    assert merged["aligned_mask_BT"].all()
