"""Writing and loading ARK-ASR folders: what is in the files, and what is refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opd.arkasr import CODE_FILES, ArkasrConfig, ArkasrForConditionalGeneration
from opd.export import load_model, load_processor, save_arkasr, write_model_card

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


# -- model card --------------------------------------------------------------------------------------------------------


def test_model_card(tmp_path):
    result = {"wer": 0.1234, "cer": 0.05}
    facts = {
        "recipe": "tiny",
        "steps": 600,
        "teacher_note": None,
        "eval": {"unseen|voices": {"before": None, "after": result, "teacher": {"wer": 0.02, "cer": 0.01}}},
        "config": {"optim": {"lr": 0.001}},
    }
    text = write_model_card(tmp_path, facts).read_text(encoding="utf-8")
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "| unseen\\|voices | - | 12.34% / 5.00% | 2.00% / 1.00% |" in text
    assert "| steps | 600 |" in text
    assert "| optim.lr | 0.001 |" in text
    assert "teacher_note" not in text


def test_the_snippet_of_the_card_is_python(tmp_path):
    text = write_model_card(tmp_path, {}).read_text(encoding="utf-8")
    compile(text.split("```python\n")[1].split("```")[0], "README.md", "exec")
