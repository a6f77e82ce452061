"""Languages, transcript clean-up, and the one named normaliser that references and hypotheses pass before scoring.

A word error rate means nothing without the normaliser behind it, so every result carries `NORMALISER`. A change in
what `normalise_for_scoring` does needs a new name.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

NORMALISER = "opd-basic-1"


@dataclass(frozen=True)
class Language:
    """name in English; iso: ISO 639-1; script: ISO 15924; metric: the error rate that is customary for it."""

    name: str
    iso: str
    script: str
    metric: Literal["wer", "cer"] = "wer"


# The 19 languages of ARK-ASR, in the order of its model card.
LANGUAGES: dict[str, Language] = {
    language.iso: language
    for language in (
        Language("Chinese", "zh", "Hans", "cer"),
        Language("English", "en", "Latn"),
        Language("German", "de", "Latn"),
        Language("Japanese", "ja", "Jpan", "cer"),
        Language("French", "fr", "Latn"),
        Language("Korean", "ko", "Kore", "cer"),
        Language("Spanish", "es", "Latn"),
        Language("Polish", "pl", "Latn"),
        Language("Italian", "it", "Latn"),
        Language("Romanian", "ro", "Latn"),
        Language("Hungarian", "hu", "Latn"),
        Language("Czech", "cs", "Latn"),
        Language("Dutch", "nl", "Latn"),
        Language("Finnish", "fi", "Latn"),
        Language("Croatian", "hr", "Latn"),
        Language("Slovak", "sk", "Latn"),
        Language("Slovenian", "sl", "Latn"),
        Language("Estonian", "et", "Latn"),
        Language("Lithuanian", "lt", "Latn"),
    )
}
_BY_NAME = {language.name.lower(): language for language in LANGUAGES.values()}
_ALIASES = {"cmn": "zh", "mandarin": "zh"}

# Signs that writers use for an apostrophe. Mapped before NFKC, which would turn the acute accent into a space.
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2019\u2018\u02bc\u00b4\u0060\uff07", "'"))
_LOOSE_APOSTROPHE = re.compile(r"(?<!\w)'|'(?!\w)")

_END_OF_TURN = re.compile(r"<\|(?:user|assistant|im_end)\|>")
_CONTROL_TOKEN = re.compile(r"<\|[^|<>]*\|>")
_LEADING_PUNCTUATION = " ,.;:!?-"


def resolve_language(name_or_iso: str) -> Language:
    """The language of an English name, an ISO 639-1 code or a code with a region (`en`, `English`, `en-US`).

    Raises ValueError that lists the known languages.
    """
    wanted = name_or_iso.strip().lower()
    code = re.split(r"[-_]", wanted, maxsplit=1)[0]
    for candidate in (wanted, code):
        candidate = _ALIASES.get(candidate, candidate)
        language = LANGUAGES.get(candidate) or _BY_NAME.get(candidate)
        if language is not None:
            return language
    known = ", ".join(f"{language.iso} ({language.name})" for language in LANGUAGES.values())
    raise ValueError(f"unknown language {name_or_iso!r}: use one of {known}")


def clean_transcript(text: str) -> str:
    """What a user sees of a decoded response, control tokens included in `text`.

    Cuts at the end of the turn, keeps what follows a `<|text|>` marker, drops other `<|...|>` markers, collapses white
    space and strips punctuation from the front (the clean-up of ARK-ASR's reference script).
    """
    text = _END_OF_TURN.split(text, maxsplit=1)[0]
    text = text.rpartition("<|text|>")[2]
    text = _CONTROL_TOKEN.sub("", text)
    return " ".join(text.split()).lstrip(_LEADING_PUNCTUATION)


def normalise_for_scoring(text: str, language: str | None = None) -> str:
    """Text as it is compared: NFKC, lower case, no punctuation or symbols, single spaces (`opd-basic-1`).

    Punctuation becomes a space (`twenty-one` is two words); an apostrophe inside a word stays (`don't`, `l'eau`).
    `opd-basic-1` treats all languages alike; `language` is only checked. Raises ValueError for an unknown language.
    """
    if language is not None:
        resolve_language(language)
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower()
    text = "".join(_scored_character(character) for character in text)
    return " ".join(_LOOSE_APOSTROPHE.sub(" ", text).split())


def _scored_character(character: str) -> str:
    if character == "'":
        return character
    category = unicodedata.category(character)
    if category == "Cf":  # soft hyphens, zero-width marks: invisible, and no word ends there
        return ""
    return " " if category[0] in "PS" else character
