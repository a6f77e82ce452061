"""What saves memory in training changes nothing that it should not: activation checkpointing, LoRA, offload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from engine_steps import LayeredEngine, make_config, sft_step, start
from ranks import run_ranks

from data.collate import Collator
from data.manifest import read_manifest
from opd.arkasr import load_model, load_processor
from opd.checkpoint_files import write_marker
from opd.export import export_checkpoint, save_arkasr
from opd.rollout.decode import decode
from opd.rollout.steps import can_step
from opd.schema import Config
from trainers.fsdp2 import FSDP2Engine
from trainers.offload import BUCKET_NUMEL, OffloadedAdamW

LORA = {"rank": 4, "alpha": 8}


class SavedBytes:
    """Bytes that autograd keeps for the backward pass, each storage counted once."""

    def __init__(self) -> None:
        self.sizes: dict[int, int] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def total(self) -> int:
        return sum(self.sizes.values())


def gradients_and_saved_bytes(config: Config, manifest: Path) -> tuple[dict, dict, int]:
    """Totals, gradients and bytes saved of a forward and backward whose loss is made from hidden states."""
    engine = start(config, LayeredEngine)
    saved = SavedBytes()
    # The gradient is read before the step takes it away.
    gradients: dict[str, torch.Tensor] = {}
    engine.optimizer_step = lambda: gradients.update(
        {n: p.grad.full_tensor() for n, p in engine.module.named_parameters() if p.grad is not None}
    )
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        totals = sft_step(engine, manifest, 4)
    return totals, gradients, saved.total()


def bytes_kept_of_encoder(config: Config, manifest: Path) -> int:
    """What the encoder's pass for the rollout leaves for the update's backward."""
    engine = start(config, LayeredEngine)
    inputs = load_processor(config.student.path).build_inputs(Collator().collate(read_manifest(manifest)[:8])[0])
    saved = SavedBytes()
    with engine.generation_mode(), torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        encoded = engine.encode(inputs, with_graph=True)["encoded_BED"]
        assert not any(module.training for module in engine.module.modules())
    assert encoded.requires_grad
    return saved.total()


def test_activation_checkpointing_holds_for_the_encoder_of_the_rollout(tiny_dir: Path, speech: dict[str, Path]) -> None:
    plain, checkpointed = (
        run_ranks(
            1, bytes_kept_of_encoder, make_config(tiny_dir, student={"path": str(tiny_dir), **keys}), speech["train"]
        )[0]
        for keys in ({}, {"activation_checkpointing": True})
    )
    print(f"{plain:,} bytes saved, {checkpointed:,} with activation checkpointing")
    assert checkpointed < 0.6 * plain


@pytest.mark.parametrize("ranks", [1, 2])
def test_activation_checkpointing_gives_the_same_gradient_and_saves_less(
    tiny_dir: Path, speech: dict[str, Path], ranks: int
) -> None:
    configs = [
        make_config(tiny_dir, student={"path": str(tiny_dir), "activation_checkpointing": on}) for on in (False, True)
    ]
    plain, checkpointed = (run_ranks(ranks, gradients_and_saved_bytes, c, speech["train"])[0] for c in configs)
    assert checkpointed[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-6)
    assert checkpointed[1].keys() == plain[1].keys()
    for name, gradient in plain[1].items():
        assert float((checkpointed[1][name] - gradient).norm()) <= 1e-6 * float(gradient.norm()), name
    print(f"{ranks} ranks: {plain[2]:,} bytes saved, {checkpointed[2]:,} with activation checkpointing")
    assert checkpointed[2] < 0.6 * plain[2]


def weights(engine: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.full_state_dict().items()}


def lora_steps(config: Config, manifest: Path, folder: Path, steps: tuple[int, int]) -> dict[str, Any]:
    """Steps under LoRA, from the checkpoint in `folder` where steps[0] is not 0; saved there where it exists."""
    engine = start(config, LayeredEngine)
    before = weights(engine)
    if steps[0]:
        engine.load_checkpoint(str(folder))
    losses = [sft_step(engine, manifest, 2, slice(step * 8, step * 8 + 8))["loss"] for step in range(*steps)]
    if folder.exists() and not steps[0]:
        engine.save_checkpoint(str(folder))
    trained = {name for name, p in engine.module.named_parameters() if p.requires_grad}
    return {"before": before, "after": weights(engine), "losses": losses, "trained": trained}


@pytest.mark.parametrize(("ranks", "freeze"), [(1, []), (2, ["encoder", "adapter"])])
def test_lora_trains_the_adapters_and_what_is_not_frozen(
    tiny_dir: Path, speech: dict[str, Path], tmp_path: Path, ranks: int, freeze: list[str]
) -> None:
    config = make_config(
        tiny_dir, lora=LORA, student={"path": str(tiny_dir), "freeze": freeze}, loss={"ctc_weight": 0.0}
    )
    run = run_ranks(ranks, lora_steps, config, speech["train"], tmp_path / "none", (0, 3))[0]
    in_decoder = {name for name in run["trained"] if name.startswith("model.model.")}
    assert len(in_decoder) == 2 * 2 * 7, "two matrices for each of seven layers of each of two blocks"
    assert all("lora_" in name for name in in_decoder)
    outside = {name.split(".")[2] for name in run["trained"] - in_decoder}
    assert outside == (set() if freeze else {"whisper", "layer_norm", "adapting"})
    plain = load_model(tiny_dir).state_dict()
    assert {name: t.shape for name, t in run["after"].items()} == {name: t.shape for name, t in plain.items()}
    moved = {name for name in run["after"] if not torch.equal(run["after"][name], run["before"][name])}
    moved_decoder = {name for name in moved if not name.startswith("audio_encoder.")}
    assert moved_decoder == {name for name in plain if name.endswith("_proj.weight") and name.startswith("model.")}
    assert bool(moved - moved_decoder) == (not freeze)


def trained_and_exported_logits(config: Config, waveforms: list[np.ndarray], manifest: Path, out_dir: Path) -> float:
    engine = start(config, FSDP2Engine)
    for step in range(3):
        sft_step(engine, manifest, 4, slice(step * 8, step * 8 + 8))
    processor = load_processor(engine.path)
    inputs = processor.build_inputs(waveforms[:2])
    with engine.eval_mode():  # adapters beside their layers
        trained = engine.generate_forward(**inputs).logits
    with engine.generation_mode():  # adapters merged into them
        assert can_step(engine.module.model)
        merged = engine.generate_forward(**inputs).logits
    torch.testing.assert_close(merged, trained, atol=1e-5, rtol=0)
    with engine.eval_mode():
        assert torch.equal(engine.generate_forward(**inputs).logits, trained), "a rollout leaves no trace"
    exported = load_model(save_arkasr(engine.full_state_dict(), engine.model_config, processor, out_dir, "float32"))
    with torch.no_grad():
        difference = float((exported(**inputs).logits - trained).abs().max())
        moved = float((load_model(engine.path)(**inputs).logits - trained).abs().max())
    assert moved > 0.01, "the adapters do something"
    engine.round_weights("bfloat16")
    rounded = load_model(
        save_arkasr(engine.full_state_dict(), engine.model_config, processor, out_dir.with_name("rounded"), "float32")
    ).state_dict()
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(rounded[name], tensor.bfloat16().float(), atol=0, rtol=2**-8)
    return difference


def test_export_under_lora_is_the_trained_model(
    tiny_dir: Path, speech: dict[str, Path], waveforms: list[np.ndarray], tmp_path: Path
) -> None:
    config = make_config(tiny_dir, lora=LORA, loss={"ctc_weight": 0.0}, optim={"lr": 1e-2})
    difference = run_ranks(1, trained_and_exported_logits, config, waveforms, speech["train"], tmp_path / "export")[0]
    assert difference < 1e-5


def rounding_error(config: Config, manifest: Path) -> float:
    """How far the weights after `round_weights` are from the rounded ones before it, relative to each tensor's largest."""
    engine = start(config, LayeredEngine)
    sft_step(engine, manifest, 4)
    before = engine.full_state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    engine.round_weights("bfloat16")
    after = engine.full_state_dict()
    assert after.keys() == before.keys()
    errors = [
        float((after[n] - t.bfloat16().float()).abs().max() / t.abs().max()) for n, t in before.items() if t.any()
    ]
    return max(errors, default=0.0)


