"""Configuration of ARK-ASR: Qwen2 fields flat at the top level, the Whisper encoder nested under `whisper_config`."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2Config, WhisperConfig

AUTO_MAP = {
    "AutoConfig": "configuration_arkasr.ArkasrConfig",
    "AutoModelForCausalLM": "modeling_arkasr.ArkasrForConditionalGeneration",
    "AutoProcessor": "processing_arkasr.ArkasrProcessor",
}
CUSTOM_PIPELINES = {
    "automatic-speech-recognition": {"impl": "pipeline_arkasr.ArkasrPipeline", "pt": ["AutoModelForCausalLM"]},
}
DEFAULT_ROPE_THETA = 1_000_000.0
# The encoder of Whisper large-v3, which every published ARK-ASR has.
DEFAULT_WHISPER = {
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "num_mel_bins": 128,
    "max_source_positions": 1500,
}


def num_audio_tokens(num_frames: int, merge_factor: int = 4) -> int:
    """Placeholders for a clip of `num_frames` mel frames: conv2 halves, rounding up; the adapter merges."""
    return max((num_frames + 1) // 2 // merge_factor, 1)


class ArkasrConfig(Qwen2Config):
    """Qwen2 decoder (flat fields) + Whisper encoder + MLP adapter.

    whisper_config     WhisperConfig, a dictionary of its fields, or None for Whisper large-v3
    merge_factor       encoder frames that make one audio token
    audio_token_id     id of the `<|audio|>` placeholder
    adapter_type       only "mlp" exists
    spec_aug           SpecAugment while training; refused there, harmless for inference
    use_rope           rotary positions in the encoder (else Whisper's table of max_source_positions)
    max_whisper_length written for other readers of the format; the encoder itself has no limit
    mlp_adapter_act    activation between the two adapter layers
    rope_theta         base of the decoder's rotary positions; `rope_parameters["rope_theta"]` is read as well, and both
                       are written: transformers 4 knows only the first, transformers 5 only the second
    """

    model_type = "arkasr"
    sub_configs = {"whisper_config": WhisperConfig}

    def __init__(
        self,
        whisper_config: WhisperConfig | dict[str, Any] | None = None,
        merge_factor: int = 4,
        audio_token_id: int | None = 151663,
        adapter_type: str = "mlp",
        spec_aug: bool = False,
        use_rope: bool = True,
        max_whisper_length: int = 1500,
        mlp_adapter_act: str = "gelu",
        rope_theta: float | None = None,
        rope_parameters: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(whisper_config, WhisperConfig):
            whisper_config = WhisperConfig(**(DEFAULT_WHISPER if whisper_config is None else whisper_config))
        if adapter_type != "mlp":
            raise ValueError(f"config: adapter_type={adapter_type!r} is unknown; this code has 'mlp' only")
        if merge_factor < 1:
            raise ValueError(f"config: merge_factor={merge_factor} must be at least 1")
        # Before super(): transformers hands the attention implementation on to the sub-configs that are there.
        self.whisper_config: Any = whisper_config
        self.merge_factor = merge_factor
        self.audio_token_id = audio_token_id
        self.adapter_type = adapter_type
        self.spec_aug = spec_aug
        self.use_rope = use_rope
        self.max_whisper_length = max_whisper_length
        self.mlp_adapter_act = mlp_adapter_act
        kwargs.setdefault("tie_word_embeddings", True)
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        theta = _resolve_rope_theta(rope_theta, rope_parameters)
        if hasattr(Qwen2Config, "rope_parameters"):  # transformers 5
            rope = {"rope_type": "default"} | (rope_parameters or {}) | {"rope_theta": theta}
            super().__init__(rope_parameters=rope, **kwargs)
            self.rope_theta = theta
        else:
            super().__init__(rope_theta=theta, **kwargs)


def _resolve_rope_theta(rope_theta: float | None, rope_parameters: dict[str, Any] | None) -> float:
    nested = (rope_parameters or {}).get("rope_theta")
    if rope_theta is not None and nested is not None and rope_theta != nested:
        raise ValueError(
            f"config: rope_theta={rope_theta} and rope_parameters.rope_theta={nested} disagree; make them equal"
        )
    theta = rope_theta if rope_theta is not None else nested
    return float(DEFAULT_ROPE_THETA if theta is None else theta)


__all__ = ["ArkasrConfig", "num_audio_tokens"]
