"""Error rates against errors counted by hand."""

from __future__ import annotations

import json
import math

import pytest

from opd.evaluate import sample_table, score_transcripts


def test_counts_by_hand() -> None:
    references = ["One two three.", "four five", "six seven eight nine"]
    hypotheses = ["one too three", "four", "six seven eight nine ten"]  # one substitution, deletion, insertion
    result = score_transcripts(references, hypotheses, "en")
    assert (result.substitutions, result.deletions, result.insertions) == (1, 1, 1)
    assert (result.num_ref_words, result.num_utterances) == (9, 3)
    assert result.wer == 3 / 9
    # w -> o; " five" gone; " ten" too much; the references hold 13 + 9 + 20 characters with spaces.
    assert (result.char_substitutions, result.char_deletions, result.char_insertions) == (1, 5, 4)
    assert result.num_ref_chars == 42
    assert result.cer == 10 / 42
    assert result.normaliser == "opd-basic-1"


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
    rows = sample_table(["a", "b"], ["", "Yes."], ["uh huh", "Yes."], num_samples=8, languages=["en", None])
    assert sorted(rows) == [("a", "", "uh huh", 2.0), ("b", "Yes.", "Yes.", 0.0)]
    assert sample_table(["a"], ["x"], ["x"], num_samples=0) == []
