"""The audio half of ARK-ASR: a Whisper encoder with rotary positions, and the MLP adapter into the decoder's width.

Shape suffixes: B clips, M mel bins, F mel frames, E encoder frames (half of F), A audio tokens, D encoder width,
H attention heads, R rotated pairs of a head.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import WhisperConfig
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_arkasr import ArkasrConfig, num_audio_tokens

ROPE_BASE = 10000.0
# The encoder's activations can pass float16's range in late layers; 1000 of headroom is kept for the next addition.
FLOAT16_LIMIT = torch.finfo(torch.float16).max - 1000


def rope_tables(num_frames: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(cos_ER, sin_ER) for positions 0..num_frames-1; half of a head is rotated, in R = head_dim / 4 pairs."""
    num_rotated = head_dim // 2
    exponents_R = torch.arange(0, num_rotated, 2, device=device, dtype=torch.float32) / num_rotated
    positions_E = torch.arange(num_frames, device=device, dtype=torch.float32)
    angles_ER = torch.outer(positions_E, ROPE_BASE**-exponents_R)
    return angles_ER.cos().to(dtype), angles_ER.sin().to(dtype)


def apply_rope(x_BHEd: torch.Tensor, cos_ER: torch.Tensor, sin_ER: torch.Tensor) -> torch.Tensor:
    """Rotates dims (2i, 2i+1) of the first half of each head by position times frequency i; the rest passes through."""
    rotated, passed = x_BHEd.split([2 * cos_ER.shape[-1], x_BHEd.shape[-1] - 2 * cos_ER.shape[-1]], dim=-1)
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    turned = torch.stack((even * cos_ER - odd * sin_ER, odd * cos_ER + even * sin_ER), dim=-1).flatten(-2)
    return torch.cat((turned, passed), dim=-1)


