"""The memory estimate of `opd.memory` against what a training step on the CPU really takes.

    python -m bench.memory [--json FILE] [--cases plain,...]

Each case is a process of its own that builds a random ARK-ASR of 58 M parameters in the FSDP2 engine (one rank, float32,
one thread) and takes two steps of on-policy distillation on two micro-batches: the rollout (prompt and a few tokens),
forward and backward, the optimizer's step. Measured is the second step's peak of resident memory over what was resident
before the model was built, after a step of a tiny model has loaded what is loaded on first use. The C library is told
to hand large blocks back to the system, else its own reserve would be measured too. The exit status is 1 where estimate
and measurement are more than 15 % apart.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.command import Parser, command

LIMIT = 0.15
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "activation_checkpointing": {"student": {"activation_checkpointing": True}},
    "lora": {"lora": {"rank": 16}},
    "frozen_encoder": {"student": {"freeze": ["encoder"]}},
    "frozen_decoder": {"student": {"freeze": ["decoder"]}},
    "one_micro_batch": {"train": {"batch_size": 4}},
    "one_micro_batch_checkpointed": {"train": {"batch_size": 4}, "student": {"activation_checkpointing": True}},
}
WHISPER = {
    "d_model": 512, "encoder_layers": 5, "encoder_attention_heads": 8, "encoder_ffn_dim": 2048, "num_mel_bins": 80,
    "max_source_positions": 1500,
}  # fmt: skip
SIZES = {
    "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 2048, "whisper": WHISPER,
}  # fmt: skip
VOCAB_SIZE = 32_000
TINY = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 64, "whisper": WHISPER | {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2},
}  # fmt: skip
SECONDS, RESPONSE, WRITTEN = 5.0, 64, 4  # of a row: audio, trained tokens, tokens that the rollout writes


def make_config(folder: str, case: dict[str, dict[str, Any]]) -> Any:
    from opd.config import config_from_dict

    values: dict[str, Any] = {
        "recipe": "memory",
        "stage": "opd",
        "student": {"path": folder},
        "teacher": {"path": folder},
        "data": {"train_manifest": "none", "max_seconds": SECONDS},
        "rollout": {"max_new_tokens": RESPONSE, "draft": "none"},
        "train": {"batch_size": 8, "micro_batch_size": 4},
        "cluster": {"ranks_per_node": 1},
    }
    for section, keys in case.items():
        values[section] = values.get(section, {}) | keys
    return config_from_dict(values)


def prompts(processor: Any, rows: int) -> dict[str, Any]:
    """Noise of the full length; the last row is a little shorter, so that there is padding as in any real batch."""
    import numpy as np

    rng = np.random.default_rng(0)
    clips = [
        rng.normal(0, 0.1, int(16_000 * SECONDS) - 1600 * (row == rows - 1)).astype("float32") for row in range(rows)
    ]
    return processor.build_inputs(clips)


def micro_batches(config: Any, inputs: dict[str, Any], vocab_size: int) -> list[Any]:
    """Scored rollouts of random tokens."""
    import torch

    from opd.types import Rollout, TeacherScore
    from trainers.objectives import opd_micro_batch

    generator = torch.Generator().manual_seed(0)
    size, top_k = config.train.micro_batch_size, config.loss.top_k
    micros = []
    for start in range(0, config.train.batch_size, size):
        shape = (size, RESPONSE)
        ids_BT = torch.randint(300, vocab_size, shape, generator=generator)
        own_BTK = torch.randint(300, vocab_size, (*shape, top_k), generator=generator)
        rollout = Rollout(
            ids_BT, torch.ones(shape, dtype=torch.bool), own_BTK, torch.full(shape, -5.0),
            torch.ones(size, dtype=torch.bool), torch.full((size,), RESPONSE), torch.zeros(size, dtype=torch.bool),
        )  # fmt: skip
        score = TeacherScore(
            torch.randint(300, vocab_size, (*shape, top_k), generator=generator), torch.full((*shape, top_k), -4.0),
            torch.full((*shape, top_k + 2), -9.0), torch.full(shape, -1.5), torch.zeros(shape), torch.ones(shape),
            torch.ones(shape, dtype=torch.bool),
        )  # fmt: skip
        rows = range(start, start + size)
        micros.append(opd_micro_batch(inputs, rows, rollout, score, config.rollout, torch.device("cpu")))
    return micros


def take_step(engine: Any, inputs: dict[str, Any], config: Any, peaks: dict[str, int]) -> None:
    """Rollout and update; the peak of each goes into `peaks`."""
    import torch

    from bench.loss import peak_bytes, reset_peak
    from opd.rollout.speculative import speculate
    from trainers.objectives import opd_objective

    vocab_size, eos_id = engine.model_config.vocab_size, engine.model_config.eos_token_id
    blocked_V = torch.zeros(vocab_size, dtype=torch.bool)
    reset_peak()
    inputs = dict(inputs)
    encoded_once = engine.encodes_once(config.train.batch_size)
    with engine.generation_mode():
        prompts = engine.encode(inputs, with_graph=encoded_once)
        speculate(
            engine.generate_forward, prompts, steps=engine.decoder_steps(), drafts=None, eos_id=eos_id, pad_id=0,
            blocked_V=blocked_V, max_new_tokens=WRITTEN, top_k=config.loss.top_k,
        )  # fmt: skip
    peaks["rollout"] = peak_bytes()
    micros = micro_batches(config, prompts if encoded_once else inputs, vocab_size)
    del prompts
    gc.collect()
    reset_peak()
    with engine.train_mode():
        engine.train_batch(micros, opd_objective(config.loss, blocked_V, eos_id))
    peaks["update"] = peak_bytes()


def measure(folders: tuple[str, str], name: str) -> dict[str, float]:
    """Peaks of the rollout and of the update of a second step, bytes over the start; in this process, which is new."""
    import torch

    torch.set_num_threads(1)
    from trainers.env import set_verl_env

    set_verl_env(use_gpu=False)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    import torch.distributed as dist

    from bench.loss import peak_bytes, reset_peak
    from opd.arkasr import load_processor
    from trainers.fsdp2 import FSDP2Engine

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    start, peaks = 0, dict[str, int]()
    for folder, steps in zip(folders, (1, 2), strict=True):  # the tiny one loads what is loaded on first use
        config = make_config(folder, CASES[name])
        inputs = prompts(load_processor(folder), config.train.batch_size)
        gc.collect()
        reset_peak()
        start = peak_bytes()
        engine: Any = FSDP2Engine(config, folder)
        engine.initialize()
        for _ in range(steps):
            take_step(engine, inputs, config, peaks)
        del engine
    return {phase: float(peak - start) for phase, peak in peaks.items()}


def estimated(folder: str, name: str) -> dict[str, float]:
    """The same phases by `opd.memory`."""
    from opd.memory import longest, student_memory
    from opd.model_sizes import student_sizes

    config = make_config(folder, CASES[name])
    sizes = student_sizes(config)
    lengths = longest(config, sizes.merge_factor)
    rows = config.train.batch_size
    lengths = dataclasses.replace(lengths, rollout_rows=rows, drafted_rows=rows)
    phases = student_memory(config, sizes, lengths)
    written = student_memory(config, sizes, dataclasses.replace(lengths, response=WRITTEN))["rollout"]
    sums = {phase: sum(items.values()) for phase, items in phases.items()}
    return {"rollout": sum(written.values()), "update": max(sums["update"], sums["optimizer step"])}


@command
def main(argv: list[str]) -> int:
    parser = Parser("memory", __doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    arguments = parser.parse_args(argv)
    cases = arguments.cases.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"--cases: there is no {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    # Read by the C library when a process starts: blocks from 64 kB on go back to the system when they are freed.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    os.environ["OMP_NUM_THREADS"] = "1"
    from opd.seed import create_seed

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = (str(Path(scratch) / "tiny"), str(Path(scratch) / "model"))
        for folder, sizes in zip(folders, (TINY, SIZES), strict=True):
            create_seed(folder, sizes=sizes, corpus=["one two three"], vocab_size=VOCAB_SIZE, seed=0)
        print("| case | phase | estimated, MB | measured, MB | estimated / measured |\n|---|---|---|---|---|")
        for name in cases:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                found = pool.submit(measure, folders, name).result()
            expected = estimated(folders[1], name)
            for phase, value in expected.items():
                ratio = value / found[phase]
                rows.append(
                    {"case": f"memory/{name}/{phase}", "estimated_mb": value / 1e6, "measured_mb": found[phase] / 1e6,
                     "ratio": ratio}
                )  # fmt: skip
                print(
                    f"| {name} | {phase} | {value / 1e6:,.0f} | {found[phase] / 1e6:,.0f} | {ratio:.3f} |", flush=True
                )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    beyond = [row["case"] for row in rows if abs(row["ratio"] - 1) > LIMIT]
    if beyond:
        print(f"more than {LIMIT:.0%} apart: {', '.join(beyond)}")
    return 1 if beyond else 0


if __name__ == "__main__":
    raise SystemExit(main(None))
