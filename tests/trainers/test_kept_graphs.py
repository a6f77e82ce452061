"""The fixed memory of rollouts, which CUDA graphs are bound to, is kept where the weights stay in their place, and only there."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_steps import make_config, sft_step, start
from ranks import run_ranks  # sets the environment that verl and DeepSpeed are imported under

from data.collate import Collator
from data.manifest import read_manifest
from opd.arkasr import load_processor
from opd.rollout.decode import decode
from opd.rollout.graphs import GraphSteps
from opd.rollout.speculative import speculate
from opd.rollout.steps import DecoderSteps
from opd.schema import Config
from trainers.fsdp2 import FSDP2Engine
from trainers.zero import ZeroEngine


class FixedFSDP2(FSDP2Engine):
    """On a CPU too: without graphs, on the same memory."""

    fixed_memory = True


class FixedZero(ZeroEngine):
    fixed_memory = True


def rollouts(config: Config, manifest: Path) -> dict[str, Any]:
    """Three rollouts with a training step before each; the memory that each ran on, and whether it outlived it."""
    engine = start(config, FixedFSDP2 if config.engine == "fsdp2" else FixedZero)
    processor = load_processor(engine.path)
    utterances = read_manifest(manifest)[:4]
    inputs = processor.build_inputs(Collator().collate(utterances)[0])
    arguments: dict[str, Any] = {
        "eos_id": processor.tokenizer.eos_token_id, "pad_id": 0, "max_new_tokens": 8, "top_k": 2,
        "blocked_V": torch.zeros(engine.model_config.vocab_size, dtype=torch.bool),
    }  # fmt: skip
    used, kept, same, written = [], [], [], []
    for _ in range(3):
        sft_step(engine, manifest, 4)
        with engine.generation_mode():
            steps = engine.decoder_steps()
            fixed, _ = speculate(engine.generate_forward, inputs, steps=steps, drafts=None, **arguments)
            plain = decode(engine.generate_forward, inputs, **arguments)
        used.append(steps)
        kept.append(engine._graph_steps is not None)
        same.append(torch.equal(fixed.response_ids_BT, plain.response_ids_BT))
        written.append(fixed.logprobs_BT[0, 0].item())
    with contextlib.suppress(ValueError), engine.generation_mode():
        engine.decoder_steps()
        raise ValueError("a rollout that fails")
    return {
        "is_one": len({id(steps) for steps in used}) == 1, "kept": kept, "same": same, "moved": len(set(written)) == 3,
        "after_failure": engine._graph_steps is not None, "is_fixed": all(isinstance(s, GraphSteps) for s in used),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "stage", "lora", "is_kept"),
    [("fsdp2", 2, 0, False), ("deepspeed", 1, 0, True), ("deepspeed", 2, 0, True), ("deepspeed", 2, 4, False),
     ("deepspeed", 3, 0, False)],
)  # fmt: skip
def test_kept_where_the_weights_stay(
    tiny_dir: Path, speech: dict[str, Path], engine: str, stage: int, lora: int, is_kept: bool
) -> None:
    config = make_config(tiny_dir, engine=engine, lora={"rank": lora})
    config = dataclasses.replace(config, zero=dataclasses.replace(config.zero, stage=stage))
    found = run_ranks(1, rollouts, config, speech["train"])[0]
    assert found["same"] == [True] * 3  # of the weights as they are now, wherever they lie
    assert found["moved"]
    assert found["is_fixed"]
    assert found["kept"] == [is_kept] * 3
    assert found["is_one"] is is_kept
    assert not found["after_failure"]


def without_graphs(config: Config) -> bool:
    engine = start(config)
    with engine.generation_mode():
        return type(engine.decoder_steps()) is DecoderSteps


def test_a_cpu_takes_memory_that_grows(tiny_dir: Path) -> None:
    assert run_ranks(1, without_graphs, make_config(tiny_dir)) == [True]
