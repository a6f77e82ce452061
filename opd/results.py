"""Transcribed rows to scored rows, tables, and the files that the Open ASR Leaderboard's scorer reads."""

from __future__ import annotations

import json
import math
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import kaldialign
from rich.console import Console
from rich.table import Table

from opd.evaluate import utterance_errors
from opd.text import is_scored_reference, normalise_for_scoring, normaliser_name, resolve_language

SCORE_FIELDS = ("wer_errors", "cer_errors", "ref_words", "ref_chars")


@dataclass(frozen=True)
class SetResult:
    """One manifest's result. Rates are fractions over the whole set, NaN where there is no reference.

    wer of a language that is customarily scored by characters (zh, ja, ko) is its character error rate.
    rtfx: seconds of audio per second of transcription; failed utterances are in no rate.
    """

    name: str
    utterances: int
    failed: int
    audio_seconds: float
    transcription_seconds: float
    wer: float = math.nan
    cer: float = math.nan
    normaliser: str = ""

    @property
    def rtfx(self) -> float:
        return self.audio_seconds / self.transcription_seconds if self.transcription_seconds else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a rate that does not exist is None, as JSON has no NaN."""
        values = {**asdict(self), "rtfx": self.rtfx}
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()}


def summarise(name: str, rows: Sequence[dict[str, Any]], **scores: Any) -> SetResult:
    """The counts of transcribed rows; `scores` are wer, cer and normaliser where the rows were scored."""
    done = [row for row in rows if not row.get("error")]
    return SetResult(
        name,
        len(rows),
        len(rows) - len(done),
        sum(row["audio_seconds"] for row in done),
        sum(row["transcription_seconds"] for row in done),
        **scores,
    )


def score_rows(
    name: str,
    rows: Sequence[dict[str, Any]],
    references: Sequence[str],
    languages: Sequence[str | None],
    normaliser: str = "auto",
) -> tuple[list[dict[str, Any]], SetResult]:
    """Rows with their errors, those with most character errors first, and the result of the set.

    Adds ref_text, ref_text_clean, pred_text_clean, wer_errors, cer_errors, ref_words, ref_chars and the normaliser's
    name. A row that has no language but a reference in Chinese, Japanese or Korean script is taken for that language.
    Raises ValueError for an unknown language or normaliser.
    """
    scored = []
    totals = dict.fromkeys(SCORE_FIELDS, 0)
    used: set[str | None] = set()
    for row, reference, language in zip(rows, references, languages, strict=True):
        language = language or script_language(reference)
        used.add(language)
        errors = utterance_errors(reference, row["pred_text"], language, normaliser)
        counts = dict(
            zip(SCORE_FIELDS, (errors.wer_errors, errors.cer_errors, errors.ref_words, errors.ref_chars), strict=True)
        )
        if language is not None and resolve_language(language).metric == "cer":
            counts |= {"wer_errors": errors.cer_errors, "ref_words": errors.ref_chars}
        if not row.get("error"):
            totals = {key: totals[key] + counts[key] for key in SCORE_FIELDS}
        scored.append(
            {
                **row,
                "ref_text": reference,
                "ref_text_clean": errors.ref_clean,
                "pred_text_clean": errors.hyp_clean,
                **counts,
                "normaliser": normaliser_name([language], normaliser),
            }
        )
    scored.sort(key=lambda row: -row["cer_errors"])
    result = summarise(
        name,
        rows,
        wer=_rate(totals["wer_errors"], totals["ref_words"]),
        cer=_rate(totals["cer_errors"], totals["ref_chars"]),
        normaliser=normaliser_name(sorted(used, key=str), normaliser),
    )
    return scored, result


def script_language(text: str) -> str | None:
    """zh, ja or ko where the text is in such a script (kana: ja; Hangul: ko; else Han: zh), None for any other text."""
    scripts = {unicodedata.name(character, "").split(" ")[0] for character in text}
    if scripts & {"HIRAGANA", "KATAKANA"}:
        return "ja"
    if "HANGUL" in scripts:
        return "ko"
    return "zh" if "CJK" in scripts else None


def print_results(results: Sequence[SetResult], title: str) -> None:
    """A table of the sets, with the average over sets where there are several."""
    table = Table(title=title)
    table.add_column("set")
    for column in ("utterances", "failed", "hours", "WER", "CER", "RTFx", "normaliser"):
        table.add_column(column, justify="right")
    for result in results:
        table.add_row(*_cells(result))
    if len(results) > 1:
        table.add_section()
        table.add_row(*_cells(average(results)))
    Console(width=140).print(table)


def average(results: Sequence[SetResult]) -> SetResult:
    """The leaderboard's average: the mean of the sets' rates, each counting alike; RTFx over all audio."""
    names = sorted({result.normaliser for result in results})
    return SetResult(
        "average",
        sum(result.utterances for result in results),
        sum(result.failed for result in results),
        sum(result.audio_seconds for result in results),
        sum(result.transcription_seconds for result in results),
        sum(result.wer for result in results) / len(results),
        sum(result.cer for result in results) / len(results),
        "+".join(names),
    )


def _cells(result: SetResult) -> list[str]:
    return [
        result.name,
        str(result.utterances),
        str(result.failed),
        f"{result.audio_seconds / 3600:.3f}",
        _percent(result.wer),
        _percent(result.cer),
        f"{result.rtfx:.1f}",
        result.normaliser or "-",
    ]


def _percent(rate: float) -> str:
    return "-" if math.isnan(rate) else f"{rate:.2%}"


def _rate(num_errors: float, num_ref: float) -> float:
    return num_errors / num_ref if num_ref else math.nan


# -- the Open ASR Leaderboard ------------------------------------------------------------------------------------------


def write_leaderboard_file(
    folder: str | os.PathLike,
    model_id: str,
    dataset_id: str,
    rows: Iterable[dict[str, Any]],
    references: Iterable[str],
    language: str = "en",
) -> Path:
    """Writes a set's results as the leaderboard's scorer expects them, and returns the path.

    folder/MODEL_<model>_DATASET_<dataset>.jsonl with audio_filepath, duration and time in seconds, text, pred_text (both
    as written: the scorer normalises). dataset_id is `path_name_split`, such as
    `hf-audio/esb-datasets-test-only-sorted_librispeech_test.clean`; a slash becomes a dash. Failed rows, and references
    of which normalising leaves nothing, are left out, as the leaderboard's loader does.
    """
    path = Path(folder) / f"MODEL_{model_id.replace('/', '-')}_DATASET_{dataset_id.replace('/', '-')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for index, (row, reference) in enumerate(zip(rows, references, strict=True)):
            if row.get("error") or not is_scored_reference(reference, language):
                continue
            line = {
                "audio_filepath": row.get("id") or f"sample_{index}",
                "duration": row["audio_seconds"],
                "time": row["transcription_seconds"],
                "text": reference,
                "pred_text": row["pred_text"],
            }
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(temporary, path)
    return path


def score_leaderboard_file(path: str | os.PathLike, language: str = "en") -> SetResult:
    """WER and RTFx of such a file by the leaderboard's rule: words split or joined at a blank are no error."""
    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    if not rows:
        raise ValueError(f"{path}: has no scored utterance")
    references = [tuple(normalise_for_scoring(row["text"], language).split()) for row in rows]
    hypotheses = [tuple(normalise_for_scoring(row["pred_text"], language).split()) for row in rows]
    errors = kaldialign.batch_error_rate(references, hypotheses, merge_compounds=True)
    return SetResult(
        Path(path).stem.partition("_DATASET_")[2],
        len(rows),
        0,
        sum(row["duration"] for row in rows),
        sum(row["time"] for row in rows),
        wer=errors["err_rate"],
        normaliser=normaliser_name([language], "auto"),
    )
