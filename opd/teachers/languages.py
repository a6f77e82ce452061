"""The language a teacher is told for an utterance: from the manifest, one for all, or none where it detects it itself."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from opd.text import LANGUAGES, resolve_language
from opd.types import Utterance

MANIFEST, AUTO = "manifest", "auto"
# ISO code -> the name that Qwen3-ASR's prompt has (its processor's table in transformers 5.19).
QWEN3_ASR_LANGUAGES = {
    "ar": "Arabic", "yue": "Cantonese", "zh": "Chinese", "cs": "Czech", "da": "Danish", "nl": "Dutch", "en": "English",
    "fil": "Filipino", "fi": "Finnish", "fr": "French", "de": "German", "el": "Greek", "hi": "Hindi", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "ko": "Korean", "mk": "Macedonian", "ms": "Malay",
    "fa": "Persian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian", "es": "Spanish",
    "sv": "Swedish", "th": "Thai", "tr": "Turkish", "vi": "Vietnamese",
}  # fmt: skip
EVERY_LANGUAGE = {language.iso: language.name for language in LANGUAGES.values()} | QWEN3_ASR_LANGUAGES


class Spoken(NamedTuple):
    """A language as a teacher knows it."""

    iso: str
    name: str


def known_languages(section: Mapping[str, Any]) -> dict[str, str] | None:
    """ISO code -> name of what a teacher (the `teacher` section of a config) knows; None where it is told no language.

    Raises ValueError for a language in teacher.prompt.languages that has no known name.
    """
    if not takes_language(section):
        return None
    if section["kind"] == "qwen3_asr":
        return QWEN3_ASR_LANGUAGES
    own = section["prompt"].get("languages")
    return EVERY_LANGUAGE if own is None else dict(find_language(str(name), EVERY_LANGUAGE) for name in own)


def takes_language(section: Mapping[str, Any]) -> bool:
    """Whether a teacher (the `teacher` section of a config) is told a language at all."""
    return section["kind"] == "qwen3_asr" or (section["kind"] == "hf" and names_language(section["prompt"]))


def names_language(prompt: Any) -> bool:
    """Whether a prompt form has a place for the language."""
    if isinstance(prompt, Mapping):
        return any(names_language(value) for value in prompt.values())
    if isinstance(prompt, list | tuple):
        return any(names_language(value) for value in prompt)
    return isinstance(prompt, str) and ("{language}" in prompt or "{iso}" in prompt)


def find_language(name_or_iso: str, known: Mapping[str, str]) -> Spoken:
    """The entry of `known` for an English name, an ISO code or a code with a region. Raises ValueError listing them."""
    wanted = name_or_iso.strip().lower()
    candidates = [wanted, re.split(r"[-_]", wanted, maxsplit=1)[0]]
    try:
        candidates.append(resolve_language(name_or_iso).iso)  # knows aliases
    except ValueError:
        pass
    for candidate in candidates:
        for iso, name in known.items():
            if candidate in (iso, name.lower()):
                return Spoken(iso, name)
    listed = ", ".join(f"{name} ({iso})" for iso, name in sorted(known.items(), key=lambda item: item[1]))
    raise ValueError(f"language {name_or_iso!r} is not one that this teacher knows; it knows {listed}")


def language_of(utterance: Utterance, section: Mapping[str, Any], known: Mapping[str, str]) -> Spoken | None:
    """What the teacher is told for an utterance; None: it detects the language itself.

    Raises ValueError that names the utterance where it has no language, or one that the teacher does not know.
    """
    setting = section["language"]
    if setting == AUTO:
        return None
    spoken = utterance.language if setting == MANIFEST else setting
    if not spoken:
        raise ValueError(
            f"utterance {utterance.id!r} has no language, which the teacher is told: give its line a `language`, set "
            "data.default_language, or teacher.language=auto where the teacher detects it itself"
        )
    try:
        return find_language(spoken, known)
    except ValueError as error:
        what = f"utterance {utterance.id!r}" if setting == MANIFEST else "teacher.language"
        raise ValueError(f"{what}: {error}") from error
