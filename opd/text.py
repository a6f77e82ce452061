"""Languages, transcript clean-up, and the choice of the named normaliser that texts pass before scoring."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

from opd.normalisers import BASIC, NORMALISERS, Normaliser

AUTO = "auto"
Languages = str | Sequence[str | None] | None


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
# ISO 639-2 and 639-3 codes, the bibliographic ones (ger, fre) included.
_LONG_CODES = {
    "zh": "zho chi cmn", "en": "eng", "de": "deu ger", "ja": "jpn", "fr": "fra fre", "ko": "kor", "es": "spa",
    "pl": "pol", "it": "ita", "ro": "ron rum", "hu": "hun", "cs": "ces cze", "nl": "nld dut", "fi": "fin",
    "hr": "hrv", "sk": "slk slo", "sl": "slv", "et": "est ekk", "lt": "lit",
}  # fmt: skip
_ALIASES = {code: iso for iso, codes in _LONG_CODES.items() for code in codes.split()}
_ALIASES |= {"mandarin": "zh", "slovene": "sl"}
_AUTO_CHOICE = {iso: normaliser for normaliser in NORMALISERS.values() for iso in normaliser.languages}

_END_OF_TURN = re.compile(r"<\|(?:user|assistant|im_end)\|>")
_CONTROL_TOKEN = re.compile(r"<\|[^|<>]*\|>")
_LEADING_PUNCTUATION = " ,.;:!?-"


@cache
def resolve_language(name_or_iso: str) -> Language:
    """The language of an English name, an ISO 639 code, or a code with script or region (`en`, `eng`, `English`, `en-US`).

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


def scored_language(name_or_iso: str | None) -> str | None:
    """The language if there are rules for it, else None: a run goes on in any language, compared by `opd-basic-1`."""
    try:
        return None if name_or_iso is None else resolve_language(name_or_iso).iso
    except ValueError:
        return None


@lru_cache(maxsize=1 << 15)  # an evaluation asks twice for each text, and every evaluation for the same references
def normalise_for_scoring(text: str, language: str | None = None, normaliser: str = AUTO) -> str:
    """Text as it is compared, single spaces between words.

    normaliser is a name of `opd.normalisers.NORMALISERS`, or `auto`: the one made for the language, and `opd-basic-1`
    where the language is None. Raises ValueError for an unknown language or name, and where a package is missing.
    """
    return _normaliser_for(language, normaliser).apply(
        text, None if language is None else resolve_language(language).iso
    )


def normaliser_name(languages: Languages, normaliser: str = AUTO) -> str:
    """What a result carries: the normaliser's name, or for mixed languages the names used, sorted and joined by `+`.

    languages is one language for all utterances, one per utterance, or None. Raises ValueError as above.
    """
    if languages is None or isinstance(languages, str):
        languages = [languages]
    return "+".join(sorted({_normaliser_for(language, normaliser).name for language in set(languages)}))


def is_scored_reference(text: str, language: str | None = None, normaliser: str = AUTO) -> bool:
    """Whether the Open ASR Leaderboard scores an utterance with this reference.

    It leaves out those whose reference is empty after normalising, or says `ignore time segment in scoring`.
    """
    return normalise_for_scoring(text, language, normaliser) not in ("", "ignore time segment in scoring")


@cache
def _normaliser_for(language: str | None, name: str) -> Normaliser:
    iso = None if language is None else resolve_language(language).iso
    if name == AUTO:
        return NORMALISERS[BASIC] if iso is None else _AUTO_CHOICE[iso]
    if name not in NORMALISERS:
        raise ValueError(f"unknown normaliser {name!r}: use {AUTO} or one of {', '.join(NORMALISERS)}")
    return NORMALISERS[name]
