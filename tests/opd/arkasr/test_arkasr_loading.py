"""Checkpoints as they are published and re-saved: names and shapes, the forms that are read, and what is refused."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opd.arkasr import ArkasrConfig, ArkasrForConditionalGeneration, load_model, load_processor

FIXTURES = Path(__file__).parent / "fixtures"
SEEDS = Path(__file__).resolve().parents[3] / "seeds"
EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "audio_encoder.layer_norm.bias"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PUBLISHED = {
    "ark_asr_3b": {
        "tensors": 926, "parameters": 3_752_273_920, "stored_bytes": 8_126_877_696, "decoder": 2_774_773_760,
        "embed_tokens": 311_164_928, "adapter": 29_368_832,
    },
    "ark_asr_06b": {
        "tensors": 782, "parameters": 1_152_556_800, "stored_bytes": 2_598_926_336, "decoder": 357_898_112,
        "embed_tokens": 146_906_368, "adapter": 10_785_920,
    },
}  # fmt: skip
# (hidden_size, layers, query width, key-value width, MLP width, vocabulary)
DECODERS = {"ark_asr_3b": (2048, 36, 2048, 256, 11008, 151936), "ark_asr_06b": (896, 24, 896, 128, 4864, 163958)}


def published_tensors(name: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what is stored, written from the table of the format."""
    width, num_layers, query, key_value, inner, vocab = DECODERS[name]
    shapes: dict[str, tuple[int, ...]] = {}

    def add(prefix: str, weight: tuple[int, ...], bias: bool = True) -> None:
        shapes[f"{prefix}.weight"] = weight
        if bias:
            shapes[f"{prefix}.bias"] = weight[:1]

    add("audio_encoder.whisper.conv1", (1280, 128, 3))
    add("audio_encoder.whisper.conv2", (1280, 1280, 3))
    add("audio_encoder.whisper.embed_positions", (1500, 1280), bias=False)
    for i in range(32):
        layer = f"audio_encoder.whisper.layers.{i}."
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            add(f"{layer}self_attn.{projection}", (1280, 1280), bias=projection != "k_proj")
        add(f"{layer}self_attn_layer_norm", (1280,))
        add(f"{layer}fc1", (5120, 1280))
        add(f"{layer}fc2", (1280, 5120))
        add(f"{layer}final_layer_norm", (1280,))
    add("audio_encoder.layer_norm", (1280,))
    add("audio_encoder.adapting.0", (2 * width, 5120))
    add("audio_encoder.adapting.2", (width, 2 * width))
    add("model.embed_tokens", (vocab, width), bias=False)
    for i in range(num_layers):
        layer = f"model.layers.{i}."
        for projection, size in (("q_proj", query), ("k_proj", key_value), ("v_proj", key_value)):
            add(f"{layer}self_attn.{projection}", (size, width))
        add(f"{layer}self_attn.o_proj", (width, query), bias=False)
        for projection, shape in (
            ("gate_proj", (inner, width)), ("up_proj", (inner, width)), ("down_proj", (width, inner))
        ):  # fmt: skip
            add(f"{layer}mlp.{projection}", shape, bias=False)
        add(f"{layer}input_layernorm", (width,), bias=False)
        add(f"{layer}post_attention_layernorm", (width,), bias=False)
    add("model.norm", (width,), bias=False)
    add("lm_head", (vocab, width), bias=False)
    return shapes


def as_transformers_5(fields: dict) -> dict:
    """The same configuration as transformers 5 writes it: dtype for torch_dtype, rope_parameters for rope_theta."""
    whisper = dict(fields["whisper_config"])
    whisper["dtype"] = whisper.pop("torch_dtype")
    later = {
        "dtype": fields["torch_dtype"],
        "rope_parameters": {"rope_theta": fields["rope_theta"], "rope_type": "default"},
        "transformers_version": "5.10.4",
        "whisper_config": whisper,
        "a_key_of_the_future": {"x": [1]},
    }
    kept = fields.keys() - {"torch_dtype", "rope_theta", "rope_scaling"}
    return {key: fields[key] for key in kept} | later


