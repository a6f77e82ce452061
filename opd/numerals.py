"""Numbers in digits written out as words, so that `21` and `einundzwanzig` count as the same answer.

Spelt are whole numbers, grouped or not, decimals, and a per cent sign behind a number. Left in digits are numbers
written against a letter (`3D`, `90er`), with leading zeros (`007`) or of more than 12 digits (Chinese, Japanese and
Korean read those digit by digit). A date or a clock time is spelt number by number. Which form a language has for a
number is not always settled (`sto jeden`, `stojeden`; gender; case): the one below is a convention that makes digits
on both sides equal, and words equal to digits in the most usual form.

Words come from CLDR (unicode-rbnf), and from num2words for the four languages in which CLDR's are wrong or unusual.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

_MAX_DIGITS = 12

# ISO 639-1 -> the decimal mark and the per cent sign as spoken (the form after five and more).
_EUROPEAN = {
    "de": ("komma", "prozent"),
    "fr": ("virgule", "pour cent"),
    "es": ("coma", "por ciento"),
    "pl": ("przecinek", "procent"),
    "it": ("virgola", "per cento"),
    "ro": ("virgulă", "la sută"),
    "hu": ("egész", "százalék"),
    "cs": ("čárka", "procent"),
    "nl": ("komma", "procent"),
    "fi": ("pilkku", "prosenttia"),
    "hr": ("zarez", "posto"),
    "sk": ("čiarka", "percent"),
    "sl": ("vejica", "odstotkov"),
    "et": ("koma", "protsenti"),
    "lt": ("kablelis", "procentų"),
}
_NUM2WORDS = {"hu", "ro", "sk", "sl"}
_HUNDREDS_IN_YEARS = {"de", "nl"}  # 1984 is neunzehnhundertvierundachtzig
_DIGITS_AFTER_COMMA = {"de", "fi"}  # 3,14 is drei komma eins vier; elsewhere three comma fourteen

_EUROPEAN_NUMBER = re.compile(
    r"""
    (?<![^\W_])(?<![0-9][.,])
    (?P<whole>[0-9]{1,3}(?P<mark>[ .'])[0-9]{3}(?:(?P=mark)[0-9]{3})* | [0-9]{1,3}(?:,[0-9]{3}){2,} | [0-9]+)
    (?:[.,](?P<fraction>[0-9]+))?
    (?![^\W_]|[.,][0-9])
    (?P<percent>\s?%)?
    | (?<![^\W_])(?P<part>[0-9]+)(?![^\W_])
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class _Cjk:
    """rules: CLDR's rule set; digits: names of 0..9 in a string of digits; the others are templates."""

    rules: str
    digits: str
    point: str
    minus: str
    percent: str
    fraction: str


_CJK = {
    "zh": _Cjk("spellout-cardinal", "零一二三四五六七八九", "点", "负{}", "百分之{}", "{1}分之{0}"),
    "ja": _Cjk("spellout-numbering", "零一二三四五六七八九", "点", "マイナス{}", "{}パーセント", "{1}分の{0}"),
    "ko": _Cjk("spellout-cardinal-sinokorean", "공일이삼사오육칠팔구", "점", "마이너스{}", "{}퍼센트", "{1}분의{0}"),
}
_CJK_FRACTION = re.compile(r"(?<![0-9./])([0-9]{1,3})/([0-9]{1,3})(?![0-9]|[./][0-9])")
_CJK_NUMBER = re.compile(
    r"""
    (?:(?<!\w)(?P<minus>[-−]))?
    (?: (?<![0-9.])(?P<decimal>[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)\.(?P<fraction>[0-9]+)(?![0-9]|\.[0-9])
      | (?P<grouped>[0-9]{1,3}(?:,[0-9]{3})+)(?![0-9])
      | (?P<whole>[0-9]+)
    )
    (?P<percent>\s?%)?
    """,
    re.VERBOSE,
)
_MAX_CARDINAL_DIGITS = 8  # more of them without grouping are a telephone or an account number
_CHINESE_YEAR = re.compile(r"(?<![0-9.])(?!1000)[12][0-9]{3}(?=(?:[-–—~至到][12][0-9]{3})?年)")
_JAPANESE_POSITIONAL = re.compile(
    r"[〇一二三四五六七八九]*〇[〇一二三四五六七八九]+|[一二三四五六七八九]+〇+|[一二三四五六七八九]{4}(?=年)"
)
_KANJI_DIGITS = str.maketrans("〇一二三四五六七八九", "0123456789")
# Counters that take Korean's own numerals, with the largest number that does so in everyday speech.
_KOREAN_COUNTERS = (
    (re.compile(r"\s?시(?![장민도즌])"), 12),
    (re.compile(r"\s?살"), 99),
    (re.compile(r"\s?(?:명|마리|개(?![월국년소조사]))"), 19),
)


def require_pinned(package: str, version: str) -> None:
    """Raise ValueError unless exactly this version of a package is installed: a normaliser's name stands for it."""
    import importlib.metadata  # here because it takes longer to import than this whole module

    try:
        installed = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        installed = "none"
    if installed != version:
        raise ValueError(
            f"scoring needs {package} {version} (installed: {installed}): run pip install {package}=={version}, "
            "or choose the normaliser opd-basic-1"
        )


def spell_european(text: str, iso: str | None) -> str:
    """Lower-case text with its numbers as words; unchanged for other languages than the 15 European ones.

    A comma is the decimal mark, as all 15 write it, a point followed by three digits groups thousands (so do a space
    and an apostrophe), another point is a decimal mark too.
    """
    return _EUROPEAN_NUMBER.sub(lambda match: _european_words(match, iso), text) if iso in _EUROPEAN else text


def spell_cjk(text: str, iso: str | None) -> str:
    """Text with its numbers as Chinese, Japanese or Korean numerals; unchanged for other languages.

    Years are read digit by digit in Chinese. Korean has its own numerals before the counters of `_KOREAN_COUNTERS`.
    """
    if iso not in _CJK:
        return text
    forms = _CJK[iso]
    if iso == "zh":
        text = _CHINESE_YEAR.sub(lambda match: _one_by_one(forms, match[0]), text)
    if iso == "ja":
        text = _JAPANESE_POSITIONAL.sub(lambda match: match[0].translate(_KANJI_DIGITS), text)
    text = _CJK_FRACTION.sub(lambda m: forms.fraction.format(_cjk_whole(iso, m[1]), _cjk_whole(iso, m[2])), text)
    return _CJK_NUMBER.sub(lambda match: _cjk_words(match, iso), text)


def _european_words(match: re.Match[str], iso: str) -> str:
    if match["part"]:
        return _european_whole(iso, match["part"])
    decimal_mark, percent = _EUROPEAN[iso]
    whole, fraction = re.sub("[^0-9]", "", match["whole"]), match["fraction"]
    is_year = iso in _HUNDREDS_IN_YEARS and not fraction and len(match["whole"]) == 4 and "1100" <= whole <= "1999"
    words = [_cardinal(iso, int(whole), "spellout-numbering-year") if is_year else _european_whole(iso, whole)]
    if fraction:
        one_by_one = iso in _DIGITS_AFTER_COMMA or len(fraction) > 3 or fraction.startswith("0")
        words += [decimal_mark, *(_european_whole(iso, part) for part in (fraction if one_by_one else [fraction]))]
    return " ".join([*words, percent] if match["percent"] else words)


def _european_whole(iso: str, digits: str) -> str:
    if len(digits) > _MAX_DIGITS or (digits.startswith("0") and len(digits) > 2):  # 05 is a month or a minute
        return digits
    return _cardinal(iso, int(digits), "spellout-numbering")


def _cjk_words(match: re.Match[str], iso: str) -> str:
    forms = _CJK[iso]
    if match["decimal"]:
        after = _one_by_one(forms, match["fraction"]).replace("공", "영")
        words = _cjk_whole(iso, match["decimal"].replace(",", "")) + forms.point + after
    elif match["grouped"]:
        words = _cjk_whole(iso, match["grouped"].replace(",", ""), _MAX_DIGITS)
    elif iso == "ko" and _takes_korean_numeral(match):
        words = _cardinal(iso, int(match["whole"]), "spellout-cardinal-native-attributive")
    else:
        words = _cjk_whole(iso, match["whole"])
    if match["percent"]:
        words = forms.percent.format(words)
    return forms.minus.format(words) if match["minus"] else words


def _takes_korean_numeral(match: re.Match[str]) -> bool:
    if match["minus"] or match["percent"] or len(match["whole"]) > 2 or match["whole"].startswith("0"):
        return False
    return any(
        int(match["whole"]) <= largest and counter.match(match.string, match.end())
        for counter, largest in _KOREAN_COUNTERS
    )


def _cjk_whole(iso: str, digits: str, max_digits: int = _MAX_CARDINAL_DIGITS) -> str:
    if len(digits) > max_digits or (digits.startswith("0") and digits != "0"):
        return _one_by_one(_CJK[iso], digits)
    return _cardinal(iso, int(digits), _CJK[iso].rules).replace(" ", "")


def _one_by_one(forms: _Cjk, digits: str) -> str:
    return "".join(forms.digits[int(digit)] for digit in digits)


@lru_cache(maxsize=1 << 16)
def _cardinal(iso: str, number: int, rules: str) -> str:
    if iso not in _NUM2WORDS:
        return _cldr(iso).format_number(number, ruleset_names=[rules]).text.lower()
    words = _num2words()(number, lang=iso).lower()
    if iso == "hu":  # num2words has százkét for 102 and tizenkettőezer for 12 000
        words = re.sub("kettő(?=ezer|mill)", "két", re.sub("két$", "kettő", words))
    return words


@cache
def _num2words() -> Any:
    require_pinned("num2words", "0.5.14")
    from num2words import num2words

    return num2words


@cache
def _cldr(iso: str) -> Any:
    require_pinned("unicode-rbnf", "2.4.1")
    from unicode_rbnf import RbnfEngine

    return RbnfEngine.for_language(iso)
