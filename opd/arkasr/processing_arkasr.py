"""ARK-ASR's processor: conversations or waveforms -> prompt ids and log-mel frames; generated ids -> text.

Shape suffixes: B rows, S samples, M mel bins, F mel frames, L prompt positions.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import BatchFeature, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import logging

from .audio_arkasr import check_waveform, decode_base64, load_waveform, log_mel, read_audio
from .chat_arkasr import (
    BEGIN_AUDIO,
    END_AUDIO,
    END_TURN,
    ROLE_TOKENS,
    TextOptions,
    audio_samples,
    float_dtype,
    part_segment,
    part_source,
    render,
    text_options,
)
from .configuration_arkasr import AUTO_MAP, num_audio_tokens

logger = logging.get_logger(__name__)

DEFAULT_INSTRUCTION = "Please transcribe this audio."
EXTRA_SPECIAL_TOKENS = [ROLE_TOKENS["user"], BEGIN_AUDIO, END_AUDIO, ROLE_TOKENS["assistant"], ROLE_TOKENS["system"]]
CODEC_MARKERS = re.compile(
    r"<\|bicodec_(semantic|global)_\d+\|>|<\|(start|end)_(of_)?(global_token|glm_token|semantic_token|content)\|>"
)
END_MARKERS = re.compile("|".join(re.escape(t) for t in (ROLE_TOKENS["user"], ROLE_TOKENS["assistant"], END_TURN)))


class ArkasrProcessor(ProcessorMixin):
    """WhisperFeatureExtractor + tokenizer. Text is padded on the left by default, mel frames on the right.

    audio_token   the placeholder; one of them per audio token of the clip
    merge_factor  encoder frames per audio token, as in the model's config
    audio_dtype   type of `audios` from apply_chat_template; the model casts to its own type in any case
    """

    if int(transformers.__version__.split(".")[0]) < 5:  # transformers 5 reads the signature and warns about these
        attributes = ["feature_extractor", "tokenizer"]
        feature_extractor_class = "WhisperFeatureExtractor"
        tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        feature_extractor: Any = None,
        tokenizer: Any = None,
        audio_token: str = "<|audio|>",
        merge_factor: int = 4,
        audio_dtype: str = "float32",
        chat_template: str | None = None,
    ) -> None:
        super().__init__(feature_extractor, tokenizer, chat_template=chat_template)
        self.audio_token = audio_token
        self.merge_factor = merge_factor
        self.audio_dtype = str(audio_dtype).removeprefix("torch.")
        self.user_token, self.assistant_token = ROLE_TOKENS["user"], ROLE_TOKENS["assistant"]
        self.bos_audio_token, self.eos_audio_token, self.assistant_end_token = BEGIN_AUDIO, END_AUDIO, END_TURN
        needed = [audio_token, END_TURN, *EXTRA_SPECIAL_TOKENS]
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in needed if token not in vocabulary]:
            raise ValueError(f"tokenizer: has no token {', '.join(missing)}; use that of an ARK-ASR checkpoint")
        if feature_extractor.dither:
            raise ValueError("preprocessor_config.json: dither makes features random; set it to 0.0")
        self.audio_token_id: int = vocabulary[audio_token]
        instruction_ids = tokenizer(DEFAULT_INSTRUCTION, add_special_tokens=False)["input_ids"]
        self._prompt_head: list[int] = [vocabulary[self.user_token], vocabulary[BEGIN_AUDIO]]
        self._prompt_tail: list[int] = [vocabulary[END_AUDIO], *instruction_ids, vocabulary[self.assistant_token]]

    # -- waveforms (the trainer's path) ------------------------------------------------------------------------------

    def num_audio_tokens(self, num_frames: int) -> int:
        """Placeholders for a clip of so many mel frames."""
        return num_audio_tokens(num_frames, self.merge_factor)

    def features(self, waveforms: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """(audios (B, M, F) float32, audio_mask (B, F) int64) of mono waveforms at the extractor's rate (16 kHz).

        Equals WhisperFeatureExtractor on each clip alone; frames beyond a clip's own length are 0. Nothing is cut.
        Raises ValueError for a clip of 200 samples or fewer (the spectrogram mirrors 200 samples at each end).
        """
        extractor = self.feature_extractor
        clips = [check_waveform(clip, extractor.n_fft // 2, f"waveform {i}") for i, clip in enumerate(waveforms)]
        if not clips:
            raise ValueError("waveforms: the list is empty")
        audios_BMF, mask_BF = log_mel(clips, extractor)
        return audios_BMF, mask_BF.long()

    def prompt_ids(self, num_frames: int) -> list[int]:
        """Ids of the transcription prompt for a clip of so many mel frames; the transcript follows directly."""
        return self._prompt_head + [self.audio_token_id] * self.num_audio_tokens(num_frames) + self._prompt_tail

    def build_inputs(self, waveforms: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask (B, L), left-padded, audios (B, M, F) and audio_mask (B, F), right-padded."""
        audios_BMF, mask_BF = self.features(waveforms)
        prompts = [self.prompt_ids(int(frames)) for frames in mask_BF.sum(1)]
        return {**self._pad_ids(prompts, TextOptions()), "audios": audios_BMF, "audio_mask": mask_BF}

    def _pad_ids(self, rows: list[list[int]], options: TextOptions) -> dict[str, torch.Tensor]:
        length = options.length([len(row) for row in rows])
        ids_BL = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask_BL = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(length - len(row), length) if options.side == "left" else slice(0, len(row))
            ids_BL[i, place] = torch.tensor(row)
            mask_BL[i, place] = 1
        return {"input_ids": ids_BL, "attention_mask": mask_BL}

    # -- conversations -----------------------------------------------------------------------------------------------

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: list[Any],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        return_tensors: str = "pt",
        return_dict: bool = True,
        sampling_rate: int = 16000,
        audio_padding: str | bool = "longest",
        audio_max_length: int | None = None,
        audio_pad_to_multiple_of: int | None = None,
        audio_dtype: str | torch.dtype | None = None,
        audio_torch_dtype: str | torch.dtype | None = None,
        text_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature | str | list[str]:
        """Model inputs of a conversation, or of a list of conversations with one clip each.

        conversation      messages {"role", "content"}; content is a string or parts {"type": "text", "text"} and
                          {"type": "audio"} with "path" (or "audio", "url": a file, http(s) address or encoded bytes),
                          "base64" (an encoded file), or "array" (mono floats, with "sampling_rate" where it is not that
                          of the call), and begin_time / end_time in seconds (-1: whole clip)
        tokenize          False gives the prompt text (a list of texts for a list of conversations)
        return_tensors    "pt" or "np"
        sampling_rate     of arrays; all audio is resampled to the model's 16 kHz
        audio_padding     "longest", or "max_length": mel frames for audio_max_length
        audio_max_length  samples; longer clips are cut. None: 30 s, cut with a warning
        audio_pad_to_multiple_of  samples
        audio_dtype       of `audios` (also audio_torch_dtype); by default that of processor_config.json
        text_kwargs       padding, truncation, max_length, padding_side, pad_to_multiple_of, add_special_tokens; also
                          taken from the call itself. Truncation refuses a prompt above max_length, it cannot be cut

        Returns input_ids, attention_mask (B, L), audios (B, M, F), audio_mask (B, F).
        Raises ValueError for whatever it cannot honour, such as a chat_template: the prompt is fixed.
        """
        options = text_options(text_kwargs or {}, {"chat_template": chat_template, **kwargs})
        rendered = self._render_all(conversation, add_generation_prompt)
        clips = [
            self._load_part(part, sampling_rate, audio_max_length, f"conversation {index}")
            for index, (_, part) in enumerate(rendered)
        ]
        hop = self.feature_extractor.hop_length
        texts = [
            text.replace(self.audio_token, self.audio_token * self.num_audio_tokens(len(clip) // hop))
            for (text, _), clip in zip(rendered, clips, strict=True)
        ]
        if not tokenize:
            return texts[0] if isinstance(conversation[0], dict) else texts
        if return_tensors not in ("pt", "np") or not return_dict:
            raise ValueError("apply_chat_template: returns a dictionary of 'pt' or 'np' tensors, nothing else")
        dtype = float_dtype(audio_dtype or audio_torch_dtype or self.audio_dtype)
        if return_tensors == "np" and dtype == torch.bfloat16:
            raise ValueError("audio_dtype: numpy has no bfloat16; pass audio_dtype='float32' or return_tensors='pt'")
        limit = self.feature_extractor.n_samples if audio_max_length is None else audio_max_length
        num_samples = audio_samples([len(clip) for clip in clips], audio_padding, limit, audio_pad_to_multiple_of)
        inputs = self._pad_ids([self._encode(text, options.add_special_tokens) for text in texts], options)
        audios_BMF, mask_BF = (
            torch.nn.functional.pad(x, (0, num_samples // hop - x.shape[-1])) for x in self.features(clips)
        )
        inputs |= {"audios": audios_BMF.to(dtype), "audio_mask": mask_BF}
        if return_tensors == "np":
            inputs = {name: tensor.numpy() for name, tensor in inputs.items()}
        return BatchFeature(inputs)

    def __call__(
        self, text: str | list[str], audios: Sequence[np.ndarray] | None = None, **unknown: Any
    ) -> BatchFeature:
        """Ids of ready prompts (placeholders already repeated), left-padded, and features of their 16-kHz waveforms."""
        if unknown:
            raise ValueError(f"processor: unknown argument {', '.join(unknown)}; it takes text and audios")
        texts = [text] if isinstance(text, str) else text
        inputs = self._pad_ids([self._encode(t, False) for t in texts], TextOptions())
        if audios is not None:
            inputs["audios"], inputs["audio_mask"] = self.features(audios)
        return BatchFeature(inputs)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]

    def _render_all(self, conversation: Any, add_generation_prompt: bool) -> list[tuple[str, dict[str, Any]]]:
        """(prompt with one placeholder, audio part) of each conversation."""
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError("conversation: needs a list of messages, or a list of such lists; it is empty or no list")
        conversations = [conversation] if isinstance(conversation[0], dict) else conversation
        return [
            render(messages, self.audio_token, add_generation_prompt, f"conversation {index}")
            for index, messages in enumerate(conversations)
        ]

    def _load_part(self, part: dict[str, Any], array_rate: int, max_length: int | None, where: str) -> np.ndarray:
        """Mono float32 samples of an audio part at 16 kHz, cut to max_length (None: 30 s)."""
        rate = self.feature_extractor.sampling_rate
        samples = self._part_samples(part, rate, array_rate, where)
        limit = self.feature_extractor.n_samples if max_length is None else max_length
        if max_length is None and len(samples) > limit:
            logger.warning(
                f"{where}: audio of {len(samples) / rate:.1f} s is cut to {limit / rate:g} s; split it, or pass "
                "audio_max_length (in samples)"
            )
        return check_waveform(samples[:limit], self.feature_extractor.n_fft // 2, where)

    def _part_samples(self, part: dict[str, Any], rate: int, array_rate: int, where: str) -> np.ndarray:
        key, source = part_source(part, where)
        offset, duration = part_segment(part, where)
        if key == "base64":
            source = decode_base64(source, where)
        elif isinstance(source, (str, os.PathLike)):
            return self._load_audio_file(source, rate, offset, duration)
        own_rate = part.get("sampling_rate")
        return load_waveform(source, rate, array_rate if own_rate is None else own_rate, offset, duration, where)

    # The next three are what scripts written for the published remote code call.

    def _load_audio_file(
        self, path: str | os.PathLike, sampling_rate: int, offset: float = 0.0, duration: float | None = None
    ) -> np.ndarray:
        """Mono float32 samples at `sampling_rate` of a file or http(s) address, from `offset` for `duration` seconds."""
        return read_audio(path, sampling_rate, offset, duration)

    def _build_templates_and_audios(
        self, conversations: Sequence[Any], sampling_rate: int = 16000, add_generation_prompt: bool = True
    ) -> tuple[list[str], list[np.ndarray]]:
        """(prompts with one placeholder between the audio marks, whole clips at `sampling_rate`) of conversations."""
        rendered = self._render_all(conversations, add_generation_prompt)
        clips = [
            self._part_samples(part, sampling_rate, sampling_rate, f"conversation {index}")
            for index, (_, part) in enumerate(rendered)
        ]
        return [text for text, _ in rendered], clips

    def _calculate_audio_token_counts_per_sample(
        self,
        audios_raw: Sequence[np.ndarray],
        sampling_rate: int = 16000,
        audio_max_length: int | None = None,
        audio_pad_to_multiple_of: int | None = None,
    ) -> list[int]:
        """Placeholders of each clip, from its own length cut to audio_max_length; padding adds none."""
        extractor = self.feature_extractor
        if sampling_rate != extractor.sampling_rate:
            raise ValueError(f"sampling_rate={sampling_rate}: clips must be at {extractor.sampling_rate} Hz; resample")
        limit = extractor.n_samples if audio_max_length is None else audio_max_length
        return [self.num_audio_tokens(min(len(clip), limit) // extractor.hop_length) for clip in audios_raw]

    # -- text --------------------------------------------------------------------------------------------------------

    def clean_text(self, ids: str | Sequence[int] | torch.Tensor) -> str:
        """The transcript in generated ids or decoded text: up to the first turn marker, without codec tokens."""
        text = ids if isinstance(ids, str) else self.tokenizer.decode(ids, skip_special_tokens=False)
        text = END_MARKERS.split(text, maxsplit=1)[0]
        text = CODEC_MARKERS.sub("", text.split("<|text|>", maxsplit=1)[-1])
        return " ".join(text.split()).lstrip(" ,.;:!?-")

    def blocked_token_ids(self, vocab_size: int) -> list[int]:
        """Ids that generation must not write (for generate's `suppress_tokens`): all control tokens but the end."""
        return blocked_token_ids(self.tokenizer, vocab_size, self.tokenizer.eos_token_id)

    # -- files -------------------------------------------------------------------------------------------------------

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes tokenizer, preprocessor_config.json and processor_config.json for transformers 4 and 5."""
        if push_to_hub:
            raise ValueError("save_pretrained: push_to_hub is not supported; upload the folder with huggingface_hub")
        directory = os.fspath(save_directory)
        os.makedirs(directory, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        _rewrite_tokenizer_config(os.path.join(directory, "tokenizer_config.json"))
        common = {"auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]}, "processor_class": type(self).__name__}
        extractor = {k: v for k, v in self.feature_extractor.to_dict().items() if k not in ("mel_filters", "auto_map")}
        own = {"audio_dtype": self.audio_dtype, "audio_token": self.audio_token, "merge_factor": self.merge_factor}
        tokenizer = self.tokenizer
        files = {
            "preprocessor_config.json": {**extractor, **common},
            "processor_config.json": {**own, **common},
            "special_tokens_map.json": {
                "additional_special_tokens": EXTRA_SPECIAL_TOKENS,
                "eos_token": tokenizer.eos_token,
                "pad_token": tokenizer.pad_token,
            },
        }
        for name, content in files.items():
            _write_json(os.path.join(directory, name), content)
        if self._auto_class is not None:  # loaded as remote code: the code goes with the files
            custom_object_save(self, directory)
        return [os.path.join(directory, name) for name in sorted(os.listdir(directory))]


def blocked_token_ids(tokenizer: Any, vocab_size: int, eos_token_id: int | Sequence[int]) -> list[int]:
    """Sorted ids below vocab_size that generation must not write.

    Blocked are ids that the tokenizer does not know, its special tokens, and added tokens of the form `<...>` (such as
    `<|audio|>`, which is not special). The end is never blocked.
    """
    known = set(tokenizer.get_vocab().values())
    marked = {i for i, token in tokenizer.added_tokens_decoder.items() if re.fullmatch(r"<.*>", str(token), re.DOTALL)}
    blocked = {i for i in range(vocab_size) if i not in known} | set(tokenizer.all_special_ids) | marked
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    return sorted(i for i in blocked - ends if i < vocab_size)


def _rewrite_tokenizer_config(path: str) -> None:
    """transformers 5 writes a class name and a list that transformers 4 cannot read; both read these."""
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    for key in ("backend", "is_local", "extra_special_tokens", "local_files_only"):
        content.pop(key, None)
    content |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": EXTRA_SPECIAL_TOKENS}
    _write_json(path, content)


def _write_json(path: str, content: dict[str, Any]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True, ensure_ascii=False)
        file.write("\n")


__all__ = ["ArkasrProcessor", "blocked_token_ids"]