@pytest.mark.parametrize("style", ["transformers 4", "transformers 5"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints(name, style, tmp_path):
    fields = json.loads((FIXTURES / f"{name}.json").read_text())
    write_json(tmp_path / "config.json", fields if style == "transformers 4" else as_transformers_5(fields))
    config = ArkasrConfig.from_pretrained(tmp_path)
    assert config.dtype == torch.bfloat16
    assert config.rope_theta == config.rope_parameters["rope_theta"] == 1e6
    with torch.device("meta"):
        model = ArkasrForConditionalGeneration(config)
    state = model.state_dict()
    expected = PUBLISHED[name]
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == published_tensors(name)
    assert len(state) == expected["tensors"]
    assert 2 * sum(tensor.numel() for tensor in state.values()) == expected["stored_bytes"]
    count = {key: parameter.numel() for key, parameter in model.named_parameters()}  # tied ones once
    assert sum(count.values()) == expected["parameters"]
    parts = {
        "decoder": sum(n for key, n in count.items() if key.startswith(("model.layers.", "model.norm."))),
        "embed_tokens": count[EMBEDDING],
        "encoder": sum(n for key, n in count.items() if key.startswith("audio_encoder.whisper.")) - 1_920_000,
        "embed_positions": count["audio_encoder.whisper.embed_positions.weight"],
        "adapter": sum(
            n for key, n in count.items() if key.startswith(("audio_encoder.layer_norm", "audio_encoder.adapting"))
        ),
    }
    assert parts == {
        "decoder": expected["decoder"], "embed_tokens": expected["embed_tokens"], "encoder": 635_046_400,
        "embed_positions": 1_920_000, "adapter": expected["adapter"],
    }  # fmt: skip
    assert sum(parts.values()) == expected["parameters"]


# -- forms that are read -----------------------------------------------------------------------------------------------


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def change_config(folder: Path, remove: tuple[str, ...] = (), **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", {key: value for key, value in config.items() if key not in remove} | fields)


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> None:
    (folder / SINGLE).unlink(missing_ok=True)
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    write_json(folder / INDEX, {"metadata": {"total_size": 0}, "weight_map": weight_map})


@pytest.fixture
def folder(tiny_dir, tmp_path):
    """A copy of the tiny checkpoint (one file, float32, no lm_head), to be changed."""
    return Path(shutil.copytree(tiny_dir, tmp_path / "m"))


@pytest.fixture
def sharded(folder):
    """The same in two shards with an index; the embedding is in the second."""
    state = load_file(folder / SINGLE)
    second = {name: tensor for name, tensor in state.items() if name.startswith("model.")}
    first = {name: tensor for name, tensor in state.items() if name not in second}
    write_shards(folder, {"model-1.safetensors": first, "model-2.safetensors": second})
    return folder


def logits(model: ArkasrForConditionalGeneration) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, 2, *[model.config.audio_token_id] * 5, 3, 4]])
    with torch.no_grad():
        return model(input_ids=ids, audios=torch.randn(1, 80, 40, generator=generator)).logits


