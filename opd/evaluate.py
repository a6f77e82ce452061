"""Corpus error rates of transcripts against references (jiwer), and the transcripts worth looking at."""

from __future__ import annotations

import json
import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jiwer

from opd.text import AUTO, Languages, normalise_for_scoring, normaliser_name, resolve_language


@dataclass(frozen=True)
class EvalResult:
    """Error rates of a corpus as fractions (0.05 is 5 %), and the counts that they come from.

    wer and cer are total errors over total reference words or characters, not means over utterances; NaN where the
    references hold no word at all. substitutions, deletions, insertions count words; the `char_` ones characters.
    normaliser is the name behind the rates (several for mixed languages, joined by `+`): compare only equal ones.
    """

    wer: float
    cer: float
    substitutions: int
    deletions: int
    insertions: int
    num_ref_words: int
    char_substitutions: int
    char_deletions: int
    char_insertions: int
    num_ref_chars: int
    num_utterances: int
    normaliser: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class UtteranceErrors:
    """One utterance's share of an EvalResult: summed over a corpus, the counts are those of `score_transcripts`.

    ref_clean, hyp_clean: the texts as compared; wer_errors of ref_words words, cer_errors of ref_chars characters.
    """

    ref_clean: str
    hyp_clean: str
    wer_errors: int
    ref_words: int
    cer_errors: int
    ref_chars: int


class Sample(NamedTuple):
    """One row of a sample table. Texts are as written; wer is a fraction, computed on the normalised texts."""

    id: str
    reference: str
    hypothesis: str
    wer: float


def score_transcripts(
    references: Sequence[str], hypotheses: Sequence[str], languages: Languages = None, normaliser: str = AUTO
) -> EvalResult:
    """Corpus WER and CER of hypotheses against references, both normalised by `normalise_for_scoring`.

    languages is one language for all, one per utterance, or None. normaliser is a registered name, or `auto`: the one
    made for each language. A reference that is empty after normalising counts as zero words, and each word of its
    hypothesis as an insertion; to leave such utterances out, as the Open ASR Leaderboard does, filter them by
    `opd.text.is_scored_reference`. The CER counts the spaces between words, except in languages scored by CER (zh, ja,
    ko), where spacing is the writer's taste.

    Raises ValueError for no utterances, lists of unequal lengths, an unknown language or an unknown normaliser.
    """
    references, hypotheses, per_utterance = _normalised(references, hypotheses, languages, normaliser)
    words = jiwer.process_words(references, hypotheses)
    characters = jiwer.process_characters(
        [_for_characters(text, language) for text, language in zip(references, per_utterance, strict=True)],
        [_for_characters(text, language) for text, language in zip(hypotheses, per_utterance, strict=True)],
    )
    num_ref_words = words.hits + words.substitutions + words.deletions
    num_ref_chars = characters.hits + characters.substitutions + characters.deletions
    return EvalResult(
        wer=_rate(words.substitutions + words.deletions + words.insertions, num_ref_words),
        cer=_rate(characters.substitutions + characters.deletions + characters.insertions, num_ref_chars),
        substitutions=words.substitutions,
        deletions=words.deletions,
        insertions=words.insertions,
        num_ref_words=num_ref_words,
        char_substitutions=characters.substitutions,
        char_deletions=characters.deletions,
        char_insertions=characters.insertions,
        num_ref_chars=num_ref_chars,
        num_utterances=len(references),
        normaliser=normaliser_name(per_utterance, normaliser),
    )


