"""The FSDP2 engine on real ranks: the same step however it is spread, exact resumption, nothing half-updated."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_steps import LayeredEngine, assert_same_step, make_config, opd_step, sft_step, start
from ranks import run_ranks  # sets the environment that verl is imported under
from tiny import CORPUS, SIZES

from data.collate import Collator
from data.manifest import read_manifest
from opd.arkasr import blocked_token_ids, load_model, load_processor
from opd.rollout.decode import decode
from opd.rollout.speculative import speculate
from opd.rollout.steps import DecoderSteps, can_step
from opd.schema import Config
from opd.seed import create_seed
from opd.step_metrics import opd_metrics
from opd.vocab import blocked_mask
from trainers.base_engine import NonFiniteError, learning_rate_factor
from trainers.fsdp2 import FSDP2Engine


def one_step(config: Config, manifest: Path, micro_size: int, engine_class: type) -> tuple[dict, dict]:
    engine = start(config, engine_class)
    totals = sft_step(engine, manifest, micro_size)
    return totals, engine.full_state_dict()


@pytest.fixture(scope="module")
def one_batch(tiny_dir: Path, speech: dict[str, Path]) -> tuple[dict, dict]:
    """Totals and weights of a step whose eight utterances are one micro-batch on one rank."""
    return run_ranks(1, one_step, spread_config(tiny_dir), speech["train"], 8, FSDP2Engine)[0]


def spread_config(path: Path, stage: str = "sft", **sections: dict[str, Any]) -> Config:
    """A large epsilon: Adam's first step divides a gradient by its own size, which makes its rounding error visible."""
    return make_config(path, stage, optim={"lr": 1e-3, "eps": 1e-3}, **sections)


@pytest.mark.parametrize(
    ("ranks", "micro_size", "engine_class"), [(1, 2, FSDP2Engine), (2, 4, LayeredEngine), (2, 1, FSDP2Engine)]
)
def test_one_step_is_the_same_however_it_is_spread(
    tiny_dir: Path, speech: dict[str, Path], one_batch: tuple, ranks: int, micro_size: int, engine_class: type
) -> None:
    config = spread_config(tiny_dir)
    other = run_ranks(ranks, one_step, config, speech["train"], micro_size, engine_class)[0]
    assert_same_step(other, one_batch, ("loss", "grad_norm", "positions", "ce", "ctc"))


def one_opd_step(config: Config, student_path: Path, manifest: Path, micro_size: int) -> tuple[dict, dict]:
    """Totals and weights of one OPD step of a student against itself or another teacher, in this process group."""
    engine = start(config)
    return opd_step(engine, student_path, manifest, micro_size), engine.full_state_dict()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "sampled_kl", "full_kl"])
def test_a_teacher_equal_to_the_student_gives_no_loss(tiny_dir: Path, speech: dict[str, Path], kind: str) -> None:
    config = make_config(tiny_dir, "opd", loss={"kind": kind, "top_k": 8})
    totals, _ = run_ranks(1, one_opd_step, config, tiny_dir, speech["unlabelled"], 4)[0]
    assert abs(totals["loss"]) < 1e-5
    assert totals["grad_norm"] < 1e-4
    assert totals["overlap"] / totals["positions"] == pytest.approx(1.0)


@pytest.mark.parametrize("renormalize", [False, True])
def test_opd_step_is_the_same_however_it_is_spread(
    tiny_dir: Path, speech: dict[str, Path], tmp_path: Path, renormalize: bool
) -> None:
    other = create_seed(tmp_path / "teacher", sizes=SIZES, corpus=CORPUS, vocab_size=360, seed=9)
    config = spread_config(tiny_dir, "opd", teacher={"path": str(other)}, loss={"renormalize": renormalize})
    one = run_ranks(1, one_opd_step, config, tiny_dir, speech["unlabelled"], 8)[0]
    assert one[0]["loss"] > 0.01
    counts = dict.fromkeys(("tokens", "forwards", "drafted", "accepted", "finished", "looped", "empty"), 1)
    metrics = opd_metrics(one[0], counts, 8, 1.0)
    assert ("support/student_mass" in metrics) != renormalize, "the renormalised form does not know it"
    names = ("loss", "grad_norm", "positions", "support_size", "overlap", "teacher_mass", "ends")
    names += () if renormalize else ("student_mass", "k1")
    for ranks, micro_size in ((1, 2), (2, 2)):
        assert_same_step(
            run_ranks(ranks, one_opd_step, config, tiny_dir, speech["unlabelled"], micro_size)[0], one, names
        )


