"""Recipes, overrides and what is refused before anything starts."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from opd.config import RECIPES_DIR, Config, config_from_dict, describe, list_recipes, load_config, take_flag
from opd.resolve import resolve
from opd.validate import doubts

SEVERAL = ["recipe=tiny", "data.train_manifest=null", "data.train_manifests.a.path=a.jsonl"]

STREAM = "data.train_manifest=hf:a?stream=true"


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_loads(name: str) -> None:
    config = load_config([f"recipe={name}"])
    assert config.recipe_name == name
    assert config_from_dict(config.to_dict()) == config
    assert "#" not in str(config.to_dict()), "a comment without a space before it is part of the value"


@pytest.mark.parametrize("name", ["ark06b", "ark06b_one_gpu", "ark3b", "ark3b_one_gpu"])
def test_a_recipe_of_full_size_explains_each_key_and_says_how_its_teacher_runs(name: str) -> None:
    lines = (RECIPES_DIR / f"{name}.yaml").read_text().splitlines()
    bare = [line for line in lines if re.match(r"\s*\w+: *[^#\s]", line) and " # " not in line]
    assert bare == []
    config = load_config([f"recipe={name}"])
    assert (config.loss.top_k, config.train.batch_size // config.num_ranks) == (32, 40)
    assert config.num_ranks == config.num_teachers == (1 if name.endswith("one_gpu") else 24)
    assert config.teacher.python_path == ".venv-teacher/bin/python", "verl's transformers has no Qwen3-ASR"
    assert config.cluster.gpus_per_rank + config.cluster.gpus_per_teacher <= 1


def test_overrides_win_over_the_recipe() -> None:
    config = load_config(
        ["recipe=tiny", "optim.lr=1e-4", "data.eval_manifests.mine=a.jsonl", "student.freeze=[encoder]"]
    )
    assert config.optim.lr == pytest.approx(1e-4)
    assert config.data.eval_manifests["mine"] == "a.jsonl"
    assert config.student.freeze == ["encoder"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no recipe given.*tiny_teacher"),
        (["recipe=tinyy"], "unknown recipe; there are .*tiny"),
        (["recipe=nowhere/x.yaml"], "no such file"),
        (["recipe=tiny", "optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?"),
        (["recipe=tiny", "optimm.lr=1"], "unknown key optimm.lr; did you mean optim.lr?"),
        (["recipe=tiny", "optim=1"], "optim is a section"),
        (["recipe=tiny", "seed.x=1"], "seed has no keys below it"),
        (["recipe=tiny", "verbose"], "write it as section.key=value"),
        (["recipe=tiny", "lr=1"], r"unknown key lr; did you mean optim.lr\?"),
        (["recipe=tiny", "train.lr=1"], r"unknown key train.lr; did you mean optim.lr\?"),
        (["recipe=tiny", "batch_size=1"], r"did you mean train.batch_size or eval.batch_size\?"),
        (["recipe=tiny", "optim.learning_rate=1"], "unknown key optim.learning_rate; optim has lr, betas, eps"),
        (["recipe=tiny", "zzz=1"], "unknown key zzz; print_config=true shows every key"),
        (["recipe=tiny", "run_dir="], r"run_dir= is empty: give it a value, or leave it out \(run_dir=null\)"),
        (["recipe=tiny", "optim.lr=fast"], "^optim.lr=fast: must be a number$"),
        (["recipe=tiny", "train.num_steps=abc"], "^train.num_steps=abc: must be a whole number$"),
        (["recipe=tiny", "train.num_steps=1.5"], "^train.num_steps=1.5: must be a whole number$"),
        (["recipe=tiny", "optim.betas=[a,b]"], r"^optim.betas=\['a', 'b'\]: must be a list of numbers"),
        (["recipe=tiny", "export.private=perhaps"], "^export.private=perhaps: must be true or false, or null$"),
        (["recipe=tiny", "wandb.mode=off"], "wandb.mode=off: must be one of online, offline, disabled"),
        (["recipe=tiny", "optim.lr=1e400"], "optim.lr=inf: must be a finite number"),
        (["recipe=tiny", "optim.max_grad_norm=.inf"], "optim.max_grad_norm=inf: must be a finite number"),
        (["recipe=tiny", "teacher.gate_max_wer=.nan"], "teacher.gate_max_wer=nan: must be a finite number"),
        (["recipe=tiny", "loss.max_importance=-1"], "loss.max_importance=-1.0: must be above 0"),
        (["recipe=tiny", "td.min_avg_logprob=3"], "td.min_avg_logprob=3.0: must be at most 0"),
        (["recipe=tiny", "data.num_threads=100000"], "data.num_threads=100000: must be at most 256"),
        (["recipe=tiny", "optim.lr=0"], "optim.lr=0.*above 0"),
        (["recipe=tiny", "data.train_manifest=null"], "data: neither is given; give data.train_manifest"),
        (["recipe=tiny", "data.train_manifests.a.path=a.jsonl"], "data: both are given; .* set the other to null"),
        ([*SEVERAL, "data.train_manifests.b=b.jsonl"], r"train_manifests.b: must be {path: ..., weight: ...}"),
        ([*SEVERAL, "data.train_manifests.b.wight=2"], r"train_manifests.b: must be {path"),
        ([*SEVERAL, "data.train_manifests.a.weight=0"], "train_manifests.a.weight=0: must be a number above 0"),
        (
            ["recipe=tiny", "teacher.routes={a: {gate_max_wer: -0.2}}"],
            r"routes\.a\.gate_max_wer=-0\.2: must be a WER from 0",
        ),
        (
            ["recipe=tiny", "stage=td", "teacher.routes={a: {gate_max_wer: 0.2}}"],
            r"routes\.a\.gate_max_wer: belongs to stage",
        ),
        ([*SEVERAL, "data.default_languages.b=German"], r"default_languages.b=German: .* by its name \(a, seen_voices"),
        ([*SEVERAL, "data.train_manifests.a.path=stage:td"], "only data.train_manifest may name another stage"),
        ([*SEVERAL, "stage=td"], "stage=td: works with one manifest"),
        ([*SEVERAL, "data.sorted_epochs=1"], "data.sorted_epochs: works with one manifest"),
        (["recipe=tiny", STREAM, "stage=td"], "stage=td: not with hf:a.stream=true, which is a stream"),
        (["recipe=tiny", STREAM, "data.sorted_epochs=1"], "data.sorted_epochs: not with hf:a"),
        (
            ["recipe=tiny", STREAM, "student.path=null", "student.init={vocab_size: 300}"],
            "student.init .* not with hf:a",
        ),
        (["recipe=tiny", "loss.kind=mse"], "loss.kind=mse: must be one of forward_kl"),
        (["recipe=tiny", "engine=megatron"], "engine=megatron: must be one of fsdp2, deepspeed"),
        (["recipe=tiny", "train.batch_size=31"], "does not divide over 2 ranks.*train.batch_size=30"),
        (["recipe=tiny", "train.micro_batch_size=7"], "does not divide the 16 utterances.*train.micro_batch_size=4"),
        (["recipe=tiny", "loss.kind=sampled_kl"], "rollout.temperature above 0"),
        (["recipe=tiny", "student.freeze=[mouth]"], "encoder, adapter, decoder"),
        (["recipe=tiny", "student.freeze=[encoder,adapter,decoder]"], "nothing is left to train"),
        (["recipe=tiny", "lora.rank=8", "student.freeze=[decoder]"], "take decoder out of it, or set lora.rank=0"),
        (["recipe=tiny", "lora.target_modules=[q]"], "q is no layer of the decoder; any of q_proj"),
        (["recipe=tiny", "lora.rank=8", "lora.target_modules=[]"], "name the layers that get an adapter"),
        (["recipe=tiny", "lora.dropout=1"], "lora.dropout=1: must be from 0 to below 1"),
        (["recipe=tiny", "teacher.path=null"], "teacher.path is missing"),
        (["recipe=tiny", "stages=[sft,sft]"], "a name stands twice"),
        (["recipe=tiny", "eval.best_by=other"], "not in data.eval_manifests"),
        (["recipe=tiny", "data.max_bad_share=2"], "between 0 and 1"),
    ],
)
def test_bad_input_gets_one_clear_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_config(arguments)
    assert "\n" not in str(caught.value)


def test_a_wrong_key_in_a_recipe_names_the_file(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("stage: opd\ntrain:\n  num_step: 3\n")
    with pytest.raises(ValueError, match=r"mine.yaml: unknown key train.num_step; did you mean train.num_steps\?"):
        load_config([f"recipe={recipe}"])
    recipe.write_text("train: 3\n")
    with pytest.raises(ValueError, match="train is a section"):
        load_config([f"recipe={recipe}"])
    recipe.write_text("- a\n")
    with pytest.raises(ValueError, match="mapping"):
        load_config([f"recipe={recipe}"])


def test_a_truth_value_where_a_recipe_is_to_hold_text_asks_for_quotes(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("wandb: {mode: off}\n")
    with pytest.raises(ValueError, match="wandb.mode=False: must be text; put it in quotes"):
        load_config([f"recipe={recipe}"])


def test_values_are_read_as_their_keys_hold_them() -> None:
    config = load_config(
        ["recipe=tiny", "train.num_steps=1e2", "teacher.kind=qwen3_asr", "teacher.language=no", "export.license=1e5"]
    )
    assert (config.train.num_steps, config.teacher.language, config.export.license) == (100, "no", "1e5")


def test_a_warm_up_that_outlasts_the_run_is_doubted() -> None:
    assert doubts(load_config(["recipe=tiny"])) == []
    (line,) = doubts(load_config(["recipe=tiny", "train.num_steps=3"]))
    assert line.startswith("warning: optim.warmup_steps=50: the run ends after 3 steps")


def test_print_config_shows_each_key_with_its_meaning() -> None:
    config = load_config(["recipe=tiny"])
    lines = describe(config).splitlines()
    for f in dataclasses.fields(Config):
        value = getattr(config, f.name)
        for g in dataclasses.fields(value) if dataclasses.is_dataclass(value) else [f]:
            assert any(line.strip().startswith(f"{g.name}:") and g.metadata["meaning"] in line for line in lines), (
                g.name
            )


def test_a_flag_is_true_or_false_and_nothing_else() -> None:
    assert take_flag(["recipe=tiny", "print_config=true"], "print_config") == (True, ["recipe=tiny"])
    assert take_flag(["--print_config=true", "recipe=tiny"], "print_config") == (True, ["recipe=tiny"])
    assert take_flag(["recipe=tiny", "print_config=false"], "print_config") == (False, ["recipe=tiny"])
    for wrong in ("print_config=yes", "print_config", "print_config="):
        with pytest.raises(ValueError, match="must be true or false"):
            take_flag(["recipe=tiny", wrong], "print_config")


def test_teachers_are_counted_over_all_routes() -> None:
    routes = "teacher.routes={zh: {match: {language: zh}, num_workers: 3}, rest: {}}"
    assert load_config(["recipe=tiny", routes]).num_teachers == 3 + 2
    assert load_config(["recipe=tiny"]).num_teachers == 2


def test_several_manifests_are_made_where_they_can_be_and_have_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"audio": "a.wav"}')
    sources = ["data.train_manifests.a.weight=0.5", "data.train_manifests.b.path=nowhere.jsonl"]
    data = [*SEVERAL, f"data.train_manifests.a.path={tmp_path}/x/../a.jsonl", *sources, "data.eval_manifests={}"]
    (tmp_path / "x").mkdir()
    data.append("data.train_manifests.c.path=hf:recipes?split=train&text=words")
    config = resolve(load_config([*data, f"run_dir={tmp_path / 'run'}"]))
    assert config.data.train_manifest is None
    assert config.data.train_manifests == {
        "a": {"path": str((tmp_path / "a.jsonl").resolve()), "weight": 0.5},
        "b": {"path": "nowhere.jsonl"},
        "c": {"path": f"hf:{RECIPES_DIR}?split=train&text=words"},
    }
    assert config_from_dict(config.to_dict()) == config
