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

from .audio_arkasr import check_waveform, log_mel, read_audio, resample, segment_bounds
from .configuration_arkasr import AUTO_MAP, num_audio_tokens

logger = logging.get_logger(__name__)

DEFAULT_INSTRUCTION = "Please transcribe this audio."
ROLE_TOKENS = {"user": "<|user|>", "assistant": "<|assistant|>", "system": "<|system|>"}
BEGIN_AUDIO, END_AUDIO, END_TURN = "<|begin_of_audio|>", "<|end_of_audio|>", "<|im_end|>"
EXTRA_SPECIAL_TOKENS = [ROLE_TOKENS["user"], BEGIN_AUDIO, END_AUDIO, ROLE_TOKENS["assistant"], ROLE_TOKENS["system"]]
TEXT_KWARGS = {"padding", "max_length", "padding_side", "truncation", "add_special_tokens"}
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
        return {**self._pad_ids(prompts, "left", None), "audios": audios_BMF, "audio_mask": mask_BF}

    def _pad_ids(self, rows: list[list[int]], side: str, length: int | None) -> dict[str, torch.Tensor]:
        longest = max(len(row) for row in rows)
        if length is not None and longest > length:
            raise ValueError(f"text_kwargs: max_length={length}, but a prompt has {longest} tokens and cannot be cut")
        length = length or longest
        ids_BL = torch.full((len(rows), length), self.tokenizer.pad_token_id)
        mask_BL = torch.zeros(len(rows), length, dtype=torch.long)
        for i, row in enumerate(rows):
            place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            ids_BL[i, place] = torch.tensor(row)
            mask_BL[i, place] = 1
        return {"input_ids": ids_BL, "attention_mask": mask_BL}

    # -- conversations -----------------------------------------------------------------------------------------------

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: list[Any],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        return_tensors: str = "pt",
        return_dict: bool = True,
        sampling_rate: int = 16000,
        audio_padding: str = "longest",
        audio_max_length: int | None = None,
        audio_dtype: str | torch.dtype | None = None,
        text_kwargs: dict[str, Any] | None = None,
        padding_side: str = "left",
        **unknown: Any,
    ) -> BatchFeature | str | list[str]:
        """Model inputs of a conversation, or of a list of conversations with one clip each.

        conversation      messages {"role", "content"}; content is a string or parts {"type": "text", "text"} and
                          {"type": "audio"} with "path" (or "audio", "url": a local file), or "array" (mono floats, with
                          "sampling_rate" where it is not 16000), and begin_time / end_time in seconds (-1: whole clip)
        tokenize          False gives the prompt text (a list of texts for a list of conversations)
        return_tensors    "pt" or "np"
        audio_padding     "longest", or "max_length": mel frames for audio_max_length
        audio_max_length  samples; longer clips are cut. None: 30 s, cut with a warning
        text_kwargs       padding (True, "longest" or "max_length" with max_length), padding_side

        Returns input_ids, attention_mask (B, L), audios (B, M, F), audio_mask (B, F).
        Raises ValueError for whatever it cannot honour.
        """
        if refused := [name for name, value in unknown.items() if value is not None and value is not False]:
            raise ValueError(f"apply_chat_template: {', '.join(refused)} cannot be honoured by ARK-ASR; leave out")
        if sampling_rate != self.feature_extractor.sampling_rate:
            raise ValueError(
                f"sampling_rate={sampling_rate}: the model hears {self.feature_extractor.sampling_rate} Hz. Give an "
                'array\'s own rate in its part, {"type": "audio", "array": ..., "sampling_rate": ...}'
            )
        if return_tensors not in ("pt", "np") or not return_dict:
            raise ValueError("apply_chat_template: returns a dictionary of 'pt' or 'np' tensors, nothing else")
        dtype = str(audio_dtype or self.audio_dtype).removeprefix("torch.")
        if return_tensors == "np" and dtype == "bfloat16":
            raise ValueError("audio_dtype: numpy has no bfloat16; pass audio_dtype='float32' or return_tensors='pt'")
        if audio_padding not in ("longest", "max_length"):
            raise ValueError(f"audio_padding={audio_padding!r}: must be 'longest' or 'max_length'")
        side, text_length = _text_options(text_kwargs or {}, padding_side)
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError("conversation: needs a list of messages, or a list of such lists; it is empty or no list")
        single = isinstance(conversation[0], dict)
        conversations = [conversation] if single else conversation
        rendered = [
            self._render(messages, add_generation_prompt, f"conversation {index}")
            for index, messages in enumerate(conversations)
        ]
        clips = [self._load_part(part, audio_max_length, f"conversation {i}") for i, (_, part) in enumerate(rendered)]
        hop = self.feature_extractor.hop_length
        texts = [
            text.replace(self.audio_token, self.audio_token * self.num_audio_tokens(len(clip) // hop))
            for (text, _), clip in zip(rendered, clips, strict=True)
        ]
        if not tokenize:
            return texts[0] if single else texts
        inputs = self._pad_ids([self._encode(text) for text in texts], side, text_length)
        audios_BMF, mask_BF = self.features(clips)
        if audio_padding == "max_length":
            missing = (audio_max_length or self.feature_extractor.n_samples) // hop - mask_BF.shape[1]
            audios_BMF, mask_BF = (torch.nn.functional.pad(x, (0, missing)) for x in (audios_BMF, mask_BF))
        inputs |= {"audios": audios_BMF.to(getattr(torch, dtype)), "audio_mask": mask_BF}
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
        inputs = self._pad_ids([self._encode(t) for t in texts], "left", None)
        if audios is not None:
            inputs["audios"], inputs["audio_mask"] = self.features(audios)
        return BatchFeature(inputs)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, messages: Sequence[dict], add_generation_prompt: bool, where: str) -> tuple[str, dict[str, Any]]:
        """(prompt with one placeholder, the audio part) of a conversation."""
        pieces: list[str] = []
        audio_parts: list[dict[str, Any]] = []
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role not in ROLE_TOKENS:
                raise ValueError(f"{where}: role {role!r} is unknown; use {', '.join(ROLE_TOKENS)}")
            pieces.append(ROLE_TOKENS[role])
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or []:
                if part.get("type") == "audio":
                    audio_parts.append(part)
                    pieces.append(BEGIN_AUDIO + self.audio_token + END_AUDIO)
                elif part.get("type") == "text" and isinstance(part.get("text"), str):
                    pieces.append(self._plain_text(part["text"], where))
                else:
                    raise ValueError(
                        f"{where}: part of type {part.get('type')!r}; use 'audio', or 'text' with a string under 'text'"
                    )
            pieces += [END_TURN] * (role == "assistant")
        if len(audio_parts) != 1:
            raise ValueError(f"{where}: {len(audio_parts)} audio parts; ARK-ASR takes exactly one per conversation")
        if add_generation_prompt and messages[-1]["role"] == "assistant":
            raise ValueError(f"{where}: ends with the assistant's turn; pass add_generation_prompt=False")
        return "".join(pieces) + self.assistant_token * add_generation_prompt, audio_parts[0]

    def _plain_text(self, text: str, where: str) -> str:
        if found := [t for t in (self.audio_token, BEGIN_AUDIO, END_AUDIO) if t in text]:
            raise ValueError(f"{where}: text contains {found[0]}, which marks audio; remove it")
        return text

    def _load_part(self, part: dict[str, Any], max_length: int | None, where: str) -> np.ndarray:
        """Mono float32 samples of an audio part at 16 kHz, cut to max_length (None: 30 s)."""
        rate = self.feature_extractor.sampling_rate
        sources = [key for key in ("path", "audio", "url", "array") if part.get(key) is not None]
        unknown = set(part) - {"type", "path", "audio", "url", "array", "sampling_rate", "begin_time", "end_time"}
        if len(sources) != 1 or unknown:
            raise ValueError(
                f"{where}: an audio part needs one of path, audio, url (a local file) or array, has "
                f"{', '.join(sources) or 'none'}"
                + (f" and the unknown {', '.join(sorted(unknown))}" if unknown else "")
            )
        offset, duration = _segment(part, where)
        if sources[0] == "array" or not isinstance(part[sources[0]], (str, os.PathLike)):
            own_rate = int(part.get("sampling_rate") or rate)
            samples = check_waveform(part[sources[0]], 0, where)
            samples = samples[slice(*segment_bounds(len(samples), own_rate, offset, duration, where))]
            samples = resample(samples, own_rate, rate)
        else:
            samples = self._load_audio_file(part[sources[0]], rate, offset, duration)
        limit = self.feature_extractor.n_samples if max_length is None else max_length
        if max_length is None and len(samples) > limit:
            logger.warning(
                f"{where}: audio of {len(samples) / rate:.1f} s is cut to {limit / rate:g} s; split it, or pass "
                "audio_max_length (in samples)"
            )
        return check_waveform(samples[:limit], self.feature_extractor.n_fft // 2, where)

    def _load_audio_file(
        self, path: str | os.PathLike, sampling_rate: int, offset: float = 0.0, duration: float | None = None
    ) -> np.ndarray:
        """A local file's mono float32 samples at `sampling_rate`, from `offset` seconds for `duration` seconds."""
        return read_audio(path, sampling_rate, offset, duration)

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


def _segment(part: dict[str, Any], where: str) -> tuple[float, float | None]:
    """(offset, duration or None for the rest) in seconds from begin_time and end_time; -1 or None is open."""
    begin, end = (part.get(key) for key in ("begin_time", "end_time"))
    begin, end = -1.0 if begin is None else float(begin), -1.0 if end is None else float(end)
    offset = max(begin, 0.0)
    if 0 <= end <= offset:
        raise ValueError(f"{where}: end_time {end:g} is not after begin_time {offset:g}; correct the times")
    return offset, None if end < 0 else end - offset


def _text_options(text_kwargs: dict[str, Any], padding_side: str) -> tuple[str, int | None]:
    """(padding side, length to pad to or None) of text_kwargs."""
    unknown = sorted(set(text_kwargs) - TEXT_KWARGS)
    padding, length = text_kwargs.get("padding", True), text_kwargs.get("max_length")
    side = text_kwargs.get("padding_side", padding_side)
    if unknown or text_kwargs.get("truncation") or text_kwargs.get("add_special_tokens"):
        raise ValueError(
            f"text_kwargs: {', '.join(unknown) or 'truncation and add_special_tokens'} cannot be honoured, the prompt "
            "is fixed by the audio; use padding, max_length, padding_side"
        )
    if padding not in (True, "longest", "max_length") or (padding == "max_length") != (length is not None):
        raise ValueError(
            f"text_kwargs: padding={padding!r} with max_length={length}; use 'longest', or both for a length"
        )
    if side not in ("left", "right"):
        raise ValueError(f"padding_side={side!r}: must be 'left' or 'right'")
    return side, length


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