def test_micro_batches_by_tokens_are_the_same_step(tiny_dir: Path, speech: dict[str, Path], tmp_path: Path) -> None:
    """With 80 positions one rank has fewer micro-batches than the other and runs along on untrained ones."""
    other = create_seed(tmp_path / "teacher", sizes=SIZES, corpus=CORPUS, vocab_size=360, seed=9)
    sections: dict[str, Any] = {"teacher": {"path": str(other)}}
    one = run_ranks(1, one_opd_step, spread_config(tiny_dir, "opd", **sections), tiny_dir, speech["unlabelled"], 8)[0]
    for ranks, tokens in ((1, 1), (2, 80), (2, 10_000)):
        config = spread_config(tiny_dir, "opd", **sections, train={"micro_batch_tokens": tokens})
        step = run_ranks(ranks, one_opd_step, config, tiny_dir, speech["unlabelled"], 8)[0]
        assert_same_step(step, one, ("loss", "grad_norm", "positions", "support_size", "ends", "written"))


@pytest.mark.parametrize("freeze", [[], ["decoder"]])
def test_bfloat16_compute_gives_nearly_the_same_step(
    tiny_dir: Path, speech: dict[str, Path], freeze: list[str]
) -> None:
    """Hidden states and the gathered output matrix are bfloat16 then, master weights and gradients float32."""
    totals = []
    for dtype in ("float32", "bfloat16"):
        config = make_config(tiny_dir, "opd", student={"dtype": dtype, "freeze": freeze})
        totals.append(run_ranks(2, sft_step_only, config, speech["train"])[0])
    for name in ("loss", "grad_norm"):
        assert totals[1][name] == pytest.approx(totals[0][name], rel=0.03), name
        assert totals[1][name] != totals[0][name]


def sft_step_only(config: Config, manifest: Path) -> dict[str, float]:
    return sft_step(start(config, LayeredEngine), manifest, 2)


def train_and_save(config: Config, manifest: Path, folder: Path, steps: tuple[int, int]) -> dict[str, torch.Tensor]:
    engine = start(config)
    if steps[0]:
        engine.load_checkpoint(str(folder))
    for step in range(*steps):
        sft_step(engine, manifest, 2, slice(step * 8, step * 8 + 8))
    if folder.exists() and not steps[0]:
        engine.save_checkpoint(str(folder))
    return engine.full_state_dict()