def test_weights_of_several_ranks_are_rounded_under_lora(tiny_dir: Path, speech: dict[str, Path]) -> None:
    config = make_config(tiny_dir, lora=LORA, loss={"ctc_weight": 0.0}, optim={"lr": 1e-2})
    assert run_ranks(2, rounding_error, config, speech["train"])[0] <= 2**-8


def test_resumption_under_lora_is_bit_equal(tiny_dir: Path, speech: dict[str, Path], tmp_path: Path) -> None:
    config = make_config(tiny_dir, lora=LORA, optim={"offload": True})
    unbroken = run_ranks(2, lora_steps, config, speech["train"], tmp_path / "none", (0, 4))[0]
    run_ranks(2, lora_steps, config, speech["train"], tmp_path, (0, 2))
    resumed = run_ranks(2, lora_steps, config, speech["train"], tmp_path, (2, 4))[0]
    for name, tensor in unbroken["after"].items():
        assert torch.equal(resumed["after"][name], tensor), name


def lora_run(config: Config, manifest: Path, run_dir: Path) -> dict[str, torch.Tensor]:
    """A run directory as the driver makes it, with the checkpoint of one step."""
    engine = start(config)
    sft_step(engine, manifest, 4)
    checkpoint = run_dir / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    engine.save_checkpoint(str(checkpoint))
    write_marker(checkpoint, 1)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    (run_dir / "summary.json").write_text('{"steps": 1, "eval": {}}')
    return weights(engine)


