"""Writing and loading ARK-ASR folders: what is in the files, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stopped_run import stopped_run

from opd.arkasr import CODE_FILES, ArkasrConfig, ArkasrForConditionalGeneration
from opd.export import export_checkpoint, load_model, load_processor, main, save_arkasr

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def model(tiny_dir):
    return load_model(tiny_dir)


@pytest.fixture(scope="module")
def processor(tiny_dir):
    return load_processor(tiny_dir)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_files_of_an_export(model, processor, tmp_path):
    out = save_arkasr(model.state_dict(), model.config, processor, tmp_path / "out", dtype="bfloat16")
    ids = {"bos_token_id": 316, "eos_token_id": 318, "pad_token_id": 316}
    ids = {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in
           zip(ids, ("<|endoftext|>", "<|im_end|>", "<|endoftext|>"), strict=True)}  # fmt: skip

    config = read_json(out / "config.json")
    assert config["auto_map"] == {
        "AutoConfig": "configuration_arkasr.ArkasrConfig",
        "AutoModelForCausalLM": "modeling_arkasr.ArkasrForConditionalGeneration",
        "AutoProcessor": "processing_arkasr.ArkasrProcessor",
    }
    assert config["architectures"] == ["ArkasrForConditionalGeneration"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 1e6
    assert config["dtype"] == "bfloat16"
    assert config["whisper_config"]["d_model"] == 64
    assert {name: config[name] for name in ids} == ids
    assert config["audio_token_id"] == processor.audio_token_id

    generation = read_json(out / "generation_config.json")
    assert generation.pop("transformers_version")
    assert generation == {"_from_model_config": True, **ids}
    tokenizer = read_json(out / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "extra_special_tokens"} & set(tokenizer)
    markers = ["<|user|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<|assistant|>", "<|system|>"]
    assert tokenizer["additional_special_tokens"] == markers
    assert read_json(out / "special_tokens_map.json")["additional_special_tokens"] == markers
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert read_json(out / name)["auto_map"] == {"AutoProcessor": "processing_arkasr.ArkasrProcessor"}
        assert read_json(out / name)["processor_class"] == "ArkasrProcessor"
    assert read_json(out / "preprocessor_config.json")["feature_extractor_type"] == "WhisperFeatureExtractor"
    assert read_json(out / "processor_config.json")["merge_factor"] == 4

    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(model.state_dict()) - {"lm_head.weight"}
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    source = ArkasrConfig.__module__.rpartition(".")[0].replace(".", "/")
    for name in CODE_FILES:
        assert (out / name).read_bytes() == (_root() / source / name).read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def _root():
    from pathlib import Path

    return Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dtype", ["float32", torch.float16, "bfloat16"])
def test_weights_survive(model, processor, tmp_path, dtype):
    save_arkasr(model.state_dict(), model.config, processor, tmp_path / "out", dtype=dtype, with_code=False)
    again = load_model(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))
    assert not again.training
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.to(kind).float()), name
    assert load_processor(tmp_path / "out").prompt_ids(100) == processor.prompt_ids(100)


def test_an_export_replaces_an_export_but_nothing_else(model, processor, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is fine
    save_arkasr(model.state_dict(), model.config, processor, out, dtype="float32")
    (out / "leftover.txt").write_text("x")
    save_arkasr(model.state_dict(), model.config, processor, out, dtype="float16", with_code=False)
    assert not (out / "leftover.txt").exists()
    assert not (out / "modeling_arkasr.py").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="no earlier export"):
        save_arkasr(model.state_dict(), model.config, processor, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_failed_export_leaves_the_old_one(model, processor, tmp_path, monkeypatch):
    out = save_arkasr(model.state_dict(), model.config, processor, tmp_path / "out", dtype="float32")
    before = (out / "model.safetensors").read_bytes()
    monkeypatch.setattr("opd.export.save_file", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_arkasr(model.state_dict(), model.config, processor, out, dtype="float16")
    assert (out / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def bad_states(state):
    renamed = dict(state)
    renamed["audio_encoder.norm.bias"] = renamed.pop("audio_encoder.layer_norm.bias")
    yield renamed, "missing .*audio_encoder.layer_norm.bias.* unexpected .*audio_encoder.norm.bias"
    yield state | {"audio_encoder.adapting.2.bias": torch.zeros(3)}, r"adapting.2.bias: shape \(3,\)"
    yield state | {"lm_head.weight": state[EMBEDDING] + 1}, "lm_head.weight differs"
    yield state | {"model.norm.weight": torch.full((64,), 1e6)}, "not finite in torch.float16"


def test_weights_that_do_not_fit_are_refused(model, processor, tmp_path):
    for state, message in bad_states(model.state_dict()):
        with pytest.raises(ValueError, match=message):
            save_arkasr(state, model.config, processor, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_processor_that_does_not_fit_is_refused(model, processor, tmp_path):
    for name, value in (("audio_token_id", 5), ("merge_factor", 2), ("vocab_size", 100)):
        config = ArkasrConfig.from_dict(model.config.to_dict() | {name: value})
        with pytest.raises(ValueError, match=name):
            save_arkasr(model.state_dict(), config, processor, tmp_path / "out")
    with pytest.raises(ValueError, match="float8"):
        save_arkasr(model.state_dict(), model.config, processor, tmp_path / "out", dtype="float8")


def test_an_untied_model_keeps_its_head(model, processor, tmp_path):
    config = ArkasrConfig.from_dict(model.config.to_dict() | {"tie_word_embeddings": False})
    torch.manual_seed(0)
    untied = ArkasrForConditionalGeneration(config)
    save_arkasr(untied.state_dict(), config, processor, tmp_path / "out", dtype="float32")
    again = load_model(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, untied.lm_head.weight)
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)


# -- loading -----------------------------------------------------------------------------------------------------------


def changed_copy(tiny_dir, path, change):
    shutil.copytree(tiny_dir, path)
    state = load_file(path / "model.safetensors")
    change(state)
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_stored_copy_of_the_tied_head_is_accepted(tiny_dir, model, tmp_path):
    path = changed_copy(tiny_dir, tmp_path / "m", lambda s: s.update({"lm_head.weight": s[EMBEDDING].clone()}))
    again = load_model(path)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("audio_encoder.layer_norm.bias"), "missing: audio_encoder.layer_norm.bias"),
        (lambda s: s.pop(EMBEDDING), "missing: .*model.embed_tokens.weight"),
        (lambda s: s.update({"audio_encoder.whisper.layer_norm.weight": torch.ones(64)}),
         "unexpected: audio_encoder.whisper.layer_norm.weight"),
        (lambda s: s.update({"audio_encoder.adapting.0.weight": torch.ones(64, 4)}),
         "wrong shape: audio_encoder.adapting.0.weight"),
        (lambda s: s.update({"lm_head.weight": s[EMBEDDING] + 1}), "lm_head.weight differs"),
    ],
)  # fmt: skip
def test_loading_is_strict(tiny_dir, tmp_path, change, message):
    path = changed_copy(tiny_dir, tmp_path / "m", change)
    with pytest.raises(ValueError, match=message):
        load_model(path)


def test_a_config_in_the_style_of_transformers_4_is_read(tiny_dir, model, tmp_path):
    path = tmp_path / "m"
    shutil.copytree(tiny_dir, path)
    config = read_json(path / "config.json")
    del config["rope_parameters"]
    config |= {"rope_theta": 5e5, "torch_dtype": config.pop("dtype"), "rope_scaling": None, "unknown_key": 1}
    (path / "config.json").write_text(json.dumps(config))
    again = load_model(path)
    assert again.config.rope_parameters["rope_theta"] == 5e5
    frequencies = again.model.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 5e5 ** (-torch.arange(0, 32, 2) / 32))
    assert not torch.allclose(frequencies, model.model.rotary_emb.inv_freq)


# -- python -m opd.export ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tiny_dir, tmp_path_factory):
    return stopped_run(tmp_path_factory.mktemp("runs") / "stopped", tiny_dir)


@pytest.mark.parametrize(
    ("step", "wer", "is_final"), [(10, 40.0, False), (15, None, False), (20, 21.0, True), (30, 30.0, False)]
)
def test_a_checkpoint_has_its_own_error_rates(run_dir, model, tmp_path, step, wer, is_final):
    out = export_checkpoint(run_dir, step, tmp_path / "out", {"license": "mit"})
    norm = load_file(out / "model.safetensors")["model.norm.weight"]
    assert torch.equal(norm, (model.state_dict()["model.norm.weight"] + step).to(norm.dtype))
    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.language) == ("mit", ["en"])
    measured = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results or []}
    expected = {("seen_voices", "wer"): wer, ("seen_voices", "cer"): round(wer / 2, 2)} if wer else {}
    assert measured == expected
    assert ("not yet rounded to bfloat16" in card.text) == (wer is not None and not is_final)
    assert (f"| 150.00% / 75.00% | {wer:.2f}% / {wer / 2:.2f}% | 3.00% / 1.50% |" in card.text) if wer else True
    if wer:
        assert {r.metric_args["normaliser"] for r in card.data.eval_results} == {"opd-basic-1"}
    assert f"| step | {step} |" in card.text
    assert "| recipe | tiny |" in card.text


@pytest.mark.parametrize(("step", "said"), [(20, "rounded to bfloat16, these are in float32"), (30, None)])
def test_a_checkpoint_in_another_type_than_the_run_exports(run_dir, model, tmp_path, capsys, step, said):
    out = tmp_path / "out"
    assert main([f"run_dir={run_dir}", f"step={step}", f"out_dir={out}", "dtype=float32"]) == 0
    norm = load_file(out / "model.safetensors")["model.norm.weight"]
    assert norm.dtype == torch.float32
    assert torch.equal(norm, model.state_dict()["model.norm.weight"].float() + step)
    text = (out / "README.md").read_text(encoding="utf-8")
    assert (said or "") in text
    assert "not yet rounded" not in text
    assert main([f"run_dir={run_dir}", f"out_dir={out}", "dtype=int8"]) == 1
    assert "dtype='int8': must be one of float32, bfloat16, float16" in capsys.readouterr().err


def test_a_run_without_a_summary(run_dir, tmp_path):
    """Killed in mid-run, or in the final evaluation: what was measured between the steps is still known."""
    copy = tmp_path / "killed"
    shutil.copytree(run_dir, copy)
    (copy / "summary.json").unlink()
    with open(copy / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 20, "eval/wer')  # the last line, half written
    text = export_checkpoint(copy, 20).joinpath("README.md").read_text(encoding="utf-8")
    assert "value: 20.0" in text
    assert "value: 21.0" not in text


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "push=ORG/NAME [private=true] [revision=BRANCH]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run_dir=... is missing"),
        (["run_dir=x", "push_to=a/b"], "unknown argument 'push_to=a/b'; there are run_dir=..., "),
        (["run_dir=x", "out_dir"], "unknown argument 'out_dir'"),
        (["run_dir=x", "step="], "step= is empty"),
        (["run_dir=x", "step=last"], "step=last: must be a whole number"),
        (["run_dir=x", "private=true"], "private= is of no use without push="),
        (["run_dir=x", "push=a/b", "private=yes"], "private=yes: must be true or false"),
        (["folder=x", "license=mit", "push=a/b"], "license= does not go with folder="),
        (["folder=x", "run_dir=x", "push=a/b"], "run_dir= does not go with folder="),
        (["folder=x", "eval_dataset.a=b/c:d", "push=a/b"], "eval_dataset.a= does not go with folder="),
        (["folder=x"], "push=ORG/NAME is missing"),
        (["folder={seed}", "push=name"], "push=name: must be written ORG/NAME"),
        (["folder=seeds/nope", "push=a/b"], "folder=seeds/nope: there is no such folder; give the folder of an export"),
        (["folder={run}", "push=a/b"], "has no config.json, so it is no export"),
        (["run_dir=seeds/nope", "push=a/b"], "seeds/nope: there is no run here (no config.yaml)"),
        (["run_dir={run}", "out_dir={run}/summary.json"], "summary.json is a file; choose a folder"),
        (["run_dir={run}", "out_dir={run}/summary.json/x"], "summary.json is a file; choose a folder"),
        (
            ["run_dir={run}", "out_dir=/proc/x"],
            "out_dir=/proc/x: it cannot be made or written (No such file or directory)",
        ),
        (["run_dir={run}", "out_dir={run}/checkpoints"], "holds files but no config.json, so it is no earlier export"),
        (["run_dir={run}", "step=11"], "no complete checkpoint of step 11; there are [10, 15, 20, 30]"),
        (
            ["run_dir={run}", "step=15", "eval_dataset.seen_voices=a/b:c"],
            "no WER on a set seen_voices; it has one on none",
        ),
        (["run_dir={run}", "datasets=a/b,c"], "datasets=c: must be a Hub id"),
        (["run_dir={run}", "push=lab/digits"], "push=lab/digits: HF_HUB_OFFLINE"),
    ],
)
def test_arguments_that_are_refused(run_dir, tiny_dir, tmp_path, capsys, arguments, message):
    arguments = [argument.format(run=run_dir, seed=tiny_dir) for argument in arguments]
    arguments += [f"out_dir={tmp_path / 'out'}"] * ("run_dir" in str(arguments) and "out_dir" not in str(arguments))
    assert main(arguments) == 1
    out, error = capsys.readouterr()
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert out == ""
    assert not list(tmp_path.iterdir())


def test_from_a_run_to_the_hub(run_dir, tmp_path):
    """One command line exports and pushes; without a token it does nothing; a finished folder can be pushed again."""
    script = """
