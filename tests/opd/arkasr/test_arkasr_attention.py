"""The encoder's attention in each implementation, and what flash attention gets from it."""

from __future__ import annotations

import pytest
import torch
from transformers import AttentionInterface

from opd.arkasr import ArkasrForConditionalGeneration, load_model, load_processor

REFERENCE = "flash_reference"


def attend_without_padding(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, **_):
    """What flash attention does, by transformers' contract: rows of real positions only, (B, E, H, d) out."""
    assert not module.is_causal and is_causal is False
    assert module.config._attn_implementation == REFERENCE
    out = torch.zeros_like(query.transpose(1, 2))
    for row in range(query.shape[0]):
        real = slice(None) if attention_mask is None else attention_mask[row].bool()
        weights = torch.softmax(query[row][:, real] @ key[row][:, real].transpose(1, 2) * scaling, dim=-1)
        out[row, real] = (weights @ value[row][:, real]).transpose(0, 1)
    return out, None


@pytest.fixture(scope="module")
def flash() -> str:
    AttentionInterface.register(REFERENCE, attend_without_padding)
    return REFERENCE


@pytest.fixture(scope="module")
def batch(tiny_dir, waveforms):
    return load_processor(tiny_dir).build_inputs(waveforms)


@pytest.fixture
def model(tiny_dir) -> ArkasrForConditionalGeneration:
    return load_model(tiny_dir)


@pytest.mark.parametrize("implementation", ["eager", REFERENCE])
def test_implementations_agree_in_a_padded_batch_and_alone(tiny_dir, model, batch, flash, implementation):
    other = load_model(tiny_dir)
    other.config.whisper_config._attn_implementation = implementation
    with torch.no_grad():
        expected = model.audio_encoder(batch["audios"], batch["audio_mask"])
        rows = other.audio_encoder(batch["audios"], batch["audio_mask"])
        torch.testing.assert_close(rows, expected, atol=1e-5, rtol=1e-5)
        assert not torch.equal(rows, expected), "the implementation was not used"
        for i, length in enumerate(batch["audio_mask"].sum(1)):
            alone = other.audio_encoder(batch["audios"][i : i + 1, :, :length])[0]
            torch.testing.assert_close(alone, rows[i, : len(alone)], atol=1e-5, rtol=1e-5)


def test_a_row_of_padding_only_is_finite_with_flash_attention(model, batch, flash):
    model.config.whisper_config._attn_implementation = flash
    mask = batch["audio_mask"].clone()
    mask[0] = 0
    with torch.no_grad():
        rows = model.audio_encoder(batch["audios"], mask)
    assert torch.isfinite(rows).all()
    assert (rows[0, 1:] == 0).all()


def test_eager_attention_learns_and_drops(model, batch):
    model.config.whisper_config._attn_implementation = "eager"
    attention = model.audio_encoder.whisper.layers[0].self_attn
    frames = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    attention(frames, None, None).sum().backward()
    assert frames.grad.abs().sum() > 0
    attention.dropout = 0.5
    assert torch.equal(attention(frames, None, None), attention(frames, None, None))
    attention.train()
    assert not torch.equal(attention(frames, None, None), attention(frames, None, None))


def test_the_model_says_which_implementations_it_has(model):
    assert model._supports_sdpa
    assert model._supports_flash_attn
    model.set_attn_implementation("eager")
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"eager"}
    model.set_attn_implementation({"": "sdpa", "whisper_config": "eager"})
    assert model.audio_encoder.whisper.layers[1].self_attn.config._attn_implementation == "eager"
    assert model.config._attn_implementation == "sdpa"


def test_half_precision_in_eager_attention(tiny_dir, model, batch):
    half = load_model(tiny_dir, dtype=torch.bfloat16, attn_implementation="eager")
    with torch.no_grad():
        rows = half.audio_encoder(batch["audios"], batch["audio_mask"])
        expected = model.audio_encoder(batch["audios"], batch["audio_mask"])
    assert rows.dtype == torch.bfloat16
    assert (rows.float() - expected).norm() < 0.05 * expected.norm()
