"""The named normalisers that references and hypotheses pass before they are compared.

An error rate means nothing without its normaliser, so every result carries the name. What a name does never changes:
a change gets a new name, and the packages behind a name are pinned to one version, which is checked.

How they stand to the Open ASR Leaderboard (github.com/huggingface/open_asr_leaderboard, `normalizer/`):

- Its English rules began as Whisper's: `whisper-english-...` gives those texts but for the two additions named at
  `whisper_english`. Later it corrected the spelling list and joined dotted abbreviations (`U.S.` = `US`); since April
  2026 (pull request 142) it removes more fillers (er, ah, huh ...), joins spelt-out acronyms, maps clock times, names
  and compounds, keeps most possessives, and counts `white paper` = `whitepaper` as right. Figures of different stages
  do not compare, and only the first is computed here.
- Its other European languages get punctuation removed, lower case, and digits spelt by num2words, as in `european-1`;
  `european-1` also reads decimals, thousands with points and per cent signs, and folds the variants it names.
- Its Chinese gets simplified characters and spelt numbers, as in `cjk-1`, with another library for the numbers.
- It leaves out utterances whose normalised reference is empty: `opd.text.is_scored_reference`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from opd.numerals import require_pinned, spell_cjk, spell_european

BASIC = "opd-basic-1"
_WHISPER_NORMALIZER = "0.1.14"

# Signs that writers use for an apostrophe. Mapped before NFKC, which would turn the acute accent into a space.
_APOSTROPHES = str.maketrans(dict.fromkeys("\u2019\u2018\u02bc\u00b4\u0060\uff07", "'"))
_LOOSE_APOSTROPHE = re.compile(r"(?<!\w)'|'(?!\w)")
_OMISSION = re.compile(r"…|\.{2,}")

_VULGAR_FRACTION = re.compile("(?<=[0-9])[\u00bc-\u00be\u2150-\u215e]")
_SQUARE_BRACKETS = re.compile(r"[<\[][^>\]]*[>\]]")
_ROUND_BRACKETS = re.compile(r"\([^)]+\)")

_SAME_SPELLING = {
    "ro": str.maketrans({"ş": "ș", "ţ": "ț"}),
    "fr": str.maketrans({"œ": "oe", "æ": "ae"}),
}
_SAME_CHINESE = str.maketrans("两〇", "二零")
_CHINESE_ONE = re.compile("幺(?=[幺零一二三四五六七八九])|(?<=[幺零一二三四五六七八九])幺")
_SPACE_BESIDE_CJK = re.compile(r"(?<![0-9a-z])\s+(?![−-])|\s+(?![0-9a-z−-])")


@dataclass(frozen=True)
class Normaliser:
    """name: what results carry, version included; languages: ISO 639-1 codes that `auto` gives it, none for `basic`;
    apply: (text, ISO 639-1 code or None) -> text with single spaces, for any string, without raising."""

    name: str
    languages: tuple[str, ...]
    apply: Callable[[str, str | None], str]


class _CharacterTable(dict[int, str]):
    """A table for str.translate that asks `rule` for each new character once."""

    def __init__(self, rule: Callable[[str], str]) -> None:
        super().__init__()
        self.rule = rule

    def __missing__(self, code: int) -> str:
        self[code] = self.rule(chr(code))
        return self[code]


def basic(text: str, iso: str | None = None) -> str:
    """NFKC, lower case, no punctuation or symbols, single spaces; all languages alike (`opd-basic-1`).

    Punctuation becomes a space (`twenty-one` is two words); an apostrophe inside a word stays (`don't`, `l'eau`).
    """
    text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower().translate(_BASIC_CHARACTERS)
    return " ".join(_LOOSE_APOSTROPHE.sub(" ", text).split())


def whisper_english(text: str, iso: str | None = None) -> str:
    """Whisper's English rules: contractions, titles, fillers, numbers as digits, American spelling.

    Computed by the package whisper-normalizer without the four rules that it adds to OpenAI's (kinda, sorta, dunno,
    cause), which neither Whisper, transformers nor the leaderboard has. Two additions of ours, before those rules:
    typographic apostrophes become straight ones, so that `don’t` is `do not` too, and dots of omission a space, of which
    Whisper's rules leave a word `.` at the end of a text. Text that they refuse (numbers of thousands of digits) is
    left to `basic`.
    """
    normalise = _whisper_english()
    try:
        return " ".join(normalise(_OMISSION.sub(" ", text.translate(_APOSTROPHES))).split())
    except (AssertionError, ValueError):
        return basic(text)


def european(text: str, iso: str | None = None) -> str:
    """Whisper's multilingual rules with the diacritics kept and numbers as words (`european-1`).

    NFKC, lower case, no text in brackets, numbers spelt (`opd.numerals`), punctuation and symbols -> space. So an
    apostrophe of any shape separates two words (`l'eau` = `l’eau` = `l eau`), as it does on the leaderboard.
    Folded variants: Romanian ş, ţ with a cedilla; French œ, æ; Dutch één (een).
    """
    text = _ROUND_BRACKETS.sub("", _SQUARE_BRACKETS.sub("", _folded(text)))
    if iso in _SAME_SPELLING:
        text = text.translate(_SAME_SPELLING[iso])
    text = spell_european(text, iso)
    if iso == "nl":
        text = text.replace("één", "een").replace("eén", "een")
    return _without_punctuation(text, " ")


def cjk(text: str, iso: str | None = None) -> str:
    """Chinese, Japanese and Korean as they are compared by characters (`cjk-1`).

    NFKC (full and half width, Hangul, kana voicing), lower case, no text in square or angle brackets, numbers as
    numerals of the language (`opd.numerals`), no punctuation or symbols. Chinese and Japanese lose all white space;
    Korean keeps single spaces, for its word error rate, and the CER drops them.
    Chinese also: simplified characters (OpenCC t2s); 两 = 二, because a digit does not tell them apart; 〇 = 零;
    幺 = 一 among digits. Japanese keeps hiragana, katakana and the long vowel mark as they are written.
    """
    text = _folded(text)
    if iso == "zh":
        text = _opencc().convert(text)
    text = _SQUARE_BRACKETS.sub("", text)
    if iso in ("zh", "ja"):
        text = _SPACE_BESIDE_CJK.sub("", text)
    text = spell_cjk(text, iso)
    text = _without_punctuation(text, "" if iso in ("zh", "ja") else " ")
    if iso == "zh":
        text = _CHINESE_ONE.sub("一", text.translate(_SAME_CHINESE))
    return text.replace("〇", "零") if iso == "ja" else text


NORMALISERS: dict[str, Normaliser] = {
    normaliser.name: normaliser
    for normaliser in (
        Normaliser(BASIC, (), basic),
        Normaliser(f"whisper-english-{_WHISPER_NORMALIZER}", ("en",), whisper_english),
        Normaliser(
            "european-1",
            ("de", "fr", "es", "pl", "it", "ro", "hu", "cs", "nl", "fi", "hr", "sk", "sl", "et", "lt"),
            european,
        ),
        Normaliser("cjk-1", ("zh", "ja", "ko"), cjk),
    )
}


def _folded(text: str) -> str:
    text = _VULGAR_FRACTION.sub(r" \g<0>", text.translate(_APOSTROPHES))
    text = unicodedata.normalize("NFKC", text).replace("\u2044", "/")
    return text.lower().translate(_VISIBLE)


def _without_punctuation(text: str, space: str) -> str:
    # Composed again: a combining mark may now stand behind another character (か゛ is か, space, mark after NFKC).
    return unicodedata.normalize("NFC", space.join(text.translate(_NO_PUNCTUATION).split()))


def _basic_character(character: str) -> str:
    if character == "'":
        return character
    category = unicodedata.category(character)
    if category == "Cf":  # soft hyphens, zero-width marks: invisible, and no word ends there
        return ""
    return " " if category[0] in "PS" else character


def _visible_character(character: str) -> str:
    category = unicodedata.category(character)
    if category == "Cf" or "\ufe00" <= character <= "\ufe0f":  # the latter choose a glyph for the character before
        return ""
    return " " if category == "Cc" else character


def _no_punctuation(character: str) -> str:
    return " " if unicodedata.category(character)[0] in "PS" else character


_BASIC_CHARACTERS = _CharacterTable(_basic_character)
_VISIBLE = _CharacterTable(_visible_character)
_NO_PUNCTUATION = _CharacterTable(_no_punctuation)


@cache
def _whisper_english() -> Any:
    require_pinned("whisper-normalizer", _WHISPER_NORMALIZER)
    from whisper_normalizer.english import EnglishTextNormalizer

    normaliser = EnglishTextNormalizer()
    for word in ("kinda", "sorta", "dunno", "cause"):
        del normaliser.replacers[rf"\b{word}\b"]
    # Compiled, the 50 patterns of each text need no look-up in the cache of `re`: a fifth of the time.
    normaliser.replacers = {re.compile(pattern): text for pattern, text in normaliser.replacers.items()}
    return normaliser


@cache
def _opencc() -> Any:
    require_pinned("opencc", "1.4.2")
    from opencc import OpenCC

    return OpenCC("t2s")