def test_resumption_is_bit_equal_and_other_ranks_can_load(
    tiny_dir: Path, speech: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config(tiny_dir)
    unbroken = run_ranks(2, train_and_save, config, speech["train"], tmp_path / "none", (0, 4))[0]
    run_ranks(2, train_and_save, config, speech["train"], tmp_path, (0, 2))
    resumed = run_ranks(2, train_and_save, config, speech["train"], tmp_path, (2, 4))[0]
    for name, tensor in unbroken.items():
        assert torch.equal(resumed[name], tensor), name
    on_one_rank = run_ranks(1, train_and_save, config, speech["train"], tmp_path, (2, 4))[0]
    for name, tensor in unbroken.items():
        torch.testing.assert_close(on_one_rank[name], tensor, atol=2e-5, rtol=0)


def save_after_two_steps(config: Config, manifest: Path, folder: Path) -> None:
    engine = start(config)
    for step in range(2):
        sft_step(engine, manifest, 2, slice(step * 12, step * 12 + 12))
    engine.save_checkpoint(str(folder))


def next_step(config: Config, manifest: Path, folder: Path) -> dict[str, float]:
    engine = start(config)
    engine.load_checkpoint(str(folder))
    return sft_step(engine, manifest, 2, slice(24, 36))


def test_saved_on_two_ranks_goes_on_with_one_and_three(tiny_dir: Path, speech: dict[str, Path], tmp_path: Path) -> None:
    config = make_config(tiny_dir)
    run_ranks(2, save_after_two_steps, config, speech["train"], tmp_path)
    expected, *others = (run_ranks(n, next_step, config, speech["train"], tmp_path)[0] for n in (2, 1, 3))
    for totals in others:
        print(f"loss {totals['loss'] - expected['loss']:.1e}")
        assert totals["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert totals["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """A copy: on one rank the engine's own state dict shares memory with the parameters."""
    return {name: tensor.clone() for name, tensor in engine.full_state_dict().items()}


def frozen_step(config: Config, manifest: Path) -> tuple[dict, dict]:
    engine = start(config)
    before = weights(engine)
    sft_step(engine, manifest, 4)
    return before, engine.full_state_dict()


@pytest.mark.parametrize("part", ["encoder", "adapter", "decoder"])
def test_a_frozen_part_does_not_move(tiny_dir: Path, speech: dict[str, Path], part: str) -> None:
    config = make_config(tiny_dir, student={"path": str(tiny_dir), "freeze": [part]})
    before, after = run_ranks(1, frozen_step, config, speech["train"])[0]

    def belongs(name: str) -> str:
        if name.startswith("audio_encoder.whisper."):
            return "encoder"
        return "adapter" if name.startswith("audio_encoder.") else "decoder"

    moved = {belongs(name) for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"encoder", "adapter", "decoder"} - {part}


def non_finite(config: Config, manifest: Path) -> tuple[bool, bool]:
    engine = start(config)
    before = weights(engine)
    try:
        sft_step(engine, manifest, 4, spoil=float("nan") if dist.get_rank() == 0 else 1.0)
    except NonFiniteError:
        after = engine.full_state_dict()
        return True, all(torch.equal(before[name], after[name]) for name in before)
    return False, False


def test_a_gradient_that_is_not_finite_stops_every_rank_with_nothing_updated(
    tiny_dir: Path, speech: dict[str, Path]
) -> None:
    results = run_ranks(2, non_finite, make_config(tiny_dir), speech["train"])
    assert results[0] == (True, True)
    assert results[1][0] is True


def decode_apart(config: Config, manifest: Path) -> list[list[int]]:
    """Each rank decodes another number of clips: no rank may wait for the other."""
    engine = start(config, LayeredEngine)
    processor = load_processor(engine.path)
    utterances = read_manifest(manifest)[: 2 + 3 * engine.rank]
    rows = []
    with engine.generation_mode():
        for utterance in utterances:
            inputs = processor.build_inputs(Collator().collate([utterance])[0])
            rollout = decode(
                engine.generate_forward, inputs, eos_id=processor.tokenizer.eos_token_id, pad_id=0,
                blocked_V=torch.zeros(engine.model_config.vocab_size, dtype=torch.bool), max_new_tokens=6, top_k=2,
            )  # fmt: skip
            rows.append(rollout.response_ids_BT[0].tolist())
    sft_step(engine, manifest, 1, slice(0, 2))  # and training goes on as before
    return rows


def test_ranks_decode_on_their_own_and_write_what_one_process_writes(tiny_dir: Path, speech: dict[str, Path]) -> None:
    rows = run_ranks(2, decode_apart, make_config(tiny_dir), speech["train"])
    assert (len(rows[0]), len(rows[1])) == (2, 5)
    model, processor = load_model(tiny_dir), load_processor(tiny_dir)
    for utterance, row in zip(read_manifest(speech["train"])[:5], rows[1], strict=True):
        inputs = processor.build_inputs(Collator().collate([utterance])[0])
        rollout = decode(
            model, inputs, eos_id=processor.tokenizer.eos_token_id, pad_id=0,
            blocked_V=torch.zeros(model.config.vocab_size, dtype=torch.bool), max_new_tokens=6, top_k=2,
        )  # fmt: skip
        assert rollout.response_ids_BT[0].tolist() == row
    assert rows[0] == rows[1][:2]


def rollouts_in_step(config: Config, manifest: Path) -> dict[str, Any]:
    """One clip on rank 0, three on rank 1: plainly, speculatively with gathered parameters, and in step without."""
    engine = start(config, LayeredEngine)
    processor = load_processor(engine.path)
    tokenizer, vocab_size = processor.tokenizer, engine.model_config.vocab_size
    utterances = read_manifest(manifest)[: 1 + 2 * engine.rank]
    inputs = processor.build_inputs(Collator().collate(utterances)[0])
    blocked = blocked_token_ids(tokenizer, vocab_size, tokenizer.eos_token_id)
    arguments: dict[str, Any] = {
        "eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id, "max_new_tokens": 12, "top_k": 4,
        "blocked_V": blocked_mask(blocked, vocab_size),
    }  # fmt: skip
    with engine.generation_mode():
        plain = decode(engine.generate_forward, inputs, **arguments).response_ids_BT.tolist()
        # Rank 0 has the right draft, rank 1 none: one round against twelve.
        drafts = [[i for i in ids if i != arguments["eos_id"]] if engine.rank == 0 else None for ids in plain]
        assert can_step(engine.module.model)
        steps = DecoderSteps(engine.module.model)
        apart, apart_counts = speculate(
            engine.generate_forward, inputs, steps=steps, drafts=drafts, forward_cost=1e6, **arguments
        )
    with engine.eval_mode():
        assert not can_step(engine.module.model)
        in_step, counts = speculate(
            engine.generate_forward, inputs, drafts=drafts, forward_cost=1e6, any_left=engine.any_rank, **arguments
        )
    return {
        "plain": plain,
        "apart": apart.response_ids_BT.tolist(),
        "in_step": in_step.response_ids_BT.tolist(),
        "rounds": (apart_counts.rounds, counts.rounds),
        "forwards": counts.forwards_B.tolist(),
    }


def test_ranks_take_the_same_number_of_rounds_where_forwards_are_collectives(
    tiny_dir: Path, speech: dict[str, Path]
) -> None:
    results = run_ranks(2, rollouts_in_step, make_config(tiny_dir), speech["train"])
    for result in results:
        assert result["apart"] == result["plain"]
        assert result["in_step"] == result["plain"]
    longest = len(results[1]["plain"][0])
    assert longest > 1
    assert [result["rounds"] for result in results] == [(1, longest), (longest, longest)]
    assert results[0]["forwards"] == [1]


def groups_of(config: Config) -> list[tuple[int, float, set[int]]]:
    engine = start(config)
    return [
        (len(g["params"]), g["weight_decay"], {p.dim() for p in g["params"]}) for g in engine.optimizer.param_groups
    ]


def test_norms_and_biases_do_not_decay_and_weights_are_float32(tiny_dir: Path) -> None:
    matrices, vectors = run_ranks(1, groups_of, make_config(tiny_dir, optim={"lr": 1e-3, "weight_decay": 0.1}))[0]
    assert matrices[1] == 0.1
    assert min(matrices[2]) >= 2
    assert vectors[1] == 0.0
    assert vectors[2] == {1}


def test_learning_rate_warms_up_then_falls() -> None:
    optim = make_config(Path("x"), optim={"warmup_steps": 10, "lr_schedule": "cosine", "min_lr_ratio": 0.1}).optim
    factors = [learning_rate_factor(step, optim, 100) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[100] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    constant = make_config(Path("x"), optim={"warmup_steps": 10, "lr_schedule": "constant"}).optim
    assert learning_rate_factor(99, constant, 100) == 1.0


def cannot_write(config: Config, manifest: Path, folder: Path, limit: int) -> tuple[str, float]:
    """What a save says where no file may become longer than `limit` bytes, and the loss of the step beside it."""
    engine = start(config)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    saving = engine.start_saving(str(folder))
    loss = sft_step(engine, manifest, 4)["loss"]
    return repr(saving.exception(timeout=60)), loss


def test_what_goes_wrong_in_the_background_is_told_without_tracebacks(
    tiny_dir: Path, speech: dict[str, Path], tmp_path: Path
) -> None:
    # Enough for the random state and for little files, not for the weights.
    for said, loss in run_ranks(2, cannot_write, make_config(tiny_dir), speech["train"], tmp_path, 100_000):
        assert said == "OSError(27, 'File too large')" or said.startswith(
            "RuntimeError('[enforce fail at inline_container"
        )
        assert "Traceback" not in said
        assert loss > 0