def reference(tiny_dir: Path, dtype: torch.dtype, **changes: object) -> ArkasrForConditionalGeneration:
    """The model without the loader: built in float32, then filled with the tensors as `dtype` stores them."""
    fields = json.loads((tiny_dir / "config.json").read_text(encoding="utf-8")) | changes
    model = ArkasrForConditionalGeneration(ArkasrConfig(**fields)).eval()
    state = {name: tensor.to(dtype).float() for name, tensor in load_file(tiny_dir / SINGLE).items()}
    model.load_state_dict(state | {LM_HEAD: state[EMBEDDING]})
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_copy", [True, False], ids=["with lm_head", "tied"])
@pytest.mark.parametrize("files", ["one file", "shards"])
def test_each_form_loads(tiny_dir, folder, dtype, with_copy, files):
    state = {name: tensor.to(dtype) for name, tensor in load_file(folder / SINGLE).items()}
    state |= {LM_HEAD: state[EMBEDDING].clone()} if with_copy else {}
    if files == "one file":
        save_file(state, folder / SINGLE, metadata={"format": "pt"})
    else:  # each tensor's place has nothing to do with its part of the model
        write_shards(folder, {f"s{i}.safetensors": dict(sorted(state.items())[i::3]) for i in range(3)})
    model, expected = load_model(folder), reference(tiny_dir, dtype)
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():  # the encoder's unused table too
        assert torch.equal(model.state_dict()[name], tensor), name
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("max_shard_size", ["100KB", "1GB"])
def test_what_save_pretrained_writes_loads(tiny_dir, tmp_path, max_shard_size):
    model = load_model(tiny_dir)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / INDEX).exists() == (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "100KB")
    assert torch.equal(logits(load_model(tmp_path)), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_asked_type_is_the_type_of_every_tensor(folder, dtype):
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change_config(folder, dtype="bfloat16", whisper_config=fields["whisper_config"] | {"dtype": "float16"})
    model = load_model(folder, dtype=dtype)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32  # rotary angles lose too much below


@pytest.mark.parametrize(
    ("remove", "fields"),
    [
        (("rope_parameters",), {"rope_theta": 5e5}),
        (("rope_parameters",), {"rope_theta": 500_000, "rope_scaling": None}),
        (("rope_theta",), {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        (("rope_theta",), {"rope_parameters": {"rope_theta": 5e5}}),
        ((), {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    ],
)
def test_rope_theta_in_either_place(tiny_dir, folder, remove, fields):
    change_config(folder, remove, **fields)
    expected = reference(tiny_dir, torch.float32)
    theirs = logits(expected)
    inv_freq = 5e5 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    expected.model.rotary_emb.inv_freq.copy_(inv_freq)
    ours = logits(load_model(folder))
    torch.testing.assert_close(ours, logits(expected), atol=1e-6, rtol=1e-6)
    assert (ours - theirs).abs().max() > 1e-4


def test_a_copy_of_the_head_in_another_type_is_a_copy_where_it_is_equal(folder):
    state = load_file(folder / SINGLE)
    state[EMBEDDING] = state[EMBEDDING].half().float()
    save_file(state | {LM_HEAD: state[EMBEDDING].half()}, folder / SINGLE)
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, state[EMBEDDING])


def test_an_untied_head_is_its_own(folder):
    state = load_file(folder / SINGLE)
    state[LM_HEAD] = state[EMBEDDING].flip(0).contiguous()
    save_file(state, folder / SINGLE)
    change_config(folder, tie_word_embeddings=False)
    model = load_model(folder)
    assert torch.equal(model.lm_head.weight, state[LM_HEAD])
    assert torch.equal(model.model.embed_tokens.weight, state[EMBEDDING])
    del state[LM_HEAD]
    save_file(state, folder / SINGLE)
    with pytest.raises(ValueError, match="missing: lm_head.weight"):
        load_model(folder)


def test_a_hub_id_is_read_from_the_cache(tiny_dir, tmp_path, monkeypatch):
    commit = "0" * 40
    repository = tmp_path / "models--owner--tiny"
    shutil.copytree(tiny_dir, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert torch.equal(logits(load_model("owner/tiny")), logits(load_model(tiny_dir)))
    assert load_processor("owner/tiny").prompt_ids(8) == load_processor(tiny_dir).prompt_ids(8)
    for load in (load_model, load_processor):
        with pytest.raises(ValueError, match="^owner/other: neither a folder nor a Hub repository"):
            load("owner/other")
    with pytest.raises(ValueError, match="nowhere: neither a folder nor a Hub repository"):
        load_model(tmp_path / "nowhere")


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    """The one sentence that load_model refuses a folder with; it names the folder."""
    with pytest.raises(ValueError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert message.startswith(str(folder))
    assert "\n" not in message
    return message.removeprefix(str(folder))


def test_every_tensor_that_does_not_fit_is_named_at_once(folder):
    state = load_file(folder / SINGLE)
    del state[NORM], state["model.norm.weight"]
    state["audio_encoder.whisper.layer_norm.weight"] = torch.ones(64)
    state["audio_encoder.adapting.0.weight"] = torch.ones(64, 4)
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    state["model.layers.0.mlp.down_proj.weight"] = state["model.layers.0.mlp.down_proj.weight"].to(torch.float8_e4m3fn)
    save_file(state, folder / SINGLE)
    assert refusal(folder) == (
        ": weights do not fit config.json ("
        f"missing: {NORM}, model.norm.weight; "
        "unexpected: audio_encoder.whisper.layer_norm.weight (model.safetensors); "
        "wrong shape: audio_encoder.adapting.0.weight (model.safetensors has (64, 4), config.json says (128, 256)); "
        "wrong type: model.layers.0.mlp.down_proj.weight (model.safetensors has F8_E4M3, not one of F32, F16, BF16), "
        "model.layers.0.mlp.up_proj.weight (model.safetensors has I8, not one of F32, F16, BF16)"
        "); take both from one and the same ARK-ASR checkpoint"
    )


def test_a_config_of_other_sizes_is_refused(sharded):
    change_config(sharded, num_hidden_layers=3, layer_types=["full_attention"] * 3)
    assert "missing: model.layers.2.input_layernorm.weight, model.layers.2.mlp." in (message := refusal(sharded))
    assert "weight and 8 more)" in message
    change_config(sharded, num_hidden_layers=1, layer_types=["full_attention"])
    assert "unexpected: model.layers.1.input_layernorm.weight (model-2.safetensors)" in (message := refusal(sharded))
    assert "and 8 more)" in message
    change_config(sharded, num_hidden_layers=2, layer_types=["full_attention"] * 2, vocab_size=400)
    assert f"wrong shape: {EMBEDDING} (model-2.safetensors has (384, 64), config.json says (400, 64))" in refusal(
        sharded
    )


@pytest.mark.parametrize("row", [0, 4096, 4999])
@pytest.mark.parametrize("files", ["one file", "shards"])
def test_a_tied_head_of_its_own_values_is_refused(folder, row, files):
    state = load_file(folder / SINGLE)
    state[EMBEDDING] = torch.cat([state[EMBEDDING], torch.zeros(5000 - 384, 64)])  # more rows than are compared at once
    change_config(folder, vocab_size=5000)
    state[LM_HEAD] = state[EMBEDDING].clone()
    state[LM_HEAD][row, 63] += 1e-3
    if files == "one file":
        save_file(state, folder / SINGLE)
    else:
        head = {LM_HEAD: state.pop(LM_HEAD)}
        write_shards(folder, {"a.safetensors": state, "b.safetensors": head})
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:1000],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"x" + data[9:],
    ],
    ids=["last byte", "header cut", "empty", "longer", "Git LFS", "header size", "header text"],
)
def test_a_damaged_file_is_refused(sharded, damage):
    path = sharded / "model-2.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert refusal(sharded).startswith("/model-2.safetensors: cannot be read (")


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="flash-attn is installed here: nothing to refuse")
def test_an_attention_that_is_not_installed_is_refused(tiny_dir):
    with pytest.raises(ValueError, match="attn_implementation=flash_attention_2: install its package"):
        load_model(tiny_dir, attn_implementation="flash_attention_2")


def read_shard(folder: Path, number: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"model-{number}.safetensors")


def test_a_folder_without_a_processor_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"^{tmp_path}: has no processor of ARK-ASR .*feature extractor"):
        load_processor(tmp_path)
    with pytest.raises(ValueError, match="tiny_qwen3_asr: has no processor of ARK-ASR .*no token <.audio.>"):
        load_processor(SEEDS / "tiny_qwen3_asr")


def test_shards_that_are_absent_are_refused(sharded):
    (sharded / "model-1.safetensors").unlink()
    assert refusal(sharded).startswith(f"/{INDEX}: names shards that are not in the folder: model-1.safetensors;")


def test_a_tensor_in_two_shards_is_refused(sharded):
    tensors = read_shard(sharded, 1) | {"model.norm.weight": torch.ones(64)}
    save_file(tensors, sharded / "model-1.safetensors")
    assert refusal(sharded).startswith(": model.norm.weight is in both model-1.safetensors and model-2.safetensors")


def change_weight_map(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    change(index["weight_map"])
    write_json(folder / INDEX, index)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda weights: weights.pop(NORM), NORM),
        (lambda weights: weights.update({"model.extra": "model-1.safetensors"}), "model.extra"),
        (lambda weights: weights.update({NORM: "model-2.safetensors"}), NORM),
    ],
    ids=["in a shard only", "in the index only", "in another shard"],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(sharded, change, name):
    change_weight_map(sharded, change)
    assert refusal(sharded).startswith(f"/{INDEX}: does not agree with the shards about {name};")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "\udcff"])
