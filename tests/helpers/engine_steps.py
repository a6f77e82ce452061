"""An engine of the student on this rank, and one SFT step of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import ranks  # noqa: F401  sets the environment that verl is imported under
import torch

from data.collate import Collator
from data.manifest import read_manifest
from opd.arkasr import blocked_token_ids, load_processor
from opd.config import config_from_dict
from opd.rollout.decode import decode, split
from opd.schema import Config, TrainConfig
from opd.teachers.arkasr import ArkasrTeacher
from opd.types import Rollout, TeacherScore
from opd.vocab import blocked_mask
from trainers.fsdp2 import FSDP2Engine
from trainers.objectives import (
    micro_batch_rows,
    opd_micro_batch,
    opd_objective,
    response_ids,
    sft_micro_batch,
    sft_objective,
)


def even_rows(num_rows: int, size: int) -> list[list[int]]:
    return micro_batch_rows([1] * num_rows, TrainConfig(micro_batch_size=size))


class LayeredEngine(FSDP2Engine):
    """Every layer a group of its own, as at full size."""

    min_group_numel = 1


def make_config(path: Path, stage: str = "sft", **sections: Any) -> Config:
    """`sections` are laid over what tests need; `engine` may be among them."""
    values: dict[str, Any] = {
        "recipe": "test",
        "stage": stage,
        "student": {"path": str(path)},
        "teacher": {"path": str(path)},
        "data": {"train_manifest": "none"},
        "optim": {"lr": 1e-3, "warmup_steps": 1, "lr_schedule": "constant"},
        "train": {"num_steps": 10},
        "rollout": {"max_new_tokens": 10},
        "loss": {"top_k": 8, "ctc_weight": 0.5 if stage == "sft" else 0.0},
    }
    for name, keys in sections.items():
        values[name] = values.get(name, {}) | keys if isinstance(keys, dict) else keys
    return config_from_dict(values)


def start(config: Config, engine_class: type = FSDP2Engine) -> Any:
    engine = engine_class(config, config.student.path)
    engine.initialize()
    return engine


def sft_step(
    engine: Any, manifest: Path, micro_size: int, batch: slice = slice(0, 8), spoil: float = 1.0
) -> dict[str, float]:
    """One SFT step on this rank's share of a global batch of the manifest, its loss multiplied by `spoil`."""
    utterances = read_manifest(manifest)[batch]
    share = len(utterances) // engine.world_size
    utterances = utterances[engine.rank * share : (engine.rank + 1) * share]
    processor = load_processor(engine.path)
    inputs = processor.build_inputs(Collator().collate(utterances)[0])
    tokenizer = processor.tokenizer
    blocked_V = blocked_mask(
        blocked_token_ids(tokenizer, engine.model_config.vocab_size, tokenizer.eos_token_id),
        engine.model_config.vocab_size,
    )
    micros = [
        sft_micro_batch(
            inputs, rows, [response_ids(utterances[row].text, tokenizer) for row in rows], tokenizer.pad_token_id
        )
        for rows in even_rows(share, micro_size)
    ]
    objective = sft_objective(engine.config.loss, blocked_V, tokenizer.pad_token_id)

    def spoilt(module: Any, micro: Any) -> Any:
        loss, sums = objective(module, micro)
        return loss * spoil, sums

    with engine.train_mode():
        return engine.train_batch(micros, spoilt)


def opd_step(engine: Any, path: Path, manifest: Path, micro_size: int, reuse: bool = False) -> dict[str, float]:
    """Totals of one OPD step on this rank's share of the first eight utterances, in micro-batches of `micro_size`.

    path   the tokenizer's folder
    reuse  the update goes on from what the encoder made for the rollout
    """
    config = engine.config
    utterances = read_manifest(manifest)[:8]
    share = len(utterances) // engine.world_size
    utterances = utterances[engine.rank * share : (engine.rank + 1) * share]
    processor = load_processor(path)
    tokenizer = processor.tokenizer
    vocab_size = engine.model_config.vocab_size
    blocked_V = blocked_mask(blocked_token_ids(tokenizer, vocab_size, tokenizer.eos_token_id), vocab_size)
    inputs = processor.build_inputs(Collator().collate(utterances)[0])
    with engine.generation_mode():
        if reuse:
            inputs = engine.encode(inputs, with_graph=True)
        rollout = decode(
            engine.generate_forward, inputs, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
            blocked_V=blocked_V, max_new_tokens=10, top_k=8,
        )  # fmt: skip
    teacher = ArkasrTeacher(config.to_dict(), str(path))
    micros = []
    lengths_B = inputs["attention_mask"].sum(1) + rollout.response_mask_BT.sum(1)
    micro_rows = micro_batch_rows(lengths_B.tolist(), dataclasses.replace(config.train, micro_batch_size=micro_size))
    for rows, part in zip(micro_rows, split(rollout, micro_rows), strict=True):
        score = teacher.score([utterances[row] for row in rows], part.to_dict())
        trained = Rollout.from_dict(part.to_dict())
        assert torch.equal(trained.response_ids_BT, rollout.response_ids_BT[rows, : part.response_ids_BT.shape[1]])
        micros.append(
            opd_micro_batch(inputs, rows, trained, TeacherScore.from_dict(score), config.rollout, torch.device("cpu"))
        )
        written = part.response_mask_BT
        assert torch.equal(
            micros[-1].inputs["input_ids"][:, -written.shape[1] :][written], part.response_ids_BT[written]
        )
    with engine.train_mode():
        return engine.train_batch(micros, opd_objective(config.loss, blocked_V, tokenizer.eos_token_id))


def assert_same_step(other: tuple[dict, dict], expected: tuple[dict, dict], names: tuple[str, ...]) -> None:
    """Two steps (totals, weights) agree to 1e-5: totals relative to their size, weights as they are."""
    totals = {n: abs(other[0][n] - expected[0][n]) / max(abs(expected[0][n]), 1e-30) for n in names}
    weights = {}
    assert other[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        weights[name] = float((other[1][name] - tensor).abs().max())
    print(
        {name: f"{value:.1e}" for name, value in totals.items()}, f"weights {max(weights.values()):.1e}"
    )  # pytest -rP
    assert max(totals.values()) < 1e-5, totals
    assert max(weights.values()) < 1e-5, max(weights, key=weights.__getitem__)
