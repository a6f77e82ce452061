"""Any speech-to-text model of transformers with a processor and a causal decoder; the recipe says its prompt.

`teacher.prompt` has one of three forms. `{audio}` stands for the audio placeholder, `{language}` and `{iso}` for the
utterance's language:

    text: "<|user|>\\n{audio}<|user|>\\nTranscribe this {language} audio<|assistant|>\\n"      the prompt as it is
    chat: [{role: user, content: [{type: audio}, {type: text, text: "Transcribe this"}]}]     by the chat template
    transcription: {language: "{iso}"}           arguments of the processor's own apply_transcription_request
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoProcessor

from data.audio import SAMPLING_RATE
from opd.teachers.causal import CausalTeacher, Inputs
from opd.teachers.languages import Spoken, known_languages, language_of, names_language
from opd.types import Batch

LEFT_PADDED = ("input_ids", "attention_mask")
HEARS = ("feature_extractor", "audio_processor")  # what processors call their part for audio


class HfTeacher(CausalTeacher):
    """A native class of transformers: GLM-ASR, Voxtral, Granite Speech, Qwen2-Audio and others of their kind."""

    def load(self, path: str, dtype: torch.dtype, attn_implementation: str) -> tuple[Any, Any]:
        self.languages = known_languages(self.section)
        model_class = causal_class(path)
        processor = load_processor(path)  # before the weights, which take long
        check_placeholder(processor, path, self.section["prompt"])
        return load_causal(model_class, path, dtype, attn_implementation), processor

    def end_ids(self) -> list[int]:
        """All ids that end generation, the tokenizer's own EOS first."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        if configured is None:
            configured = getattr(self.model.config.get_text_config(), "eos_token_id", None)
        ends = [configured] if isinstance(configured, int) else list(configured or [])
        own = self.tokenizer.eos_token_id
        if own is None and not ends:
            raise ValueError(
                f"teacher.path={self.section['path']}: neither its generation config nor its tokenizer says which token "
                "ends a response; write eos_token_id into generation_config.json"
            )
        return list(dict.fromkeys([own, *ends] if own in ends or not ends else ends))

    def prompts_of(self, utterances: Batch, waveforms: list[np.ndarray]) -> list[tuple[list[int], Inputs]]:
        """Groups of rows with audio of one shape: not every model masks padded frames."""
        rows = self.prompt_rows(utterances, waveforms)
        groups: dict[Any, list[int]] = {}
        for index, row in enumerate(rows):
            shapes = tuple(tensor.shape for name, tensor in sorted(row.items()) if name not in LEFT_PADDED)
            groups.setdefault(shapes, []).append(index)
        return [(members, self.join([rows[i] for i in members])) for members in groups.values()]

    def prompt_rows(self, utterances: Batch, waveforms: list[np.ndarray]) -> list[Inputs]:
        """The model inputs of each prompt by itself."""
        spoken = [language_of(u, self.section, self.languages) if self.languages else None for u in utterances]
        rows = [self.prompt_row(clip, language) for clip, language in zip(waveforms, spoken, strict=True)]
        return [{name: tensor for name, tensor in row.items() if name in self.taken} for row in rows]

    def prompt_row(self, clip: np.ndarray, spoken: Spoken | None) -> Inputs:
        """One prompt in the form of the recipe."""
        prompt = self.section["prompt"]
        if "transcription" in prompt:
            arguments = _fill(_known_only(prompt["transcription"], spoken), self._values(spoken))
            return dict(self.processor.apply_transcription_request(audio=[clip], **arguments))
        if "chat" in prompt:
            # Granite's processor leaves the template to its tokenizer.
            renderer = self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer
            chat = _fill(prompt["chat"], self._values(spoken))
            return self.read_prompt(
                renderer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), clip
            )
        return self.read_prompt(_fill(prompt["text"], self._values(spoken)), clip)

    def _values(self, spoken: Spoken | None) -> dict[str, str]:
        audio_token = getattr(self.processor, "audio_token", None)
        values = {"{audio}": audio_token} if audio_token else {}  # a prompt that needs it was refused
        return values if spoken is None else values | {"{language}": spoken.name, "{iso}": spoken.iso}

    def read_prompt(self, text: str, clip: np.ndarray) -> Inputs:
        """Ids and features of a prompt with one placeholder, which the processor repeats for the clip's length."""
        return dict(self.processor(text=[text], audio=[clip], return_tensors="pt"))

    def join(self, rows: Sequence[Inputs]) -> Inputs:
        """Rows as one batch: ids padded on the left, features on the right."""
        joined = {}
        for name in rows[0]:
            tensors = [row[name] for row in rows]
            longest = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
            fill = self.pad_id if name == "input_ids" else 0
            joined[name] = torch.cat([_pad(tensor, longest, name in LEFT_PADDED, fill) for tensor in tensors])
        return self.to_model(joined)

    def read_text(self, ids: list[int]) -> str:
        return " ".join(self.tokenizer.decode(ids, skip_special_tokens=True).split())

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "languages": None if self.languages is None else list(self.languages.values())}


