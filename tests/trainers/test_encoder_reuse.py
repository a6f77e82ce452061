"""What the encoder made for the rollout serves the update: the same steps as with the audio heard anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_steps import LayeredEngine, assert_same_step, make_config, opd_step, start
from ranks import run_ranks  # sets the environment that verl and DeepSpeed are imported under
from tiny import CORPUS, SIZES

from opd.schema import Config
from opd.seed import create_seed
from trainers.fsdp2 import FSDP2Engine
from trainers.zero import ZeroEngine

STEPS = 3
NAMES = ("loss", "grad_norm", "positions", "support_size", "written")


def steps(
    config: Config, path: Path, manifest: Path, micro_size: int, engine_class: type, reuse: bool
) -> tuple[dict[str, float], dict]:
    """Totals of the last of some steps, and the weights after it."""
    engine = start(config, engine_class)
    for _ in range(STEPS):
        totals = opd_step(engine, path, manifest, micro_size, reuse)
    return totals, engine.full_state_dict()


@pytest.fixture(scope="module")
def sections(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("teacher")
    teacher = create_seed(folder / "teacher", sizes=SIZES, corpus=CORPUS, vocab_size=360, seed=9)
    # A large epsilon: Adam's first steps would magnify the rounding of small gradients.
    return {"teacher": {"path": str(teacher)}, "optim": {"lr": 1e-3, "eps": 1e-3}}


@pytest.fixture(scope="module")
def anew(tiny_dir: Path, speech: dict[str, Path], sections: dict[str, Any]) -> tuple[dict, dict]:
    config = make_config(tiny_dir, "opd", **sections)
    return run_ranks(1, steps, config, tiny_dir, speech["unlabelled"], 8, FSDP2Engine, False)[0]


@pytest.mark.parametrize(
    ("ranks", "engine_class", "checkpointing"),
    [(1, FSDP2Engine, False), (2, FSDP2Engine, False), (2, LayeredEngine, False), (2, LayeredEngine, True)],
)
def test_fsdp2_takes_the_same_steps(
    tiny_dir: Path, speech: dict[str, Path], sections: dict, anew: tuple, ranks: int, engine_class: type,
    checkpointing: bool,
) -> None:  # fmt: skip
    student = {"path": str(tiny_dir), "activation_checkpointing": checkpointing}
    config = make_config(tiny_dir, "opd", **sections, student=student)
    reused = run_ranks(ranks, steps, config, tiny_dir, speech["unlabelled"], 8, engine_class, True)[0]
    assert_same_step(reused, anew, NAMES)


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_takes_the_same_steps(
    tiny_dir: Path, speech: dict[str, Path], sections: dict, anew: tuple, stage: int
) -> None:
    config = make_config(tiny_dir, "opd", **sections, engine="deepspeed", zero={"stage": stage})
    reused = run_ranks(2, steps, config, tiny_dir, speech["unlabelled"], 8, ZeroEngine, True)[0]
    assert_same_step(reused, anew, NAMES)


def test_a_frozen_encoder_serves_all_micro_batches(tiny_dir: Path, speech: dict[str, Path], sections: dict) -> None:
    """The adapter behind it learns."""
    student = {"path": str(tiny_dir), "freeze": ["encoder"]}
    config = make_config(tiny_dir, "opd", **sections, student=student)
    reused, heard = (
        run_ranks(2, steps, config, tiny_dir, speech["unlabelled"], 2, FSDP2Engine, reuse)[0] for reuse in (True, False)
    )
    assert_same_step(reused, heard, NAMES)


def reuses(configs: list[Config], num_rows: int) -> list[bool]:
    return [
        start(config, FSDP2Engine if config.engine == "fsdp2" else ZeroEngine).encodes_once(num_rows)
        for config in configs
    ]


def test_it_is_done_where_the_weights_stay_and_the_memory_is_no_more(tiny_dir: Path) -> None:
    sections: list[tuple[bool, dict[str, Any]]] = [
        (True, {}),
        (False, {"train": {"micro_batch_size": 3}}),
        (False, {"train": {"micro_batch_tokens": 1000}}),
        (False, {"train": {"reuse_encoder": False}}),
        (False, {"schedule": "one_step_off"}),
        (True, {"train": {"micro_batch_size": 3}, "student": {"path": str(tiny_dir), "freeze": ["encoder"]}}),
        (True, {"engine": "deepspeed", "zero": {"stage": 2}}),
        (False, {"engine": "deepspeed", "zero": {"stage": 3}}),
    ]
    configs = [make_config(tiny_dir, "opd", **keys) for _, keys in sections]
    assert run_ranks(1, reuses, configs, 4)[0] == [expected for expected, _ in sections]
