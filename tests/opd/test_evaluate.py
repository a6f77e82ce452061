"""Error rates against errors counted by hand."""

from __future__ import annotations

import json
import math

import pytest

from opd.evaluate import sample_table, score_transcripts, utterance_errors
from opd.text import normaliser_name


def test_counts_by_hand() -> None:
    references = ["One two three.", "four five", "six seven eight nine"]
    hypotheses = ["one too three", "four", "six seven eight nine ten"]  # one substitution, deletion, insertion
    result = score_transcripts(references, hypotheses, "en", normaliser="opd-basic-1")
    assert (result.substitutions, result.deletions, result.insertions) == (1, 1, 1)
    assert (result.num_ref_words, result.num_utterances) == (9, 3)
    assert result.wer == 3 / 9
    # w -> o; " five" gone; " ten" too much; the references hold 13 + 9 + 20 characters with spaces.
    assert (result.char_substitutions, result.char_deletions, result.char_insertions) == (1, 5, 4)
    assert result.num_ref_chars == 42
    assert result.cer == 10 / 42
    assert result.normaliser == "opd-basic-1"


def test_the_result_names_its_normaliser() -> None:
    references, hypotheses = ["Twenty-one colours", "21 Gäste", "二零二四年"], ["21 colors", "einundzwanzig", "2024年"]
    result = score_transcripts(references, hypotheses, ["en", "de", "zh"])
    assert (result.wer, result.num_ref_words, result.deletions) == (1 / 5, 5, 1)
    assert result.normaliser == normaliser_name(["en", "de", "zh"])
    assert result.normaliser.startswith("cjk-1+european-1+whisper-english-")
    assert score_transcripts(["a"], ["a"]).normaliser == "opd-basic-1"
    forced = score_transcripts(references, hypotheses, ["en", "de", "zh"], "opd-basic-1")
    assert (forced.normaliser, forced.num_ref_words) == ("opd-basic-1", 6)
    assert forced.wer == 1.0  # nothing of "twenty one colours", "21 gäste" or "二零二四年" is found again


def test_utterances_sum_to_the_corpus() -> None:
    references = [
        "It's one two, uh, three.",
        "Drei 21 Gäste!",
        "你好，２０２４年",
        "세 시 안녕 하세요",
        "[noise]",
        "été",
    ]
    hypotheses = ["it is 1 2 3 four", "3 einundzwanzig", "你号二零二四", "3시 안녕하세요 네", "uh huh", "l'été"]
    languages = ["en", "de", "zh", "ko", "en", None]
    for normaliser in ("auto", "opd-basic-1", "european-1", "cjk-1"):
        result = score_transcripts(references, hypotheses, languages, normaliser)
        errors = [utterance_errors(*row, normaliser) for row in zip(references, hypotheses, languages, strict=True)]
        assert sum(e.wer_errors for e in errors) == result.substitutions + result.deletions + result.insertions > 0
        assert sum(e.ref_words for e in errors) == result.num_ref_words
        assert sum(e.cer_errors for e in errors) == (
            result.char_substitutions + result.char_deletions + result.char_insertions
        )
        assert sum(e.ref_chars for e in errors) == result.num_ref_chars


def test_utterance_errors_by_hand() -> None:
    errors = utterance_errors("Mr. Smith can't.", "mister smith can not go", "en")
    assert (errors.ref_clean, errors.hyp_clean) == ("mister smith can not", "mister smith can not go")
    assert (errors.wer_errors, errors.ref_words, errors.cer_errors, errors.ref_chars) == (1, 4, 3, 20)
    assert utterance_errors("Mr. Smith", "mister smith", "en", "opd-basic-1").wer_errors == 1
    with pytest.raises(ValueError, match="unknown normaliser 'none'"):
        utterance_errors("a", "a", "en", "none")


def test_corpus_level_not_mean_of_utterances() -> None:
    assert score_transcripts(["a", "b c d e f g h i j"], ["x", "b c d e f g h i j"]).wer == 1 / 10


def test_perfect_and_dictionary() -> None:
    values = score_transcripts(["Yes, I don't!"], ["yes I don’t"]).to_dict()
    assert values["wer"] == values["cer"] == 0.0
    assert json.loads(json.dumps(values)) == values


def test_empty_reference_counts_insertions() -> None:
    result = score_transcripts(["", "...", "one two"], ["uh huh", "", "one two"])
    assert (result.insertions, result.deletions, result.num_ref_words, result.num_utterances) == (2, 0, 2, 3)
    assert result.wer == 1.0


def test_without_any_reference_word_the_rate_is_undefined() -> None:
    result = score_transcripts([""], ["noise"])
    assert math.isnan(result.wer)
    assert result.insertions == 1


def test_empty_hypothesis_counts_deletions() -> None:
    assert score_transcripts(["one two"], [""]).deletions == 2


def test_spaces_do_not_count_in_languages_scored_by_characters() -> None:
    assert score_transcripts(["你好，世界"], ["你 好 世 间"], "zh").cer == 1 / 4
    mixed = score_transcripts(["a b", "안녕 하세요"], ["ab", "안녕하세요"], ["en", "ko"])
    assert (mixed.char_deletions, mixed.num_ref_chars) == (1, 3 + 5)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        score_transcripts([], [])
    with pytest.raises(ValueError, match="2 references, 1 hypotheses and 2 languages"):
        score_transcripts(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="unknown language 'xx'"):
        score_transcripts(["a"], ["a"], ["xx"])
    with pytest.raises(ValueError, match="unknown normaliser 'best': use auto or one of opd-basic-1, "):
        score_transcripts(["a"], ["a"], "en", "best")


def test_sample_table_holds_the_worst_and_fixed_random_ones() -> None:
    ids = [f"u{index}" for index in range(40)]
    references = ["one two three four"] * 40
    good = list(references)
    bad = list(references)
    bad[7], bad[21] = "five", "one two three"
    fixed = sample_table(ids, references, good, num_samples=8)[4:]
    rows = sample_table(ids, references, bad, num_samples=8)
    assert [row.id for row in rows[4:]] == [row.id for row in fixed]
    assert len({row.id for row in rows}) == 8
    assert (rows[0].id, rows[0].wer) == ("u7", 1.0)
    assert (rows[1].id, rows[1].hypothesis, rows[1].wer) == ("u21", "one two three", 0.25)


def test_sample_table_of_a_small_set() -> None:
    rows = sample_table(["a", "b"], ["", "Yes."], ["oh no", "Yes."], num_samples=8, languages=["de", None])
    assert sorted(rows) == [("a", "", "oh no", 2.0), ("b", "Yes.", "Yes.", 0.0)]
    assert sample_table(["a"], ["x"], ["x"], num_samples=0) == []


def test_sample_table_compares_as_it_is_told() -> None:
    row = (["a"], ["twenty one"], ["21"], "en")
    assert [sample.wer for sample in sample_table(*row)] == [0.0]
    assert [sample.wer for sample in sample_table(*row, normaliser="opd-basic-1")] == [1.0]
