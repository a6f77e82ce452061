"""Languages, the transcript clean-up and the scoring normaliser."""

from __future__ import annotations

import pytest

from opd.text import LANGUAGES, NORMALISER, clean_transcript, normalise_for_scoring, resolve_language


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
def test_normalise_for_scoring(text: str, expected: str) -> None:
    assert normalise_for_scoring(text) == expected
    assert normalise_for_scoring(expected) == expected


def test_normaliser_has_a_name_and_refuses_unknown_languages() -> None:
    assert NORMALISER == "opd-basic-1"
    assert normalise_for_scoring("A.", "German") == "a"
    with pytest.raises(ValueError, match="unknown language 'tlh'"):
        normalise_for_scoring("a", "tlh")


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


@pytest.mark.parametrize("name", ["de", "DE", "German", " german ", "de-AT", "de_CH"])
def test_resolve_language(name: str) -> None:
    assert resolve_language(name) is LANGUAGES["de"]


def test_resolve_language_aliases_and_unknown() -> None:
    assert resolve_language("cmn").iso == resolve_language("Mandarin").iso == resolve_language("zh-CN").iso == "zh"
    with pytest.raises(ValueError, match=r"unknown language 'Klingon': use one of zh \(Chinese\), en \(English\)"):
        resolve_language("Klingon")