def test_an_index_that_is_none_is_refused(sharded, text):
    (sharded / INDEX).write_text(text, encoding="utf-8", errors="surrogateescape")
    assert refusal(sharded).startswith(f"/{INDEX}: ")


def test_an_empty_index_has_no_tensors(sharded):
    change_weight_map(sharded, dict.clear)
    assert "missing: audio_encoder.adapting.0.bias" in refusal(sharded)


def test_weights_that_are_absent_or_twice_there_are_refused(folder):
    shutil.copy(folder / SINGLE, folder / "pytorch_model.bin")
    write_json(folder / INDEX, {"weight_map": {}})
    assert f"has both {SINGLE} and {INDEX}" in refusal(folder)
    (folder / INDEX).unlink()
    (folder / SINGLE).unlink()
    assert f"has neither {SINGLE} nor {INDEX}; only safetensors" in refusal(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 1e4}, "rope_theta=10000.0 and rope_parameters.rope_theta=1000000.0 disagree"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2', but only 'arkasr'"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"whisper_config": 5}, "WhisperConfig"),
        ({"adapter_type": "conv"}, "adapter_type='conv'"),
        ({"hidden_act": "swosh"}, "swosh"),
        ({"pad_token_id": 384}, "Padding_idx"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(folder, fields, message):
    change_config(folder, **fields)
    refused = refusal(folder)
    assert refused.startswith("/config.json: ")
    assert message in refused


def test_a_config_that_cannot_be_read_is_refused(folder):
    (folder / "config.json").write_text("{")
    assert refusal(folder).startswith("/config.json: ")
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)
