"""The decoder of Qwen2 as one plain function, for the short forwards of a rollout.

A forward of a few tokens takes longer to be started than to be computed: half of the time of the modules goes into
their own code. This reads the same weights and computes the same, on the KV cache of a rollout.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2RMSNorm

from opd.cpu_linear import add_linear, linear
from opd.rollout.cache import RowCache

SCORES = 1 << 20  # of attention, that may be held at once


class DecoderSteps:
    """Takes what the model's forward takes after the prompt. Attention is torch's own, whatever the model is set to.

    Made for one rollout: it holds the weights as they are now, not the modules.
    """

    def __init__(self, model: nn.Module) -> None:
        """model: see `can_step`."""
        config, decoder = model.config, model.model
        self.eps, self.activation = config.rms_norm_eps, ACT2FN[config.hidden_act]
        self.embedding, self.norm, self.head = decoder.embed_tokens.weight, decoder.norm.weight, model.lm_head.weight
        self.layers = [
            (
                (layer.input_layernorm.weight, layer.post_attention_layernorm.weight),
                [(p.weight, p.bias) for p in map(_linear, (a.q_proj, a.k_proj, a.v_proj))],
                _linear(a.o_proj).weight,
                (_linear(m.gate_proj).weight, _linear(m.up_proj).weight, _linear(m.down_proj).weight),
            )
            for layer in decoder.layers
            for a, m in [(layer.self_attn, layer.mlp)]
        ]
        attention = decoder.layers[0].self_attn
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.rotary = decoder.rotary_emb
        self.cos_LD = self.sin_LD = self.norm.new_zeros(0, self.head_dim)

    def addresses(self) -> list[int]:
        """Where the weights are in memory: the same list, the same tensors."""
        tensors = [self.embedding, self.norm, self.head]
        for norms, projections, out_weight, mlp_weights in self.layers:
            tensors += [*norms, *(t for pair in projections for t in pair if t is not None), out_weight, *mlp_weights]
        return [tensor.data_ptr() for tensor in tensors]

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: RowCache,
        use_cache: bool = True,
        out_NV: torch.Tensor | None = None,
    ) -> Any:
        """Logits (R, W, V) as `.logits`.

        input_ids, position_ids  (R, W)
        attention_mask           (R, 1, W, end) additive, over the slots that the cache will return
        out_NV                   (R * W, V), where the logits are written; None: into memory of their own
        """
        rows, width = input_ids.shape
        x_ND = functional.embedding(input_ids.flatten(), self.embedding)
        rotation = self._rotation(position_ids, past_key_values)
        # The query heads of one key head are folded into its queries, so that no key is copied.
        groups = self.num_heads // self.num_kv_heads
        mask = attention_mask.repeat_interleave(groups, 2) if groups > 1 else attention_mask
        if self._holds_scores(mask):
            mask = mask.expand(-1, self.num_kv_heads, -1, -1).flatten(0, 1)
        for index, (norms, projections, out_weight, (gate_weight, up_weight, down_weight)) in enumerate(self.layers):
            y_ND = self._norm(x_ND, norms[0])
            attended_ND = self._attend(y_ND, projections, rotation, mask, past_key_values, index, (rows, width))
            x_ND = add_linear(x_ND, attended_ND, out_weight)
            y_ND = self._norm(x_ND, norms[1])
            gate = self.activation(linear(y_ND, gate_weight))
            x_ND = add_linear(x_ND, gate.mul_(linear(y_ND, up_weight)), down_weight)
        y_ND = self._norm(x_ND, self.norm)
        logits_NV = linear(y_ND, self.head) if out_NV is None else torch.mm(y_ND, self.head.t(), out=out_NV)
        return SimpleNamespace(logits=logits_NV.view(rows, width, -1))

    def _holds_scores(self, mask: torch.Tensor) -> bool:
        """Whether attention is to be two plain products: for few queries they are faster on CPUs than torch's own."""
        on_cpu = mask.device.type == "cpu" and mask.dtype == torch.float32
        return on_cpu and mask.numel() * self.num_kv_heads <= SCORES

    def _norm(self, x_ND: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x_ND, weight.shape, weight, self.eps)

    def _attend(
        self,
        y_ND: torch.Tensor,
        projections: list[tuple[torch.Tensor, torch.Tensor]],
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        cache: RowCache,
        index: int,
        shape: tuple[int, int],
    ) -> torch.Tensor:
        """Attention before its output projection: (N, heads * head_dim). A mask of three dimensions is one of plain products."""
        heads, kv_heads, head_dim = self.num_heads, self.num_kv_heads, self.head_dim
        q, k, v = (linear(y_ND, weight, bias) for weight, bias in projections)
        turned = torch.cat([q, k], 1).view(-1, heads + kv_heads, head_dim)
        turned = torch.addcmul(turned * rotation[0], turned.roll(head_dim // 2, -1), rotation[1])
        keys, values = cache.update(
            turned[:, heads:].view(*shape, kv_heads, head_dim).transpose(1, 2),
            v.view(*shape, kv_heads, head_dim).transpose(1, 2),
            index,
        )
        rows, width = shape
        groups = heads // kv_heads
        queries = turned[:, :heads].reshape(rows, width, kv_heads, groups, head_dim).transpose(1, 2).flatten(2, 3)
        if mask.dim() == 3:
            scores = torch.baddbmm(mask, queries.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=self.scaling)
            out = torch.bmm(scores.softmax(-1), values.flatten(0, 1))
        else:
            out = functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=self.scaling)
        return out.view(rows, kv_heads, width, groups * head_dim).transpose(1, 2).reshape(rows * width, -1)

    def _rotation(self, position_ids: torch.Tensor, cache: RowCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of each position, (N, 1, head_dim) each; the sine has the sign of the half it turns."""
        if len(self.cos_LD) < cache.writes.capacity:
            positions_1L = torch.arange(cache.writes.capacity, device=position_ids.device)[None]
            cos, sin = self.rotary(self.embedding, positions_1L)
            half = self.head_dim // 2
            self.cos_LD, self.sin_LD = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)
        flat_N = position_ids.flatten()
        return self.cos_LD[flat_N][:, None], self.sin_LD[flat_N][:, None]


def _linear(module: nn.Module) -> nn.Module:
    """The linear layer itself, or the one below a LoRA adapter that is merged into it."""
    return module.get_base_layer() if getattr(module, "merged", False) else module


def can_step(model: nn.Module) -> bool:
    """Whether `DecoderSteps` computes what this model does: a Qwen2 decoder of plain layers, its weights all here.

    False for weights that are spread over ranks, layers that were replaced (adapters that are not merged), windowed
    attention, and rotary positions that depend on the length.
    """
    decoder = getattr(model, "model", None)
    if not isinstance(decoder, Qwen2Model) or any(isinstance(p, DTensor) for p in decoder.parameters()):
        return False
    linears = [model.lm_head]
    norms = [decoder.norm]
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        linears += [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
        linears += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        norms += [layer.input_layernorm, layer.post_attention_layernorm]
    plain = all(type(_linear(m)) is nn.Linear for m in linears) and all(type(m) is Qwen2RMSNorm for m in norms)
    static = decoder.rotary_emb.rope_type not in ("dynamic", "longrope")
    return plain and static and not decoder.has_sliding_layers and type(decoder.embed_tokens) is nn.Embedding