import os, sys
from opd.export import main
token = os.environ.pop("HF_TOKEN")
run, out = (f"run_dir={sys.argv[1]}", "step=20"), f"out_dir={sys.argv[2]}"
where = ("push=lab/digits", "private=true", "revision=v2")
print(main([*run, out, *where]), os.path.exists(sys.argv[2]))
os.environ["HF_TOKEN"] = token
print(main([*run, out, *where, "license=mit", "datasets=lab/a,lab/b", "base_model=lab/start",
            "eval_dataset.seen_voices=org/bench:seen"]))
print(main([f"folder={sys.argv[2]}", *where]))
"""
    out = tmp_path / "out"
    with HubServer() as hub:
        command = [sys.executable, "-c", script, run_dir, out]
        environment = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(_root())}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "error: push=lab/digits: there is no token" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "1 False", done.stderr
    assert lines[1] == f"export: {out}"
    commits = hub.repositories["lab/digits"].branches["v2"]
    url = f"{hub.url}/lab/digits/commit/{commits[-1].id}"
    assert lines[2].startswith(f"push: {url} (uploaded {len(commits[-1].files) - 1} of its files, ")
    assert lines[3:] == ["0", f"push: {url} has all of it already, nothing was uploaded", "0"]
    assert len(commits) == 2
    assert hub.repositories["lab/digits"].private
    (tmp_path / "README.md").write_bytes(commits[-1].files["README.md"].content)
    metadata = ModelCard.load(tmp_path / "README.md").data.to_dict()
    assert metadata["license"] == "mit"
    assert metadata["datasets"] == ["lab/a", "lab/b"]
    assert metadata["base_model"] == "lab/start"
    assert b"value: 21.0" in commits[-1].files[".eval_results/opd-seen_voices.yaml"].content
    assert commits[-1].files["model.safetensors"].content == (out / "model.safetensors").read_bytes()
