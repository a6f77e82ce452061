"""Conversations as ARK-ASR's prompt text, and the options of `apply_chat_template`: read, checked, or refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

ROLE_TOKENS = {"user": "<|user|>", "assistant": "<|assistant|>", "system": "<|system|>"}
BEGIN_AUDIO, END_AUDIO, END_TURN = "<|begin_of_audio|>", "<|end_of_audio|>", "<|im_end|>"
SOURCES = ("path", "audio", "url", "array", "base64")
TEXT_OPTIONS = ("padding", "truncation", "max_length", "padding_side", "pad_to_multiple_of", "add_special_tokens")
PADDING = {True: "longest", False: "do_not_pad"} | {name: name for name in ("longest", "max_length", "do_not_pad")}


# -- conversations -------------------------------------------------------------------------------------------------------


def render(
    messages: Sequence[dict], audio_token: str, add_generation_prompt: bool, where: str
) -> tuple[str, dict[str, Any]]:
    """(prompt with one placeholder, the audio part) of a conversation. Raises ValueError for what has no prompt."""
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
                pieces.append(BEGIN_AUDIO + audio_token + END_AUDIO)
            elif part.get("type") == "text" and isinstance(part.get("text"), str):
                if marks := [t for t in (audio_token, BEGIN_AUDIO, END_AUDIO) if t in part["text"]]:
                    raise ValueError(f"{where}: text contains {marks[0]}, which marks audio; remove it")
                pieces.append(part["text"])
            else:
                raise ValueError(
                    f"{where}: part of type {part.get('type')!r}; use 'audio', or 'text' with a string under 'text'"
                )
        pieces += [END_TURN] * (role == "assistant")
    if len(audio_parts) != 1:
        raise ValueError(f"{where}: {len(audio_parts)} audio parts; ARK-ASR takes exactly one per conversation")
    if add_generation_prompt and messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: ends with the assistant's turn; pass add_generation_prompt=False")
    return "".join(pieces) + ROLE_TOKENS["assistant"] * add_generation_prompt, audio_parts[0]


def part_source(part: dict[str, Any], where: str) -> tuple[str, Any]:
    """(key, value) of the one source of an audio part."""
    sources = [key for key in SOURCES if part.get(key) is not None]
    unknown = sorted(set(part) - {"type", *SOURCES, "sampling_rate", "begin_time", "end_time"})
    if len(sources) != 1 or unknown:
        raise ValueError(
            f"{where}: an audio part needs one of {', '.join(SOURCES)}, has {', '.join(sources) or 'none'}"
            + (f" and the unknown {', '.join(unknown)}" if unknown else "")
        )
    return sources[0], part[sources[0]]


def part_segment(part: dict[str, Any], where: str) -> tuple[float, float | None]:
    """(offset, duration or None for the rest) in seconds from begin_time and end_time; -1 or None is open."""
    begin, end = (part.get(key) for key in ("begin_time", "end_time"))
    begin, end = -1.0 if begin is None else float(begin), -1.0 if end is None else float(end)
    offset = max(begin, 0.0)
    if 0 <= end <= offset:
        raise ValueError(f"{where}: end_time {end:g} is not after begin_time {offset:g}; correct the times")
    return offset, None if end < 0 else end - offset


# -- options -------------------------------------------------------------------------------------------------------------


class TextOptions(NamedTuple):
    """How prompts are padded. A prompt is fixed by its audio, so it is never cut: max_length only bounds it."""

    padding: str = "longest"
    side: str = "left"
    max_length: int | None = None
    multiple_of: int = 1
    add_special_tokens: bool = False

    def length(self, lengths: Sequence[int]) -> int:
        """The length that prompts of these lengths are padded to. Raises ValueError where they do not fit."""
        longest = max(lengths)
        if self.max_length is not None and longest > self.max_length:
            raise ValueError(
                f"text_kwargs: max_length={self.max_length}, but a prompt has {longest} tokens and cannot be cut"
            )
        if self.padding == "do_not_pad":
            if min(lengths) != longest:
                raise ValueError("text_kwargs: padding=False, but the prompts differ in length; use padding='longest'")
            return longest
        length = self.max_length if self.max_length and self.padding == "max_length" else longest
        return round_up(length, self.multiple_of)


def text_options(text_kwargs: dict[str, Any], other_kwargs: dict[str, Any]) -> TextOptions:
    """The options in text_kwargs and in the call itself. Raises ValueError for all that cannot be honoured."""
    unknown = sorted(set(text_kwargs) - set(TEXT_OPTIONS))
    unknown += [name for name, value in other_kwargs.items() if name not in TEXT_OPTIONS and value not in (None, False)]
    if unknown:
        raise ValueError(f"apply_chat_template: {', '.join(unknown)} cannot be honoured by ARK-ASR; leave out")
    given = {name: value for name, value in other_kwargs.items() if name in TEXT_OPTIONS}
    if differ := [name for name in given.keys() & text_kwargs.keys() if given[name] != text_kwargs[name]]:
        raise ValueError(f"apply_chat_template: {differ[0]} has another value in text_kwargs; give it once")
    given |= text_kwargs
    padding, side = given.get("padding", True), given.get("padding_side") or "left"
    truncation = given.get("truncation") not in (None, False, "do_not_truncate")
    max_length, multiple_of = given.get("max_length"), given.get("pad_to_multiple_of") or 1
    if padding not in PADDING:
        raise ValueError(f"padding={padding!r}: must be True, 'longest', 'max_length' or False")
    if side not in ("left", "right"):
        raise ValueError(f"padding_side={side!r}: must be 'left' or 'right'")
    if (max_length is not None) != (truncation or padding == "max_length"):
        raise ValueError(
            f"text_kwargs: max_length={max_length} with padding={padding!r} and truncation={truncation}; max_length is "
            "the length of padding='max_length' or the bound of truncation=True (which refuses a longer prompt)"
        )
    return TextOptions(PADDING[padding], side, max_length, multiple_of, bool(given.get("add_special_tokens")))


def audio_samples(lengths: Sequence[int], padding: str | bool, max_length: int, multiple_of: int | None) -> int:
    """Samples that clips of these lengths are padded to."""
    if padding not in (True, "longest", "max_length"):
        raise ValueError(f"audio_padding={padding!r}: must be 'longest' or 'max_length'")
    if multiple_of is not None and multiple_of < 1:
        raise ValueError(f"audio_pad_to_multiple_of={multiple_of}: must be at least 1 sample")
    return round_up(max_length if padding == "max_length" else max(lengths), multiple_of or 1)


def float_dtype(name: str | torch.dtype) -> torch.dtype:
    """The floating-point type of that name, with or without "torch."."""
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"audio_dtype={str(name)!r}: must be a floating-point type such as float32 or bfloat16")
    return dtype


def round_up(number: int, multiple_of: int) -> int:
    return -(-number // multiple_of) * multiple_of
