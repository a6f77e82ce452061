"""Languages, the transcript clean-up and the choice of the scoring normaliser."""

from __future__ import annotations

import pytest

from opd.normalisers import BASIC, NORMALISERS
from opd.text import (
    LANGUAGES,
    clean_transcript,
    is_scored_reference,
    normalise_for_scoring,
    normaliser_name,
    resolve_language,
    scored_language,
)

ENGLISH = next(name for name in NORMALISERS if name.startswith("whisper-english-"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello,   World!\n", "hello world"),
        ("Don’t - don't - 'quoted' dogs'", "don't don't quoted dogs"),
        ("L´été, l`eau", "l'été l'eau"),
        ("rock 'n' roll", "rock n roll"),
        ("twenty-one... snake_case", "twenty one snake case"),
        ("ＡＢＣ　１２３", "abc 123"),
        ("你好，世界。", "你好 世界"),
        ("e\u0301te\u0301", "été"),
        ("Straße", "straße"),
        ("zero\u200bwidth soft\u00adhyphen", "zerowidth softhyphen"),
        ("5 % = 5 €", "5 5"),
        ("¿Qué? ¡Sí!", "qué sí"),
        ("  ...  ", ""),
        ("", ""),
    ],
)
def test_basic_rules(text: str, expected: str) -> None:
    assert normalise_for_scoring(text) == expected
    assert normalise_for_scoring(expected) == expected
    assert {normalise_for_scoring(text, language, "opd-basic-1") for language in LANGUAGES} == {expected}


def test_spoken_digits_keep_their_words_under_the_basic_rules_only() -> None:
    digits = "six seven eight two three"
    assert normalise_for_scoring(digits, "English", "opd-basic-1") == digits
    assert normalise_for_scoring(digits, "English") == "67823"


def test_auto_chooses_by_language() -> None:
    assert normaliser_name(None) == normaliser_name([None, None]) == BASIC == "opd-basic-1"
    assert normaliser_name("English") == ENGLISH
    assert {iso: normaliser_name(iso) for iso in LANGUAGES if normaliser_name(iso) != "european-1"} == {
        "zh": "cjk-1",
        "en": ENGLISH,
        "ja": "cjk-1",
        "ko": "cjk-1",
    }
    assert normaliser_name(["en", "de", "zh", "fr", None, "eng"]) == f"cjk-1+european-1+{BASIC}+{ENGLISH}"
    text = "L'été, 21 % ２０２４年"
    for language in (None, *LANGUAGES):
        assert normalise_for_scoring(text, language) == normalise_for_scoring(text, language, normaliser_name(language))


def test_a_forced_normaliser_serves_any_language() -> None:
    for name in NORMALISERS:
        assert normaliser_name(["en", "de", None], name) == name
        assert normalise_for_scoring("Café!", None, name) in ("café", "cafe")
    assert normalise_for_scoring("21 Gäste", "en", "european-1") == "21 gäste"
    assert normalise_for_scoring("einundzwanzig colour", "de", ENGLISH) == "einundzwanzig color"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown language 'tlh'"):
        normalise_for_scoring("a", "tlh")
    for call in (lambda: normalise_for_scoring("a", "en", "whisper"), lambda: normaliser_name("en", "whisper")):
        with pytest.raises(ValueError, match=f"unknown normaliser 'whisper': use auto or one of {BASIC}, {ENGLISH}, "):
            call()


def test_the_leaderboard_leaves_out_empty_references() -> None:
    assert not any(is_scored_reference(text, "en") for text in ("", "Uh, hmm...", "[noise]", " (laughs) "))
    assert not is_scored_reference("Ignore time segment in scoring.", "en")
    assert is_scored_reference("uh yes", "en")
    assert is_scored_reference("[noise]", "en", BASIC)
    assert not is_scored_reference("。", "zh")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two<|im_end|>garbage", "one two"),
        ("one<|user|>two<|im_end|>", "one"),
        ("<|lang|>noise<|text|> one  two ", "one two"),
        ("<|bicodec_semantic_12|>one<|audio|> two", "one two"),
        (", . ; well-known? Yes.", "well-known? Yes."),
        ("a < b | c > d", "a < b | c > d"),
        ("<|im_end|>", ""),
    ],
)
def test_clean_transcript(text: str, expected: str) -> None:
    assert clean_transcript(text) == expected


def test_the_19_languages() -> None:
    assert " ".join(LANGUAGES) == "zh en de ja fr ko es pl it ro hu cs nl fi hr sk sl et lt"
    assert {iso for iso, language in LANGUAGES.items() if language.metric == "cer"} == {"zh", "ja", "ko"}


@pytest.mark.parametrize(
    ("iso", "names"),
    [
        ("de", ["de", "DE", "German", " german ", "de-AT", "de_CH", "deu", "ger", "deu-Latn"]),
        ("zh", ["zh-CN", "zh-Hans-CN", "zh_TW", "zho", "chi", "cmn", "cmn_hans_cn", "Mandarin", "Chinese"]),
        ("ja", ["jpn", "ja-JP"]),
        ("ko", ["kor", "ko_kr"]),
        ("sl", ["Slovene", "Slovenian", "slv", "sl-SI"]),
        ("sk", ["slk", "slo", "Slovak"]),
        ("nl", ["nld", "dut", "nl-BE"]),
        ("et", ["est", "ekk"]),
    ],
)
def test_resolve_language(iso: str, names: list[str]) -> None:
    assert {resolve_language(name).iso for name in names} == {iso}


def test_a_run_compares_texts_of_any_language() -> None:
    assert [scored_language(name) for name in ("German", "en-US", "Klingon", None)] == ["de", "en", None, None]


def test_every_language_has_a_three_letter_code() -> None:
    codes = "zho eng deu jpn fra kor spa pol ita ron hun ces nld fin hrv slk slv est lit"
    assert [resolve_language(code).iso for code in codes.split()] == list(LANGUAGES)


@pytest.mark.parametrize("name", ["Klingon", "pt", "pt-BR", "por", "yue", "", "d"])
def test_resolve_language_refuses_others(name: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown language '{name}': use one of zh \(Chinese\), en \(English\)"):
        resolve_language(name)