def test_a_checkpoint_under_lora_exports_the_same_weights(
    tiny_dir: Path, speech: dict[str, Path], tmp_path: Path
) -> None:
    config = make_config(tiny_dir, lora=LORA, export={"dtype": "float32"})
    trained = run_ranks(1, lora_run, config, speech["train"], tmp_path / "run")[0]
    exported = load_model(export_checkpoint(tmp_path / "run")).state_dict()
    assert exported.keys() == trained.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in trained.items())


def lora_rollouts(config: Config, manifest: Path) -> list[list[list[int]]]:
    """Responses with merged adapters on gathered parameters, and with adapters beside their layers on this rank's shard."""
    engine = start(config, LayeredEngine)
    for step in range(2):
        sft_step(engine, manifest, 4, slice(step * 8, step * 8 + 8))
    processor = load_processor(engine.path)
    inputs = processor.build_inputs(Collator().collate(read_manifest(manifest)[:3])[0])
    arguments: dict[str, Any] = {
        "eos_id": processor.tokenizer.eos_token_id, "pad_id": 0, "max_new_tokens": 8, "top_k": 2,
        "blocked_V": torch.zeros(engine.model_config.vocab_size, dtype=torch.bool),
    }  # fmt: skip
    found = []
    for mode in (engine.generation_mode, engine.eval_mode):
        with mode():
            found.append(decode(engine.generate_forward, inputs, **arguments).response_ids_BT.tolist())
    return found


def test_rollouts_under_lora_are_those_of_the_trained_model(tiny_dir: Path, speech: dict[str, Path]) -> None:
    config = make_config(tiny_dir, lora=LORA, loss={"ctc_weight": 0.0}, optim={"lr": 1e-2})
    for merged, beside in run_ranks(2, lora_rollouts, config, speech["train"]):
        assert merged == beside


def offloaded_steps(config: Config, manifest: Path) -> tuple[dict, set[str], int]:
    engine = start(config, LayeredEngine)
    for step in range(3):
        sft_step(engine, manifest, 4, slice(step * 8, step * 8 + 8))
    state = engine.optimizer.state
    devices = {str(v.device) for values in state.values() for v in values.values()}
    return weights(engine), devices, len(state)


def test_offload_takes_the_same_steps(tiny_dir: Path, speech: dict[str, Path]) -> None:
    plain, offloaded = (
        run_ranks(2, offloaded_steps, make_config(tiny_dir, optim={"offload": on}), speech["train"])[0]
        for on in (False, True)
    )
    assert offloaded[1] == {"cpu"}
    assert offloaded[2] == plain[2] > 0
    for name, tensor in plain[0].items():
        assert torch.equal(offloaded[0][name], tensor), name


def test_offloaded_state_visits_the_device_a_bucket_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an accelerator the moves are seen from where they are asked for: state goes there before it is stepped."""
    parameters = [torch.nn.Parameter(torch.randn(10)) for _ in range(5)]
    optimizer = OffloadedAdamW(parameters, lr=0.1)
    monkeypatch.setattr("trainers.offload.BUCKET_NUMEL", 20)
    assert BUCKET_NUMEL > 20
    seen: list[tuple[int, bool]] = []
    move = optimizer._move_state

    def noted(bucket: list[torch.Tensor], *, to_host: bool) -> None:
        seen.append((len(bucket), to_host))
        move(bucket, to_host=to_host)

    monkeypatch.setattr(optimizer, "_move_state", noted)
    for parameter in parameters:
        parameter.grad = torch.ones(10)
    optimizer.step()
    assert seen == [(2, False), (2, True), (2, False), (2, True), (1, False), (1, True)]
    assert [len(group["params"]) for group in optimizer.param_groups] == [5]
