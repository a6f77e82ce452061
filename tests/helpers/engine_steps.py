"""An engine of the student on this rank, and one SFT step of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ranks  # noqa: F401  sets the environment that verl is imported under

from data.collate import Collator
from data.manifest import read_manifest
from opd.arkasr import blocked_token_ids, load_processor
from opd.config import config_from_dict
from opd.schema import Config, TrainConfig
from opd.vocab import blocked_mask
from trainers.fsdp2 import FSDP2Engine
from trainers.objectives import micro_batch_rows, response_ids, sft_micro_batch, sft_objective


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
