"""ARK-ASR for transformers: Qwen2 with audio rows written over the `<|audio|>` placeholders of the prompt."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from transformers import Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_arkasr import ArkasrConfig
from .modeling_audio import ArkasrAudioEncoder

AUDIO_INPUTS = ("audios", "audio_mask", "audio_frames")
# What transformers calls the key-value cache: `past_key_values` until 5.23, `cache` from 5.24 on. Both are taken here.
CACHE = "cache" if "cache" in signature(Qwen2ForCausalLM.forward).parameters else "past_key_values"


class ArkasrForConditionalGeneration(Qwen2ForCausalLM):
    """Transcribes: `generate(input_ids, attention_mask, audios, audio_mask)` with what the processor returns."""

    config_class = ArkasrConfig
    input_modalities = ("audio", "text")
    _no_split_modules = ["Qwen2DecoderLayer", "EncoderLayer"]
    _supports_sdpa = _supports_flash_attn = True  # the encoder's attention too

    def __init__(self, config: ArkasrConfig) -> None:
        super().__init__(config)
        self.audio_encoder = ArkasrAudioEncoder(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        audios: torch.Tensor | None = None,
        audio_mask: torch.Tensor | None = None,
        audio_frames: tuple[torch.Tensor, torch.Tensor] | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits over the vocabulary, and the cache.

        input_ids       (B, L), with one placeholder per audio token
        attention_mask  (B, past + L); positions are counted from each row's first real token, so padding may be left
        audios          (B, M, F) log-mel of one clip per row; only with the prompt, not with later steps
        audio_mask      (B, F), 1 at real frames; None: all are real
        audio_frames    instead of audios: what `audio_encoder.encode_frames` returned
        labels          (B, L), -100 where nothing is to be predicted; shifted by one inside
        logits_to_keep  last positions (int, 0 = all) or positions (tensor) that get logits
        cache           another name of past_key_values

        Raises ValueError for audio that does not belong to the ids, and placeholders without audio.
        """
        decoder_inputs = self.decoder_inputs(
            input_ids, attention_mask, position_ids, past_key_values if cache is None else cache, inputs_embeds,
            audios, audio_mask, audio_frames,
        )  # fmt: skip
        return super().forward(
            **decoder_inputs, labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep, **kwargs
        )

    def decoder_inputs(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        audios: torch.Tensor | None = None,
        audio_mask: torch.Tensor | None = None,
        audio_frames: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """What `self.model`, the decoder without its output layer, takes: `forward`'s inputs with the audio placed.

        For those who want hidden states in place of logits. Raises ValueError as `forward` does.
        """
        has_audio = audios is not None or audio_frames is not None
        if has_audio or self._starts_with_placeholders(input_ids, cache):
            inputs_embeds = self._embed(input_ids, inputs_embeds, audios, audio_mask, audio_frames)
            input_ids = None
        if position_ids is None and isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            given: Any = inputs_embeds if input_ids is None else input_ids
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -given.shape[1] :]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: cache,
            "inputs_embeds": inputs_embeds,
        }

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Any | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers, with the audio taken out once its rows are in the cache."""
        cache = past_key_values if cache is None else cache
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, **{CACHE: cache}, **kwargs
        )
        if cache is not None and cache.get_seq_length() > 0:
            for name in AUDIO_INPUTS:
                inputs.pop(name, None)
        return inputs

    def _starts_with_placeholders(self, input_ids: torch.Tensor | None, cache: Any | None) -> bool:
        """Whether a prompt (nothing cached yet) has placeholders. Later steps are not looked at: it costs a sync."""
        if input_ids is None or (cache is not None and cache.get_seq_length() > 0):
            return False
        return bool((input_ids == self.config.audio_token_id).any())

    def _embed(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        audios: torch.Tensor | None,
        audio_mask: torch.Tensor | None,
        audio_frames: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Embedded ids (B, L, D) with each row's own audio rows at its placeholders."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("audios need input_ids, to see where they belong; pass them without inputs_embeds")
        if audios is not None and audio_frames is not None:
            raise ValueError("audios and audio_frames are two forms of the same input; pass one of them")
        if audio_frames is not None:
            rows_BAD = self.audio_encoder.merge(*audio_frames)
        elif audios is not None:
            rows_BAD = self.audio_encoder(audios, audio_mask)
        else:
            raise ValueError(
                f"input_ids have audio placeholders (id {self.config.audio_token_id}) but there are no audios; "
                "pass audios and audio_mask as the processor returns them"
            )
        if rows_BAD.shape[0] != input_ids.shape[0]:
            raise ValueError(
                f"audios: {rows_BAD.shape[0]} clips for {input_ids.shape[0]} rows of input_ids; one clip per row"
            )
        slots_BL = input_ids == self.config.audio_token_id
        embeds_BLD = self.model.embed_tokens(input_ids.masked_fill(slots_BL, 0))
        return place_audio(embeds_BLD, slots_BL, rows_BAD)


def place_audio(embeds_BLD: torch.Tensor, slots_BL: torch.Tensor, rows_BAD: torch.Tensor) -> torch.Tensor:
    """Writes audio row n over the n-th slot of the same sample. Slots beyond the rows get zeros, extra rows are cut."""
    num_rows = rows_BAD.shape[1]
    nth_BL = slots_BL.long().cumsum(-1) - 1
    index_BLD = nth_BL.clamp(0, num_rows - 1)[..., None].expand(-1, -1, rows_BAD.shape[-1])
    placed_BLD = rows_BAD.gather(1, index_BLD).to(embeds_BLD.dtype)
    placed_BLD = placed_BLD.masked_fill((nth_BL >= num_rows)[..., None], 0.0)
    return torch.where(slots_BL[..., None], placed_BLD, embeds_BLD)


__all__ = ["ArkasrForConditionalGeneration"]
