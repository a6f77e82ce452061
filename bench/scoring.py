"""Seconds that scoring a thousand transcripts takes, by language, against jiwer alone on text that is normalised already.

    python -m bench.scoring [--json rows.json]

Ends with status 1 where a language takes more than LIMIT_S: an evaluation must not wait for its scores.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import jiwer

from bench.command import Parser, command
from bench.tables import Row, print_rows, write_json
from opd.evaluate import score_transcripts

LIMIT_S = 2.0
NUM, RUNS = 1000, 5
TEXT = "the quick brown fox doesn't jump 21 times over Mr. Smith's lazy dog and three hundred dollars"


def median_s(call: Callable[[], object]) -> float:
    """Median seconds of RUNS calls, after one that is not counted."""
    seconds = []
    for _ in range(RUNS + 1):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def measure() -> list[Row]:
    draw = random.Random(0)
    references = [" ".join(draw.choices(TEXT.split(), k=20)) for _ in range(NUM)]
    hypotheses = [text.replace("fox", "box") for text in references]
    alone = median_s(
        lambda: (jiwer.process_words(references, hypotheses), jiwer.process_characters(references, hypotheses))
    )
    rows = []
    for language in ("en", "de", "zh"):
        ours = median_s(lambda language=language: score_transcripts(references, hypotheses, language))
        rows.append(Row(f"{NUM:,} transcripts of 20 words, {language}", ours, "jiwer alone", alone, alone / ours))
    return rows


@command
def main(argv: list[str]) -> int:
    arguments = Parser("scoring", __doc__).parse_args(argv)
    rows = measure()
    print_rows(rows)
    if arguments.json:
        write_json(rows, arguments.json)
    slow = [row.case for row in rows if row.ours_s is not None and row.ours_s > LIMIT_S]
    for case in slow:
        print(f"more than {LIMIT_S:g} s: {case}")
    return 1 if slow else 0


if __name__ == "__main__":
    raise SystemExit(main(None))
