"""Repetition loops in a response, which a student falls into and which should not be trained on."""

from __future__ import annotations


def find_loop(ids: list[int], max_repeats: int, max_ngram: int = 32) -> int | None:
    """Where the second occurrence begins of an n-gram that stands more than `max_repeats` times in a row.

    The earliest such position over n-grams of 1 to `max_ngram` ids, so that ids before it hold the first occurrence;
    None where there is no loop. A number read out digit by digit repeats too: `max_repeats` is what is still speech.
    """
    longest = min(max_ngram, len(ids) // (max_repeats + 1))  # of which the ids can hold enough copies
    starts = [_second_occurrence(ids, n, max_repeats) for n in range(1, longest + 1)]
    return min((start for start in starts if start is not None), default=None)


def _second_occurrence(ids: list[int], n: int, max_repeats: int) -> int | None:
    """`find_loop` for n-grams of one length: L ids in a row that equal the id n before are L // n further copies."""
    run = 0
    for position in range(n, len(ids)):
        run = run + 1 if ids[position] == ids[position - n] else 0
        if 1 + run // n > max_repeats:
            return position - run + 1
    return None
