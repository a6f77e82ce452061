"""The DeepSpeed engine takes the steps of FSDP2, at every stage of ZeRO, and resumes where it can."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from engine_steps import make_config, sft_step, start
from ranks import run_ranks  # sets the environment that verl and DeepSpeed are imported under

from data.collate import Collator
from data.manifest import read_manifest
from opd.arkasr import load_model, load_processor
from opd.checkpoint_files import write_marker
from opd.config import load_config
from opd.export import export_checkpoint
from opd.rollout.decode import decode
from opd.rollout.steps import can_step
from opd.schema import Config
from trainers.base_engine import NonFiniteError, torch_save
from trainers.fsdp2 import FSDP2Engine
from trainers.zero import ZeroEngine, deepspeed_config

STEPS, SAVED_AT = 20, 10
STAGES = [1, 2, 3]


def tiny_task(**changes: Any) -> Config:
    """The student and the optimizer of the quickstart, on references."""
    # A larger epsilon than the recipe's: the gradient of a bias of keys is 0 but for rounding, which Adam would magnify.
    config = load_config(["recipe=tiny", "optim.eps=1e-5"])
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, ctc_weight=0.0), **changes)


def zero_task(stage: int, **changes: Any) -> Config:
    base = tiny_task(engine="deepspeed", **changes)
    return dataclasses.replace(base, zero=dataclasses.replace(base.zero, stage=stage))


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.full_state_dict().items()}


def steps(
    engine_class: type, config: Config, manifest: Path, folder: Path | None, first: int = 0
) -> tuple[list[dict], dict]:
    """Totals of the steps and the weights after them; saved into `folder` on the way, or begun from it.

    The file system is so slow that nothing is written before the last step is done.
    """
    engine = start(config, engine_class)
    if first:
        engine.load_checkpoint(str(folder))
    totals, is_over, saving = [], threading.Event(), None
    for step in range(first, STEPS):
        batch = step % 6 * 8
        totals.append(sft_step(engine, manifest, 2, slice(batch, batch + 8)))
        if folder is not None and not first and step + 1 == SAVED_AT:
            engine.writer.thread.submit(is_over.wait)
            saving = engine.start_saving(str(folder))
    if saving is not None:
        assert not saving.done()
        assert not list(folder.rglob("*_states.pt"))
        dist.barrier()  # the others have looked too
        is_over.set()
        saving.result(timeout=60)
    dist.barrier()
    return totals, weights(engine)


@pytest.fixture(scope="module")
def fsdp2(speech: dict[str, Path]) -> tuple[list[dict], dict]:
    return run_ranks(2, steps, FSDP2Engine, tiny_task(), speech["train"], None)[0]


def refused(config: Config, folder: Path) -> str:
    engine = start(config, ZeroEngine)
    with pytest.raises(ValueError) as caught:
        engine.load_checkpoint(str(folder))
    return str(caught.value)


@pytest.mark.parametrize("stage", STAGES)
def test_zero_takes_the_steps_of_fsdp2_and_resumes(
    speech: dict[str, Path], fsdp2: tuple[list[dict], dict], tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "compiled"))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = zero_task(stage)
    totals, after = run_ranks(2, steps, ZeroEngine, config, speech["train"], folder)[0]
    assert not (tmp_path / "compiled").exists(), "nothing is compiled at run time"

    losses = [abs(own["loss"] - other["loss"]) for own, other in zip(totals, fsdp2[0], strict=True)]
    assert after.keys() == fsdp2[1].keys()
    distances = {
        name: float((after[name] - other).norm() / other.norm().clamp(min=1e-12)) for name, other in fsdp2[1].items()
    }
    worst = max(distances, key=distances.__getitem__)
    print(f"stage {stage}: loss {max(losses):.1e}, weights {distances[worst]:.1e} ({worst})")  # pytest -rP
    assert max(losses) < 1e-5
    assert distances[worst] < 1e-4
    moved = float((after["model.embed_tokens.weight"] - load_model(config.student.path).lm_head.weight).norm())
    assert moved > 0.01

    resumed = run_ranks(2, steps, ZeroEngine, config, speech["train"], folder, SAVED_AT)[0]
    assert [t["loss"] for t in resumed[0]] == [t["loss"] for t in totals[SAVED_AT:]]
    for name, tensor in after.items():
        assert torch.equal(resumed[1][name], tensor), name
    for ranks in (1, 3):
        message = run_ranks(ranks, refused, config, folder)[0]
        assert f"written by 2 ranks at zero.stage={stage}, not by {ranks}" in message
        assert "engine=fsdp2, which can change its number of ranks" in message


def apart(config: Config, manifest: Path, folder: Path) -> dict[str, Any]:
    """A step, then each rank decodes another number of clips, a checkpoint, rounding: all without waiting for others."""
    engine = start(config, ZeroEngine)
    totals = sft_step(engine, manifest, 2, slice(0, 8))
    processor = load_processor(engine.path)
    utterances = read_manifest(manifest)[: 2 + 3 * engine.rank]
    rows = []
    with engine.generation_mode():
        assert engine.decoder_steps() is not None
        assert can_step(engine.generation_module.model)
        for utterance in utterances:
            inputs = processor.build_inputs(Collator().collate([utterance])[0])
            rows.append(
                decode(engine.generate_forward, inputs, **arguments(engine, processor)).response_ids_BT[0].tolist()
            )
        encoded = engine.encode(inputs)
        whole, again = engine.generate_forward(**inputs).logits, engine.generate_forward(**encoded).logits
        torch.testing.assert_close(again, whole, atol=1e-5, rtol=0)
        if config.loss.ctc_weight:
            assert engine.generation_module.ctc_head.weight.shape == (engine.model_config.vocab_size, 64)
    sft_step(engine, manifest, 4, slice(8, 16))  # and training goes on, with other micro-batches
    save_run(engine, folder)
    after = weights(engine)
    engine.round_weights("bfloat16")
    with engine.generation_mode():
        logits = engine.generate_forward(**inputs).logits
    return {"loss": totals["loss"], "rows": rows, "after": after, "rounded": logits, "inputs": inputs}


def save_run(engine: Any, folder: Path) -> None:
    """Step 2 of a run, as the driver leaves it."""
    checkpoint = folder / "checkpoints" / "step-000002"
    if engine.rank == 0:
        checkpoint.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(engine.config.to_dict()))
        (folder / "summary.json").write_text('{"steps": 2, "eval": {}}')
    dist.barrier()
    engine.save_checkpoint(str(checkpoint))
    if engine.rank == 0:
        write_marker(checkpoint, 2)


def arguments(engine: Any, processor: Any) -> dict[str, Any]:
    return {
        "eos_id": processor.tokenizer.eos_token_id, "pad_id": 0, "max_new_tokens": 6, "top_k": 2,
        "blocked_V": torch.zeros(engine.model_config.vocab_size, dtype=torch.bool),
    }  # fmt: skip


@pytest.mark.parametrize(("stage", "lora", "offload"), [(1, 0, True), (2, 4, False), (3, 0, False), (3, 4, True)])
def test_ranks_decode_on_their_own_and_a_checkpoint_exports_the_weights(
    tiny_dir: Path, speech: dict[str, Path], tmp_path: Path, stage: int, lora: int, offload: bool
) -> None:
    config = make_config(
        tiny_dir, engine="deepspeed", zero={"stage": stage, "offload_params": offload and stage == 3},
        lora={"rank": lora}, loss={"ctc_weight": 0.5 if stage == 3 else 0.0}, export={"dtype": "float32"},
        optim={"offload": offload, "lr": 1e-3}, student={"path": str(tiny_dir), "freeze": ["adapter"]},
    )  # fmt: skip
    results = run_ranks(2, apart, config, speech["train"], tmp_path / "run")
    plain = dataclasses.replace(config, engine="fsdp2")
    assert results[0]["loss"] == pytest.approx(run_ranks(2, fsdp2_loss, plain, speech["train"])[0], rel=1e-5)
    assert (len(results[0]["rows"]), len(results[1]["rows"])) == (2, 5)
    assert results[0]["rows"] == results[1]["rows"][:2]
    after = results[0]["after"]
    exported = load_model(export_checkpoint(tmp_path / "run"))
    assert exported.state_dict().keys() == after.keys()
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(after[name], tensor, atol=1e-7, rtol=0, msg=name)
    with torch.no_grad():
        rounded = exported.bfloat16().float()(**results[0]["inputs"]).logits
    torch.testing.assert_close(results[0]["rounded"], rounded, atol=2e-2, rtol=0)


def fsdp2_loss(config: Config, manifest: Path) -> float:
    return sft_step(start(config, FSDP2Engine), manifest, 2, slice(0, 8))["loss"]


def saved(config: Config, manifest: Path, folder: Path) -> tuple[dict[str, torch.Tensor], float]:
    """The weights of the checkpoint that is left in `folder`, and the loss of the step after it."""
    engine = start(config, ZeroEngine)
    sft_step(engine, manifest, 2, slice(0, 8))
    save_run(engine, folder)
    after = weights(engine)
    return after, sft_step(engine, manifest, 2, slice(8, 16))["loss"]


def first_loss(config: Config, manifest: Path) -> float:
    return sft_step(start(config, FSDP2Engine), manifest, 2, slice(8, 16))["loss"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_over_to_the_other_engine_by_a_float32_export(
    tiny_dir: Path, speech: dict[str, Path], tmp_path: Path, stage: int, dtype: str
) -> None:
    student = {"path": str(tiny_dir), "dtype": dtype, "freeze": ["adapter"]}
    no_ctc = {"ctc_weight": 0.0}
    config = make_config(tiny_dir, engine="deepspeed", zero={"stage": stage}, student=student, loss=no_ctc)
    assert config.export.dtype == "bfloat16"
    after, loss = run_ranks(2, saved, config, speech["train"], tmp_path / "run")[0]
    out = export_checkpoint(tmp_path / "run", out_dir=tmp_path / "float32", dtype="float32")
    exported = load_model(out).state_dict()
    assert exported.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in exported.items())
    other = make_config(out, student={**student, "path": str(out)}, loss=no_ctc)
    # Equal weights; in bfloat16 the engines round at other places.
    expected = pytest.approx(loss, rel=1e-5 if dtype == "float32" else 0.03)
    assert run_ranks(2, first_loss, other, speech["train"])[0] == expected


def non_finite(config: Config, manifest: Path) -> tuple[bool, bool]:
    engine = start(config, ZeroEngine)
    before = weights(engine)
    engine.backward = lambda loss, is_last: ZeroEngine.backward(engine, loss * spoil(engine), is_last)
    try:
        sft_step(engine, manifest, 4)
    except NonFiniteError:
        after = engine.full_state_dict()
        return True, all(torch.equal(before[name], after[name]) for name in before)
    return False, False


def cannot_write(config: Config, manifest: Path, folder: Path) -> tuple[str, float]:
    """What a save says whose folder is lost while it is written, and the loss of the step beside it."""
    engine = start(config, ZeroEngine)
    lost = threading.Event()
    engine.writer.thread.submit(lost.wait)
    saving = engine.start_saving(str(folder))
    loss = sft_step(engine, manifest, 4)["loss"]
    dist.barrier()
    if engine.rank == 0:
        shutil.rmtree(folder)
    dist.barrier()
    lost.set()
    return str(saving.exception(timeout=60)), loss


def test_what_goes_wrong_in_the_background_is_told_by_the_save(
    tiny_dir: Path, speech: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    results = run_ranks(2, cannot_write, make_config(tiny_dir, engine="deepspeed"), speech["train"], folder)
    for said, loss in results:
        assert said.startswith(f"[Errno 2] No such file or directory: '{folder}/state/")
        assert loss > 0


def test_a_full_disk_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        torch_save({"weights": torch.ones(100_000)}, "/dev/full")


def spoil(engine: Any) -> float:
    """Makes the gradient of one rank infinite where its loss is finite."""
    return float("inf") if engine.rank == 0 else 1.0


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_stops_every_rank_with_nothing_updated(
    tiny_dir: Path, speech: dict[str, Path], stage: int
) -> None:
    config = make_config(tiny_dir, engine="deepspeed", zero={"stage": stage})
    results = run_ranks(2, non_finite, config, speech["train"])
    assert results[0] == (True, True)
    assert results[1][0] is True


def zero_loss(config: Config, manifest: Path) -> tuple[float, float, set[torch.dtype]]:
    engine = start(config, ZeroEngine)
    buffers = {buffer.dtype for buffer in engine.module.buffers() if buffer.is_floating_point()}
    totals = [sft_step(engine, manifest, 2, slice(step * 8, step * 8 + 8)) for step in range(2)]
    assert engine.trained.module.model.model.embed_tokens.weight.dtype == torch.bfloat16
    return totals[1]["loss"], totals[0]["grad_norm"], buffers


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_compute_gives_nearly_the_same_step(tiny_dir: Path, speech: dict[str, Path], stage: int) -> None:
    sections: dict[str, Any] = {"engine": "deepspeed", "zero": {"stage": stage}}
    config = make_config(tiny_dir, student={"path": str(tiny_dir), "dtype": "bfloat16"}, **sections)
    loss, grad_norm, buffers = run_ranks(2, zero_loss, config, speech["train"])[0]
    plain = run_ranks(2, fsdp2_two_steps, make_config(tiny_dir), speech["train"])[0]
    assert buffers == {torch.float32}, "rotary frequencies in bfloat16 would move every position"
    assert (loss, grad_norm) == (pytest.approx(plain[0], rel=0.03), pytest.approx(plain[1], rel=0.03))


def fsdp2_two_steps(config: Config, manifest: Path) -> tuple[float, float]:
    engine = start(config, FSDP2Engine)
    totals = [sft_step(engine, manifest, 2, slice(step * 8, step * 8 + 8)) for step in range(2)]
    return totals[1]["loss"], totals[0]["grad_norm"]


def test_settings_say_what_the_config_says(tiny_dir: Path) -> None:
    config = make_config(
        tiny_dir, engine="deepspeed", zero={"stage": 3, "offload_params": True}, optim={"offload": True},
        student={"path": str(tiny_dir), "dtype": "bfloat16"},
    )  # fmt: skip
    settings = deepspeed_config(config, on_gpu=True)
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert settings["zero_optimization"]["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert settings["bf16"]["enabled"]
    assert "bf16" not in deepspeed_config(make_config(tiny_dir, engine="deepspeed"), on_gpu=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["zero.stage=3"], "zero: these keys are those of engine=deepspeed"),
        (["engine=deepspeed", "zero.stage=0"], "zero.stage=0: must be one of 1, 2, 3"),
        (["engine=deepspeed", "zero.offload_params=true"], "with zero.stage=2 every rank computes with all weights"),
        (["engine=megatron"], "engine=megatron: must be one of fsdp2, deepspeed"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(["recipe=tiny", *overrides])


def test_deepspeed_is_told_that_this_is_a_cpu() -> None:
    assert os.environ["DS_ACCELERATOR"] == "cpu"
