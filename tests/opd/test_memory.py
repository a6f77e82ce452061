"""The memory estimate: parameters as published, activations as autograd saves them, recipes that fit and that do not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from ranks import run_ranks  # noqa: F401  sets the environment that verl is imported under

from opd.arkasr import ArkasrConfig, ArkasrForConditionalGeneration
from opd.config import config_from_dict, list_recipes, load_config
from opd.memory import GB, Lengths, activation_bytes, estimate, main, peak
from opd.model_sizes import PUBLISHED_STUDENTS, sizes_of, student_sizes, teacher_sizes
from opd.parts import named_parts
from opd.schema import Config, LoraConfig
from opd.trainable import choose_trained
from trainers.trained_student import TrainedStudent

ONE_GPU = 80 * GB


@pytest.mark.parametrize(("name", "unique"), [("ARK-ASR-3B", 3_752_273_920), ("ARK-ASR-0.6B", 1_152_556_800)])
def test_published_students_have_their_parameters(name: str, unique: int) -> None:
    sizes = sizes_of(ArkasrConfig(**PUBLISHED_STUDENTS[name]), [], LoraConfig())  # type: ignore[arg-type]
    assert sizes.num_parameters == unique
    assert sizes.num_trained == unique - 1_920_000, "the table of positions that nothing reads"
    assert sizes.root + 32 * 19_676_160 < sizes.num_parameters, "every layer is a group of its own"


def test_ark3b_trains_on_one_gpu_only_with_what_its_recipe_does() -> None:
    assert estimate(load_config(["recipe=ark3b_one_gpu"])).per_gpu < ONE_GPU
    adapters = ["optim.offload=false", "lora.rank=16"]
    assert estimate(load_config(["recipe=ark3b_one_gpu", *adapters])).per_gpu < ONE_GPU
    without = ["student.activation_checkpointing=false", "optim.offload=false"]
    assert estimate(load_config(["recipe=ark3b_one_gpu", *without])).per_gpu > ONE_GPU
    one_rank = ["cluster.num_nodes=1", "cluster.ranks_per_node=1", "cluster.num_teachers=1", "train.batch_size=40"]
    assert estimate(load_config(["recipe=ark3b", *one_rank])).per_gpu > ONE_GPU


@pytest.mark.parametrize("name", ["ark06b", "ark06b_one_gpu", "ark3b"])
def test_the_other_recipes_of_full_size_fit_their_gpus(name: str) -> None:
    assert estimate(load_config([f"recipe={name}"])).per_gpu < ONE_GPU


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_has_an_estimate_or_says_why_not(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    failed = main([f"recipe={name}"])
    captured = capsys.readouterr()
    if failed:  # a model that a script makes before it
        assert str(load_config([f"recipe={name}"]).student.path).startswith("runs/")
        assert "give a local folder of it" in captured.err
    else:
        assert "student rank, one of" in captured.out


def test_what_saves_memory_is_seen_in_the_estimate() -> None:
    def of(*overrides: str) -> Any:
        return estimate(load_config(["recipe=ark3b_one_gpu", *overrides]))

    own = of()
    assert own.host_state == pytest.approx(8 * student_sizes(load_config(["recipe=ark3b_one_gpu"])).num_trained)
    assert of("optim.offload=false").host_state == 0
    assert peak(of("student.activation_checkpointing=false").student) > peak(own.student) + 15 * GB
    assert peak(of("student.dtype=float32").student) > peak(own.student)
    two = of("cluster.ranks_per_node=2", "cluster.num_teachers=2")
    assert two.student["update"]["weights, float32"] == own.student["update"]["weights, float32"] / 2
    assert two.teachers_beside == 1


SMALL = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 384, "vocab_size": 512,
}  # fmt: skip
WHISPER = {
    "d_model": 128, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 512, "num_mel_bins": 80,
    "max_source_positions": 1500,
}  # fmt: skip
ROWS, FRAMES, TEXT = 3, 400, 40


def saved_bytes(config: Config, arkasr: ArkasrConfig) -> int:
    """Bytes of the storages that autograd saves in one forward with gradient, the parameters' own not counted."""
    torch.manual_seed(0)
    arkasr._attn_implementation = "sdpa"
    model = ArkasrForConditionalGeneration(arkasr)
    choose_trained(model, config.student.freeze, config.lora)
    if config.student.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    student = TrainedStudent(model.to(getattr(torch, config.student.dtype))).train()
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    sizes: dict[int, int] = {}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # an address that is given again would be counted once
        return tensor

    ids = torch.full((ROWS, FRAMES // 4 + TEXT), 7)
    ids[:, 4 : 4 + FRAMES // 4] = arkasr.audio_token_id or 0
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    audio_mask = torch.ones(ROWS, 2 * FRAMES)
    audio_mask[0, -8:] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        student(
            lambda hidden_BLD, weight_VD: hidden_BLD.sum(), input_ids=ids, attention_mask=mask,
            audios=torch.randn(ROWS, 80, 2 * FRAMES), audio_mask=audio_mask,
        )  # fmt: skip
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"student": {"activation_checkpointing": True}},
        {"student": {"freeze": ["encoder"]}},
        {"student": {"freeze": ["encoder", "adapter"]}},
        {"student": {"freeze": ["decoder"]}},
        {"student": {"freeze": ["decoder"], "activation_checkpointing": True}},
        {"lora": {"rank": 8}},
        {"lora": {"rank": 8, "dropout": 0.1}},
        {"lora": {"rank": 8, "target_modules": ["q_proj", "v_proj"]}},
    ],
    ids=str,
)
def test_activations_are_what_autograd_saves(sections: dict[str, dict[str, Any]], dtype: str) -> None:
    values: dict[str, Any] = {"recipe": "test", "data": {"train_manifest": "none"}, "teacher": {"path": "none"}}
    values["student"] = {"path": "none", "dtype": dtype} | sections.get("student", {})
    config = config_from_dict(values | {"lora": sections.get("lora", {})})
    arkasr = ArkasrConfig(**SMALL, whisper_config=WHISPER, audio_token_id=5)  # type: ignore[arg-type]
    sizes = sizes_of(arkasr, config.student.freeze, config.lora)
    lengths = Lengths(0, 0, ROWS, 1, FRAMES, FRAMES // 4 + TEXT, 0)
    expected, _ = activation_bytes(config, sizes, lengths)
    found = saved_bytes(config, arkasr)
    print(f"{sections} {dtype}: estimated {expected:,.0f}, saved {found:,}, {expected / found:.3f}")
    assert expected == pytest.approx(found, rel=0.1)


def test_lengths_are_part_of_the_estimate() -> None:
    base = load_config(["recipe=ark3b_one_gpu"])
    longer = dataclasses.replace(base, rollout=dataclasses.replace(base.rollout, max_new_tokens=512))
    assert estimate(longer).student["rollout"]["KV cache"] > estimate(base).student["rollout"]["KV cache"]


def test_the_teacher_scores_what_the_student_makes_of_a_token_budget() -> None:
    base = load_config(["recipe=ark3b_one_gpu"])
    by_tokens = dataclasses.replace(base, train=dataclasses.replace(base.train, micro_batch_tokens=40_000))
    ((_, few), (_, many)) = (next(iter(estimate(config).teachers.items())) for config in (base, by_tokens))
    assert many["scoring"]["activations"] > 2 * few["scoring"]["activations"]


def test_a_stage_has_the_sizes_of_the_stage_it_starts_from(capsys: pytest.CaptureFixture[str]) -> None:
    """TD and OPD train what SFT made, whose own sizes are in the recipe; a teacher may be another stage's student."""
    taught = ["recipe=tiny_ladder", "stages=[sft, td, opd]", "ladder.opd.teacher.path=stage:td"]
    of_stage = {part.title: part for part in named_parts(load_config(taught))}
    made = {name: config.student for name, config in of_stage["stage opd"].before.items()}
    assert list(made) == ["sft", "td"]
    sft, opd = of_stage["stage sft"].config, of_stage["stage opd"].config
    assert student_sizes(opd, made) == student_sizes(sft)
    assert teacher_sizes(opd.teacher, made).num_parameters == student_sizes(sft).num_parameters
    assert main(taught) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("stage ")] == [
        "stage sft (sft)", "stage td (td)", "stage opd (opd)",
    ]  # fmt: skip
    assert main(["recipe=tiny_ladder", "ladder.td.student.path=stage:opd"]) == 1
    assert "error: student.path=stage:opd: no stage opd comes before this one" in capsys.readouterr().err


def test_a_comparison_is_estimated_once_for_each_arm(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe=tiny_compare"]) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("setting ")]
    assert len(titles) == len(set(titles)) == 5 + 4 + 3 + 2


def test_a_model_of_unknown_size_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe=tiny", "student.path=nobody/nothing"]) == 1
    assert "error: student.path=nobody/nothing: no folder with a config.json" in capsys.readouterr().err
    assert main(["recipe=tiny_qwen3", "teacher.path=nobody/nothing"]) == 1
    assert "error: teacher.path=nobody/nothing: its sizes are not known" in capsys.readouterr().err