def _pad(tensor: torch.Tensor, shape: list[int], left: bool, fill: int) -> torch.Tensor:
    """Pads all dimensions but the first to `shape`."""
    widths: list[int] = []
    for have, want in zip(reversed(tensor.shape[1:]), reversed(shape[1:]), strict=True):
        widths += [want - have, 0] if left else [0, want - have]
    return torch.nn.functional.pad(tensor, widths, value=fill)


def _fill(form: Any, values: dict[str, str]) -> Any:
    """A prompt form with its placeholders replaced, at any depth."""
    if isinstance(form, dict):
        return {name: _fill(value, values) for name, value in form.items()}
    if isinstance(form, list | tuple):
        return [_fill(value, values) for value in form]
    if isinstance(form, str):
        for placeholder, value in values.items():
            form = form.replace(placeholder, value)
    return form


def _known_only(arguments: dict[str, Any], spoken: Spoken | None) -> dict[str, Any]:
    """Arguments without those that name the language, where the teacher detects it."""
    return {name: value for name, value in arguments.items() if spoken is not None or not names_language(value)}


def causal_class(path: str) -> Any:
    """The class that the config of a folder or Hub id names.

    Raises ValueError where this transformers does not have it, and where it is no causal decoder.
    """
    config = load_known(AutoConfig, path)
    name = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise _unknown(path, f"has no class {name}")
    if config.is_encoder_decoder or not model_class.can_generate():
        what = "is an encoder-decoder" if config.is_encoder_decoder else "does not write text token by token"
        raise ValueError(
            f"teacher.path={path}: {name} {what}; a teacher needs a causal decoder that hears the audio through its prompt"
        )
    return model_class


def load_causal(model_class: Any, path: str, dtype: torch.dtype, attn_implementation: str) -> Any:
    """The model of a folder or Hub id. Raises ValueError where weights are missing, and where it has no output layer."""
    model, info = model_class.from_pretrained(
        path, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
    )
    if info["missing_keys"] or info["mismatched_keys"]:
        names = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        raise ValueError(
            f"teacher.path={path}: {len(names)} tensors of {model_class.__name__} are missing or of another shape ({names[0]}, ...); "
            "choose a checkpoint in transformers' native layout"
        )
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"teacher.path={path}: {model_class.__name__} has no output layer over a vocabulary; choose another model"
        )
    return model


def load_processor(path: str) -> Any:
    """The processor of a folder or Hub id.

    Raises ValueError where it hears no audio, or none of 16 kHz, and where it has no tokenizer.
    """
    processor = load_known(AutoProcessor, path)
    if not hasattr(processor, "tokenizer") or not any(hasattr(processor, name) for name in HEARS):
        raise ValueError(
            f"teacher.path={path}: its processor is a {type(processor).__name__}, and a teacher's has both a part for audio and "
            "a tokenizer; choose a speech-to-text model, or fetch all files of its processor"
        )
    for name in HEARS:
        rate = getattr(getattr(processor, name, None), "sampling_rate", SAMPLING_RATE)
        if rate != SAMPLING_RATE:
            raise ValueError(f"teacher.path={path}: hears audio of {rate} Hz; only {SAMPLING_RATE} Hz is read here")
    return processor


def check_placeholder(processor: Any, path: str, prompt: Mapping[str, Any]) -> None:
    """Raises ValueError for a prompt with `{audio}` where the processor does not say which token that is."""
    if "{audio}" in str(prompt) and not getattr(processor, "audio_token", None):
        raise ValueError(
            f"teacher.prompt: has {{audio}}, but the processor of {path} ({type(processor).__name__}) names no audio_token; "
            "use the form chat with a part {type: audio}, or transcription"
        )


def load_known(auto_class: Any, path: str) -> Any:
    """`auto_class.from_pretrained`; a model that this transformers does not know is a ValueError with the way out."""
    try:
        return auto_class.from_pretrained(path)
    except (ValueError, KeyError) as error:
        raise _unknown(path, f"cannot read it ({' '.join(str(error).split())[:200]})") from error
    except OSError as error:
        raise ValueError(
            f"teacher.path={path}: neither a folder nor a Hub repository that can be read here; check the path, or the "
            f"repository, network and token ({' '.join(str(error).split())[:200]})"
        ) from error


def _unknown(path: str, what: str) -> ValueError:
    return ValueError(
        f"teacher.path={path}: transformers {transformers.__version__} of this environment {what}; set "
        "teacher.python_path to an environment that has a newer one (make teacher-env)"
    )
