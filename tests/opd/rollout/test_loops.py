"""The guard against repetition loops."""

from __future__ import annotations

import pytest

from opd.rollout.loops import find_loop


@pytest.mark.parametrize(
    ("ids", "max_repeats", "expected"),
    [
        ([], 3, None),
        ([1, 2, 3, 4, 5], 1, None),
        ([7, 1, 1, 1], 3, None),  # "one one one" is a number read out
        ([7, 1, 1, 1, 1], 3, 2),
        ([7, 1, 1, 1, 1, 8, 9], 3, 2),  # also where the loop ends again
        ([1, 1, 1, 1], 3, 1),
        ([5, 1, 2, 1, 2, 1, 2, 1], 3, None),  # the fourth copy is not complete
        ([5, 1, 2, 1, 2, 1, 2, 1, 2], 3, 3),
        ([1, 1, 2, 1, 1, 2, 1, 1, 2], 2, 3),  # repeats inside the n-gram
        ([4, 4, 4, 9, 6, 6, 6, 6, 6], 3, 5),  # the first run is short enough
        ([1, 2, 3, 1, 2, 3, 7, 7, 7], 2, 7),
        ([3, 3], 1, 1),
        ([1] * 10, 2, 1),  # a loop of 2-grams and 3-grams too, which begin later
    ],
)
def test_find_loop(ids: list[int], max_repeats: int, expected: int | None) -> None:
    assert find_loop(ids, max_repeats) == expected


def test_what_is_kept_is_the_first_occurrence() -> None:
    phrase = list(range(20, 30))
    ids = [1, 2, 3] + phrase * 9 + [99]
    start = find_loop(ids, 8)
    assert start is not None
    assert ids[:start] == [1, 2, 3] + phrase
    assert find_loop(ids, 9) is None


def test_longer_n_grams_than_the_limit_are_not_looked_for() -> None:
    ids = list(range(6)) * 4
    assert find_loop(ids, 2, max_ngram=6) == 6
    assert find_loop(ids, 2, max_ngram=5) is None