def utterance_errors(
    reference: str, hypothesis: str, language: str | None = None, normaliser: str = AUTO
) -> UtteranceErrors:
    """What one utterance adds to the counts of `score_transcripts`. Raises ValueError as that does."""
    ref_clean = normalise_for_scoring(reference, language, normaliser)
    hyp_clean = normalise_for_scoring(hypothesis, language, normaliser)
    words = jiwer.process_words(ref_clean, hyp_clean)
    characters = jiwer.process_characters(_for_characters(ref_clean, language), _for_characters(hyp_clean, language))
    return UtteranceErrors(
        ref_clean=ref_clean,
        hyp_clean=hyp_clean,
        wer_errors=words.substitutions + words.deletions + words.insertions,
        ref_words=words.hits + words.substitutions + words.deletions,
        cer_errors=characters.substitutions + characters.deletions + characters.insertions,
        ref_chars=characters.hits + characters.substitutions + characters.deletions,
    )


def write_transcripts(path: str | os.PathLike, texts: Mapping[str, str]) -> None:
    """Utterance id -> transcript, as JSON lines with `id` and `pred_text`."""
    with open(path, "w", encoding="utf-8") as file:
        for utterance_id, text in texts.items():
            file.write(json.dumps({"id": utterance_id, "pred_text": text}, ensure_ascii=False) + "\n")


def sample_table(
    ids: Sequence[str],
    references: Sequence[str],
    hypotheses: Sequence[str],
    languages: Languages = None,
    num_samples: int = 8,
    seed: int = 0,
    normaliser: str = AUTO,
) -> list[Sample]:
    """The worst utterances (half of `num_samples`, worst first), then a fixed random choice.

    The random ones depend on `seed` and the number of utterances only, so that the same utterances can be followed
    from one evaluation to the next. An utterance with an empty reference gets the number of inserted words as its wer.
    Raises ValueError as `score_transcripts` does.
    """
    clean_references, clean_hypotheses, _ = _normalised(references, hypotheses, languages, normaliser)
    rows = [
        Sample(utterance_id, reference, hypothesis, _utterance_wer(clean_reference, clean_hypothesis))
        for utterance_id, reference, hypothesis, clean_reference, clean_hypothesis in zip(
            ids, references, hypotheses, clean_references, clean_hypotheses, strict=True
        )
    ]
    num_samples = min(num_samples, len(rows))
    fixed = random.Random(seed).sample(range(len(rows)), num_samples // 2)
    others = [index for index in range(len(rows)) if index not in set(fixed)]
    worst = sorted(others, key=lambda index: -rows[index].wer)[: num_samples - len(fixed)]
    return [rows[index] for index in worst + fixed]


def _normalised(
    references: Sequence[str], hypotheses: Sequence[str], languages: Languages, normaliser: str
) -> tuple[list[str], list[str], list[str | None]]:
    if not references:
        raise ValueError("nothing to score: the list of references is empty")
    per_utterance = [languages] * len(references) if languages is None or isinstance(languages, str) else languages
    if not len(references) == len(hypotheses) == len(per_utterance):
        raise ValueError(
            f"scoring needs one hypothesis and one language per reference, got {len(references)} references, "
            f"{len(hypotheses)} hypotheses and {len(per_utterance)} languages"
        )
    normalised = [
        [normalise_for_scoring(text, language, normaliser) for text, language in zip(texts, per_utterance, strict=True)]
        for texts in (references, hypotheses)
    ]
    return normalised[0], normalised[1], list(per_utterance)


def _for_characters(text: str, language: str | None) -> str:
    if language is not None and resolve_language(language).metric == "cer":
        return text.replace(" ", "")
    return text


def _utterance_wer(reference: str, hypothesis: str) -> float:
    words = jiwer.process_words(reference, hypothesis)
    num_errors = words.substitutions + words.deletions + words.insertions
    return num_errors / max(1, words.hits + words.substitutions + words.deletions)


def _rate(num_errors: int, num_ref: int) -> float:
    return num_errors / num_ref if num_ref else math.nan


if __name__ == "__main__":
    command = "scripts/eval/eval_jwer_ark_asr_transformers.py --help"
    print(f"error: opd.evaluate is no command; {command} scores a checkpoint on manifests", file=sys.stderr)
    raise SystemExit(2)