class EncoderAttention(nn.Module):
    """Full self-attention with rotary positions. The key projection has no bias, as in Whisper.

    config._attn_implementation  eager, any flash attention that transformers knows, or SDPA for all else
    """

    is_causal = False  # read by transformers' flash attention

    def __init__(self, config: WhisperConfig) -> None:
        super().__init__()
        width, num_heads = config.d_model, config.encoder_attention_heads
        if width % (4 * num_heads):
            raise ValueError(
                f"whisper_config: d_model={width} over encoder_attention_heads={num_heads} must give a head size that "
                "is a multiple of 4 (half of it is rotated in pairs)"
            )
        self.config = config
        self.num_heads = num_heads
        self.dropout = config.attention_dropout
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, x_BED: torch.Tensor, rope: tuple[torch.Tensor, ...] | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """mask is what `attention_mask` made for the implementation in use."""
        query, key, value = (
            projection(x_BED).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rope is not None:
            query, key = apply_rope(query, *rope), apply_rope(key, *rope)
        dropout, name = self.dropout if self.training else 0.0, self.config._attn_implementation
        if is_flash(name):
            attention = ALL_ATTENTION_FUNCTIONS[name]
            scale = query.shape[-1] ** -0.5
            mixed_BEHd, _ = attention(self, query, key, value, mask, dropout=dropout, scaling=scale, is_causal=False)
        else:
            attention = eager_attention if name == "eager" else functional.scaled_dot_product_attention
            mixed_BEHd = attention(query, key, value, attn_mask=mask, dropout_p=dropout).transpose(1, 2)
        return self.out_proj(mixed_BEHd.flatten(-2))


def is_flash(implementation: str | None) -> bool:
    """Whether it is flash attention, which takes a mask of positions and leaves padding out of the computation."""
    return implementation is not None and "flash" in implementation


def eager_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None, dropout_p: float
) -> torch.Tensor:
    """What scaled_dot_product_attention computes, in single steps; softmax in float32."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = torch.softmax(scores if attn_mask is None else scores + attn_mask, dim=-1, dtype=torch.float32)
    return functional.dropout(weights.to(query.dtype), dropout_p) @ value


def attention_mask(frame_mask_BE: torch.Tensor, dtype: torch.dtype, implementation: str | None) -> torch.Tensor:
    """Which frames can be attended to: (B, E) bool for flash attention, else (B, 1, 1, E), 0 or -inf at padding."""
    visible_BE = frame_mask_BE.clone()
    visible_BE[:, 0] = True  # a clip without any real frame would be a softmax over nothing: NaN
    if is_flash(implementation):
        return visible_BE
    bias_BE = torch.zeros(visible_BE.shape, dtype=dtype, device=visible_BE.device)
    return bias_BE.masked_fill(~visible_BE, float("-inf"))[:, None, None, :]


class EncoderLayer(GradientCheckpointingLayer):
    """Pre-norm layer: attention, then a two-layer MLP."""

    def __init__(self, config: ArkasrConfig) -> None:
        super().__init__()
        whisper = config.whisper_config
        self.self_attn = EncoderAttention(whisper)
        self.self_attn_layer_norm = nn.LayerNorm(whisper.d_model)
        self.fc1 = nn.Linear(whisper.d_model, whisper.encoder_ffn_dim)
        self.fc2 = nn.Linear(whisper.encoder_ffn_dim, whisper.d_model)
        self.final_layer_norm = nn.LayerNorm(whisper.d_model)
        self.activation = ACT2FN[whisper.activation_function]
        self.dropout = whisper.dropout
        self.activation_dropout = whisper.activation_dropout

    def forward(
        self, x_BED: torch.Tensor, rope: tuple[torch.Tensor, ...] | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        mixed_BED = self.self_attn(self.self_attn_layer_norm(x_BED), rope, mask)
        x_BED = x_BED + functional.dropout(mixed_BED, self.dropout, self.training)
        inner = functional.dropout(
            self.activation(self.fc1(self.final_layer_norm(x_BED))), self.activation_dropout, self.training
        )
        x_BED = x_BED + functional.dropout(self.fc2(inner), self.dropout, self.training)
        return x_BED.clamp(-FLOAT16_LIMIT, FLOAT16_LIMIT) if x_BED.dtype == torch.float16 else x_BED


class WhisperRopeEncoder(nn.Module):
    """Whisper's convolutions and layers, without its closing norm, made independent of right padding by a mask."""

    def __init__(self, config: ArkasrConfig) -> None:
        super().__init__()
        whisper = config.whisper_config
        if whisper.encoder_layerdrop:
            raise ValueError(
                f"whisper_config: encoder_layerdrop={whisper.encoder_layerdrop} is not supported; set it to 0"
            )
        self.config = whisper
        self.use_rope = config.use_rope
        self.head_dim = whisper.d_model // whisper.encoder_attention_heads
        self.conv1 = nn.Conv1d(whisper.num_mel_bins, whisper.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(whisper.d_model, whisper.d_model, kernel_size=3, stride=2, padding=1)
        # Stored in every checkpoint; read only where use_rope is false.
        self.embed_positions = nn.Embedding(whisper.max_source_positions, whisper.d_model)
        self.layers = nn.ModuleList([EncoderLayer(config) for _ in range(whisper.encoder_layers)])
        self.layer_norm = nn.Identity()

    def forward(
        self, audios_BMF: torch.Tensor, mask_BF: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(frames_BED, frame_mask_BE or None). mask_BF is bool; None says that every frame is real."""
        x_BMF = audios_BMF.to(self.conv1.weight.dtype)
        if mask_BF is not None:
            x_BMF = x_BMF * mask_BF[:, None].to(x_BMF.dtype)
        x_BDF = functional.gelu(self.conv1(x_BMF))
        if mask_BF is not None:  # the bias makes padding non-zero, and conv2 looks one frame over a clip's end
            x_BDF = x_BDF * mask_BF[:, None].to(x_BDF.dtype)
        x_BED = functional.gelu(self.conv2(x_BDF)).transpose(1, 2)
        frame_mask_BE, mask = None, None
        if mask_BF is not None:
            frame_mask_BE = mask_BF[:, ::2].contiguous()
            x_BED = x_BED * frame_mask_BE[..., None].to(x_BED.dtype)
            mask = attention_mask(frame_mask_BE, x_BED.dtype, self.config._attn_implementation)
        rope = None
        if self.use_rope:
            rope = rope_tables(x_BED.shape[1], self.head_dim, x_BED.device, x_BED.dtype)
        else:
            x_BED = x_BED + self._absolute_positions(x_BED)
        for layer in self.layers:
            x_BED = layer(x_BED, rope, mask)
        return self.layer_norm(x_BED), frame_mask_BE

    def _absolute_positions(self, x_BED: torch.Tensor) -> torch.Tensor:
        length, limit = x_BED.shape[1], self.embed_positions.num_embeddings
        if length > limit:
            raise ValueError(
                f"audios: {length} encoder frames, but use_rope is false and the position table has {limit}"
            )
        return self.embed_positions(torch.arange(length, device=x_BED.device))


class ArkasrAudioEncoder(nn.Module):
    """Mel frames -> rows of the decoder's width: encoder, layer norm, merge of merge_factor frames, MLP."""

    def __init__(self, config: ArkasrConfig) -> None:
        super().__init__()
        width, out_width = config.whisper_config.d_model, config.hidden_size
        self.merge_factor = config.merge_factor
        self.spec_aug = config.spec_aug
        self.whisper = WhisperRopeEncoder(config)
        self.layer_norm = nn.LayerNorm(width)
        self.adapting = nn.Sequential(
            nn.Linear(width * config.merge_factor, 2 * out_width),
            ACT2FN[config.mlp_adapter_act],
            nn.Linear(2 * out_width, out_width),
        )

    def forward(self, audios: torch.Tensor, audio_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Audio rows (B, A, hidden_size); a clip's rows beyond its own number of tokens are zero.

        audios      (B, M, F) log-mel, any float type
        audio_mask  (B, F), 1 at a clip's own frames, 0 at its right padding; None: all frames are real
        """
        return self.merge(*self.encode_frames(audios, audio_mask))

    def encode_frames(
        self, audios: torch.Tensor, audio_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(frames (B, E, D) after the adapter's norm with padding zeroed, frame_mask (B, E) bool)."""
        self._check(audios, audio_mask)
        # A mask costs the fast attention kernels; a batch of clips of one length does not need it.
        mask_BF = None if audio_mask is None or bool(audio_mask.all()) else audio_mask.bool()
        x_BED, frame_mask_BE = self.whisper(audios, mask_BF)
        x_BED = self.layer_norm(x_BED)
        if frame_mask_BE is None:
            return x_BED, torch.ones(x_BED.shape[:2], dtype=torch.bool, device=x_BED.device)
        return x_BED * frame_mask_BE[..., None].to(x_BED.dtype), frame_mask_BE

    def merge(self, frames: torch.Tensor, frame_mask: torch.Tensor) -> torch.Tensor:
        """Audio rows (B, A, hidden_size) from `encode_frames`; a tail of less than merge_factor frames is dropped."""
        missing = self.merge_factor - frames.shape[1]
        if missing > 0:  # a clip too short for one token is filled up with true zeros
            frames = functional.pad(frames, (0, 0, 0, missing))
        num_groups = frames.shape[1] // self.merge_factor
        groups_BAD = frames[:, : num_groups * self.merge_factor].unflatten(1, (num_groups, self.merge_factor))
        rows_BAD = self.adapting(groups_BAD.flatten(2))
        num_own_B = (frame_mask.sum(1) // self.merge_factor).clamp(min=1)
        own_BA = torch.arange(num_groups, device=frames.device) < num_own_B[:, None]
        return rows_BAD * own_BA[..., None].to(rows_BAD.dtype)

    def _check(self, audios: torch.Tensor, audio_mask: torch.Tensor | None) -> None:
        num_mel_bins = self.whisper.conv1.in_channels
        if audios.dim() != 3 or audios.shape[1] != num_mel_bins or audios.shape[2] < 1:
            raise ValueError(
                f"audios: shape {tuple(audios.shape)}, needs (clips, {num_mel_bins} mel bins, at least 1 frame); "
                "make them with the processor of this checkpoint"
            )
        if audio_mask is not None and audio_mask.shape != (audios.shape[0], audios.shape[2]):
            raise ValueError(
                f"audio_mask: shape {tuple(audio_mask.shape)}, needs {(audios.shape[0], audios.shape[2])} as in audios"
            )
        if self.spec_aug and self.training:
            raise ValueError("config: spec_aug=true cannot be trained with by this code; set spec_aug to false")


__all__ = ["ArkasrAudioEncoder", "num_audio_tokens"]
