"""The whole model against its arithmetic written down a second time, in numpy and float64, from the format's description.

Nothing of torch or transformers computes here: convolutions are sums over windows, the error function is the standard
library's, rotations are complex products. Weights are random with outputs of order one, or the trained seeds'.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.arkasr import ArkasrConfig, ArkasrForConditionalGeneration, load_model, load_processor, num_audio_tokens

FIXTURES = Path(__file__).parent / "fixtures"
SEEDS = Path(__file__).resolve().parents[3] / "seeds"
FRAMES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 100, 999, 1000, 3000)
AUDIO = 99  # id of the placeholder in the random models
# Heads of 64 as published, and of 32; 128 and 80 mel bins; grouped key-value heads of three sizes.
SIZES = {
    "heads of 64": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 100,
        "whisper_config": {"d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 160,
                           "num_mel_bins": 128},
    },
    "heads of 32": {
        "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 1,
        "intermediate_size": 40, "vocab_size": 101,
        "whisper_config": {"d_model": 96, "encoder_layers": 3, "encoder_attention_heads": 3, "encoder_ffn_dim": 128,
                           "num_mel_bins": 80},
    },
    "merge of 2": {
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 96, "vocab_size": 100, "merge_factor": 2, "rope_theta": 1e4, "rms_norm_eps": 1e-5,
        "whisper_config": {"d_model": 64, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 96,
                           "num_mel_bins": 80},
    },
}  # fmt: skip


# -- the arithmetic ----------------------------------------------------------------------------------------------------


class Oracle:
    """Encoder, adapter and decoder of one clip or one row, in float64. Names are those of the stored tensors."""

    def __init__(self, model: ArkasrForConditionalGeneration) -> None:
        self.config = model.config
        self.weights = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def layer_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def rms_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.rms_norm_eps) * self.weights[f"{name}.weight"]

    def convolution(self, x_FM: np.ndarray, name: str, stride: int) -> np.ndarray:
        """Kernel 3, one frame of zeros at each end; x (frames, channels)."""
        weight_kMD = np.ascontiguousarray(self.weights[f"{name}.weight"].transpose(2, 1, 0))
        padded = np.concatenate([np.zeros((1, x_FM.shape[1])), x_FM, np.zeros((1, x_FM.shape[1]))])
        centres = range(0, len(x_FM), stride)
        y = sum(np.stack([padded[i + k] for i in centres]) @ weight_kMD[k] for k in range(3))
        return y + self.weights[f"{name}.bias"]

    # -- encoder and adapter

    def encode(self, mel_MF: np.ndarray) -> np.ndarray:
        """Frames (E, D) after the adapter's norm."""
        x = gelu(self.convolution(mel_MF.T.astype(np.float64), "audio_encoder.whisper.conv1", 1))
        x = gelu(self.convolution(x, "audio_encoder.whisper.conv2", 2))
        for i in range(self.config.whisper_config.encoder_layers):
            layer = f"audio_encoder.whisper.layers.{i}"
            x = x + self.encoder_attention(self.layer_norm(x, f"{layer}.self_attn_layer_norm"), f"{layer}.self_attn")
            inner = gelu(self.linear(self.layer_norm(x, f"{layer}.final_layer_norm"), f"{layer}.fc1"))
            x = x + self.linear(inner, f"{layer}.fc2")
        return self.layer_norm(x, "audio_encoder.layer_norm")

    def encoder_attention(self, x: np.ndarray, name: str) -> np.ndarray:
        num_heads = self.config.whisper_config.encoder_attention_heads
        query, key, value = (heads(self.linear(x, f"{name}.{p}_proj"), num_heads) for p in "qkv")
        size = query.shape[-1]
        pairs = size // 4  # half of the head, two dimensions each
        angles = np.outer(np.arange(len(x)), 10000.0 ** (-2 * np.arange(pairs) / (size // 2)))
        for states in (query, key):
            turned = (states[..., 0 : 2 * pairs : 2] + 1j * states[..., 1 : 2 * pairs : 2]) * np.exp(1j * angles)
            states[..., 0 : 2 * pairs : 2], states[..., 1 : 2 * pairs : 2] = turned.real, turned.imag
        mixed = softmax(query @ key.transpose(0, 2, 1) / math.sqrt(size)) @ value
        return self.linear(mixed.transpose(1, 0, 2).reshape(len(x), -1), f"{name}.out_proj")

    def audio_rows(self, mel_MF: np.ndarray) -> np.ndarray:
        """Audio tokens (A, hidden_size): frames joined oldest first, the tail dropped, too few filled up with zeros."""
        frames, factor = self.encode(mel_MF), self.config.merge_factor
        while len(frames) < factor:
            frames = np.concatenate([frames, np.zeros((1, frames.shape[1]))])
        groups = [np.concatenate(frames[i : i + factor]) for i in range(0, len(frames) - factor + 1, factor)]
        return self.linear(gelu(self.linear(np.stack(groups), "audio_encoder.adapting.0")), "audio_encoder.adapting.2")

    # -- decoder

    def logits(self, ids: list[int], mel_MF: np.ndarray | None = None) -> np.ndarray:
        """(positions, vocabulary) of one row without padding; the clip's audio tokens stand for the placeholders."""
        slots = [i for i, token in enumerate(ids) if token == self.config.audio_token_id]
        x = self.weights["model.embed_tokens.weight"][np.where(np.isin(range(len(ids)), slots), 0, ids)].copy()
        if mel_MF is not None:
            x[slots] = self.audio_rows(mel_MF)
        for i in range(self.config.num_hidden_layers):
            layer = f"model.layers.{i}"
            x = x + self.decoder_attention(self.rms_norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
            inner = self.rms_norm(x, f"{layer}.post_attention_layernorm")
            gate = self.linear(inner, f"{layer}.mlp.gate_proj")
            gated = gate / (1 + np.exp(-gate)) * self.linear(inner, f"{layer}.mlp.up_proj")
            x = x + self.linear(gated, f"{layer}.mlp.down_proj")
        return self.rms_norm(x, "model.norm") @ self.weights["model.embed_tokens.weight"].T

    def decoder_attention(self, x: np.ndarray, name: str) -> np.ndarray:
        config, length = self.config, len(x)
        query = heads(self.linear(x, f"{name}.q_proj"), config.num_attention_heads)
        key, value = (heads(self.linear(x, f"{name}.{p}_proj"), config.num_key_value_heads) for p in "kv")
        half = query.shape[-1] // 2
        angles = np.outer(np.arange(length), config.rope_theta ** (-np.arange(half) / half))
        for states in (query, key):  # dimension i is paired with i + half
            turned = (states[..., :half] + 1j * states[..., half:]) * np.exp(1j * angles)
            states[..., :half], states[..., half:] = turned.real, turned.imag
        shared = config.num_attention_heads // config.num_key_value_heads
        mixed = np.empty_like(query)
        for i in range(config.num_attention_heads):
            scores = query[i] @ key[i // shared].T / math.sqrt(2 * half)
            scores[np.triu_indices(length, 1)] = -np.inf
            mixed[i] = softmax(scores) @ value[i // shared]
        return self.linear(mixed.transpose(1, 0, 2).reshape(length, -1), f"{name}.o_proj")


def gelu(x: np.ndarray) -> np.ndarray:
    error_function = np.frompyfunc(math.erf, 1, 1)(x / math.sqrt(2)).astype(np.float64)
    return x * (1 + error_function) / 2


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def heads(x: np.ndarray, num_heads: int) -> np.ndarray:
    """(positions, heads * size) -> (heads, positions, size), a copy."""
    return x.reshape(len(x), num_heads, -1).transpose(1, 0, 2).copy()


# -- models, clips, comparison -----------------------------------------------------------------------------------------


def random_model(sizes: dict, seed: int) -> ArkasrForConditionalGeneration:
    """Every tensor matters: biases and norms too are far from their initial values; the unused table is large."""
    model = ArkasrForConditionalGeneration(ArkasrConfig(**({"audio_token_id": AUDIO} | sizes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(1.5 * noise / math.sqrt(parameter[0].numel()))
    return model


def random_mel(config: ArkasrConfig, num_frames: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((config.whisper_config.num_mel_bins, num_frames), np.float32)


def difference(ours: torch.Tensor, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected."""
    assert tuple(ours.shape) == expected.shape
    return float(np.linalg.norm(ours.double().numpy() - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=[(name, seed) for name in SIZES for seed in (0, 1)], ids=str)
def pair(request):
    """(random model in float32, its oracle)."""
    name, seed = request.param
    model = random_model(SIZES[name], seed)
    return model, Oracle(model)


@pytest.fixture(scope="module", params=["tiny_teacher", "tiny_student"])
def trained(request):
    """(trained model in float32, its oracle, its processor)."""
    model = load_model(SEEDS / request.param)
    return model, Oracle(model), load_processor(SEEDS / request.param)


# -- encoder and adapter -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", FRAMES)
@torch.no_grad()
def test_encoder_and_adapter(pair, num_frames):
    model, oracle = pair
    mel = random_mel(model.config, num_frames, num_frames)
    expected = oracle.audio_rows(mel)
    assert len(expected) == num_audio_tokens(num_frames, model.config.merge_factor)
    assert difference(model.audio_encoder(torch.from_numpy(mel)[None])[0], expected) < 1e-5


@torch.no_grad()
def test_frames_so_faint_that_the_norms_epsilon_counts():
    model = random_model(SIZES["heads of 32"], 0)
    for name, parameter in model.audio_encoder.whisper.named_parameters():
        if name.startswith("conv2") or ".out_proj" in name or ".fc2" in name:  # all that reaches the residual stream
            parameter.mul_(0.003)
    oracle, mel = Oracle(model), random_mel(model.config, 33, 0)
    assert difference(model.audio_encoder(torch.from_numpy(mel)[None])[0], oracle.audio_rows(mel)) < 1e-5


@torch.no_grad()
def test_one_layer_each_of_the_published_width():
    fields = json.loads((FIXTURES / "ark_asr_06b.json").read_text())
    fields["whisper_config"] |= {"encoder_layers": 1, "num_hidden_layers": 1}  # Whisper's two names of one field
    small = {"vocab_size": 100, "num_hidden_layers": 1, "layer_types": ["full_attention"], "audio_token_id": AUDIO}
    small |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    model = random_model(fields | small, 0)
    oracle = Oracle(model)
    mel, ids = random_mel(model.config, 101, 0), prompt(model.config, 101, 0)
    audios = torch.from_numpy(mel)[None]
    assert difference(model.audio_encoder(audios)[0], oracle.audio_rows(mel)) < 1e-5
    assert difference(model(input_ids=torch.tensor([ids]), audios=audios).logits[0], oracle.logits(ids, mel)) < 1e-4


@torch.no_grad()
def test_a_batch_of_mixed_lengths_is_each_clip_alone(pair):
    model, oracle = pair
    lengths = [*reversed(FRAMES[:13]), 99, 57]
    longest = max(lengths)
    padding = torch.randn(len(lengths), model.config.whisper_config.num_mel_bins, longest)
    audios = 100 * padding  # padding is not silence: what it holds must not matter
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    clips = [random_mel(model.config, n, seed) for seed, n in enumerate(lengths)]
    for row, clip in zip(audios, clips, strict=True):
        row[:, : clip.shape[1]] = torch.from_numpy(clip)
    rows = model.audio_encoder(audios, mask)
    for row, clip in zip(rows, clips, strict=True):
        expected = oracle.audio_rows(clip)
        assert difference(row[: len(expected)], expected) < 1e-5
        assert (row[len(expected) :] == 0).all()


@torch.no_grad()
def test_trained_encoder_on_speech(trained, waveforms):
    model, oracle, processor = trained
    audios, mask = processor.features(waveforms)
    together = model.audio_encoder(audios, mask)
    for mel, length, row in zip(audios, mask.sum(1).tolist(), together, strict=True):
        expected = oracle.audio_rows(mel[:, :length].numpy())
        assert difference(model.audio_encoder(mel[None, :, :length])[0], expected) < 1e-5
        assert difference(row[: len(expected)], expected) < 1e-5


# -- the whole model ---------------------------------------------------------------------------------------------------


def prompt(config: ArkasrConfig, num_frames: int, seed: int) -> list[int]:
    text = np.random.default_rng(seed).integers(0, AUDIO, size=9).tolist()
    return text[:2] + [AUDIO] * num_audio_tokens(num_frames, config.merge_factor) + text[2:]


@pytest.mark.parametrize("num_frames", [1, 7, 8, 9, 100, 999])
@torch.no_grad()
def test_logits_of_prompts(pair, num_frames):
    model, oracle = pair
    mel, ids = random_mel(model.config, num_frames, 3), prompt(model.config, num_frames, 4)
    logits = model(input_ids=torch.tensor([ids]), audios=torch.from_numpy(mel)[None]).logits[0]
    assert difference(logits, oracle.logits(ids, mel)) < 1e-4


@torch.no_grad()
def test_logits_of_text_alone(pair):
    model, oracle = pair
    ids = np.random.default_rng(0).integers(0, AUDIO, size=700).tolist()
    assert difference(model(input_ids=torch.tensor([ids])).logits[0], oracle.logits(ids)) < 1e-4


@torch.no_grad()
def test_logits_in_a_padded_batch_and_from_the_cache(pair):
    model, oracle = pair
    lengths = (50, 9, 2)
    mels = [random_mel(model.config, n, n) for n in lengths]
    prompts = [prompt(model.config, n, n) for n in lengths]
    answer = [5, 17, 42]
    width = max(map(len, prompts))
    ids = torch.tensor([[7] * (width - len(p)) + p for p in prompts])
    attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    audios = torch.zeros(len(mels), len(mels[0]), max(lengths))
    for row, mel in zip(audios, mels, strict=True):
        row[:, : mel.shape[1]] = torch.from_numpy(mel)
    audio_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    out = model(
        input_ids=ids, attention_mask=attention_mask, audios=audios, audio_mask=audio_mask, use_cache=True
    )  # fmt: skip
    parts = [out.logits]
    for token in answer:  # one by one, as a rollout decodes
        attention_mask = torch.cat([attention_mask, torch.ones_like(attention_mask[:, :1])], 1)
        step = torch.full((len(mels), 1), token)
        out = model(input_ids=step, attention_mask=attention_mask, past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    logits = torch.cat(parts, 1)
    for row, row_prompt, mel in zip(logits, prompts, mels, strict=True):
        expected = oracle.logits(row_prompt + answer, mel)
        assert difference(row[-len(expected) :], expected) < 1e-4


@torch.no_grad()
def test_trained_logits_of_speech(trained, waveforms):
    model, oracle, processor = trained
    batch = processor.build_inputs(waveforms)
    logits = model(**batch).logits
    for i, row in enumerate(logits):
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
        mel = batch["audios"][i][:, batch["audio_mask"][i].bool()].numpy()
        expected = oracle.logits(ids, mel)
        assert difference(row[-len(ids) :], expected) < 1e-4
        assert row[-1].argmax() == expected[-1].argmax()  # the first token of the transcript


# -- audio-token counts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "tokens"),
    [*((n, 1) for n in range(1, 15)), (15, 2), (16, 2), (22, 2), (23, 3), (300, 37), (400, 50), (462, 57), (1790, 223), (1791, 224),
     (3000, 375), (3001, 375), (4000, 500)],
)  # fmt: skip
def test_audio_tokens_of_mel_frames(frames, tokens):
    assert num_audio_tokens(frames) == tokens
    model = ArkasrForConditionalGeneration(ArkasrConfig(audio_token_id=AUDIO, **SIZES["heads of 32"])).eval()
    with torch.no_grad():
        assert model.audio_encoder(torch.zeros(1, 80, frames)).shape == (1, tokens, 48)


@pytest.mark.parametrize(
    ("samples", "limit", "frames", "tokens"),
    [(201, None, 1, 1), (319, None, 1, 1), (320, None, 2, 1), (48_000, None, 300, 37), (64_000, None, 400, 50),
     (480_000, None, 3000, 375), (480_160, None, 3000, 375), (480_160, 640_000, 3001, 375),
     (640_000, 640_000, 4000, 500), (640_000, 480_000, 3000, 375)],
)  # fmt: skip
def test_audio_tokens_of_samples(tiny_dir, samples, limit, frames, tokens):
    processor = load_processor(tiny_dir)
    clip = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    message = {"role": "user", "content": [{"type": "audio", "array": clip}, {"type": "text", "text": "x"}]}
    options = {} if limit is None else {"audio_max_length": limit}
    inputs = processor.apply_chat_template([message], **options)
    assert inputs["audios"].shape == (1, 80, frames)
    assert (inputs["input_ids"] == processor.audio_token_id).sum() == tokens


@pytest.mark.parametrize("samples", [1, 200])
def test_too_few_samples_are_refused(tiny_dir, samples):
    with pytest.raises(ValueError, match=f"{samples} samples are too few"):
        load_processor(tiny_dir).features([np.ones(samples, np.float32)])
