"""Drafts at a stated word error rate, and a larger model that writes what a small one does."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import torch
from torch import nn

from opd.arkasr import ArkasrForConditionalGeneration


def with_errors(text: str, rate: float, words: Sequence[str], rng: random.Random) -> str:
    """The text with word errors: a word is replaced, lost or followed by another, each as often, at `rate` in all."""
    out: list[str] = []
    for word in text.split():
        kind = rng.choice(("substitution", "deletion", "insertion")) if rng.random() < rate else ""
        other = rng.choice([w for w in words if w != word])
        out += [] if kind == "deletion" else [other] if kind == "substitution" else [word]
        out += [other] if kind == "insertion" else []
    return " ".join(out)


@torch.no_grad()
def widen(small: ArkasrForConditionalGeneration, width: int, num_layers: int) -> ArkasrForConditionalGeneration:
    """A model with a decoder of this width and depth that computes the small one's function, at its own cost.

    Every matrix is dense and random but for the rows or columns that would lead back into the small model's part. The
    encoder is the small one's; the MLP is three times as wide as the decoder.
    """
    config = copy.deepcopy(small.config)
    head_dim = config.hidden_size // config.num_attention_heads
    old_width, old_inner = config.hidden_size, config.intermediate_size
    config.hidden_size, config.intermediate_size = width, 3 * width
    config.num_hidden_layers, config.layer_types = num_layers, ["full_attention"] * num_layers
    config.num_attention_heads = config.num_key_value_heads = width // head_dim
    config.initializer_range = width**-0.5
    config.rms_norm_eps = small.config.rms_norm_eps * old_width / width
    large = ArkasrForConditionalGeneration(config).eval()
    assert small.config.num_attention_heads == small.config.num_key_value_heads, "heads are copied one to one"
    # The mean square of a padded state is smaller by the widths' ratio.
    norm_scale = (old_width / width) ** 0.5

    def embed(new: nn.Module, old: nn.Module, closed: bool = False) -> None:
        """Puts the old matrix into a corner; `closed` keeps the rest from reaching the small model's part."""
        rows, columns = old.weight.shape
        if closed:
            new.weight.zero_()
        new.weight[:rows, :columns] = old.weight
        if getattr(old, "bias", None) is not None:
            new.bias[:rows] = old.bias

    encoder = large.audio_encoder
    encoder.whisper.load_state_dict(small.audio_encoder.whisper.state_dict())
    encoder.layer_norm.load_state_dict(small.audio_encoder.layer_norm.state_dict())
    embed(encoder.adapting[0], small.audio_encoder.adapting[0], closed=True)
    embed(encoder.adapting[2], small.audio_encoder.adapting[2], closed=True)
    encoder.adapting[0].bias[2 * old_width :] = 0.0
    encoder.adapting[2].bias[old_width:] = 0.0
    large.model.embed_tokens.weight.zero_()
    large.model.embed_tokens.weight[:, :old_width] = small.model.embed_tokens.weight
    large.model.norm.weight[:old_width] = small.model.norm.weight * norm_scale
    for layer in large.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    for new, old in zip(large.model.layers, small.model.layers, strict=False):
        for name in ("q_proj", "k_proj", "v_proj"):
            embed(getattr(new.self_attn, name), getattr(old.self_attn, name))
        new.self_attn.o_proj.weight[:old_width, :old_width] = old.self_attn.o_proj.weight
        embed(new.mlp.gate_proj, old.mlp.gate_proj)
        embed(new.mlp.up_proj, old.mlp.up_proj)
        new.mlp.down_proj.weight[:old_width, :old_inner] = old.mlp.down_proj.weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            getattr(new, name).weight[:old_width] = getattr(old, name).weight * norm_scale
    return large
