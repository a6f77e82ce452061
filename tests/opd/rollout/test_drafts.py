"""Where a draft is read on, and how much of it is worth checking."""

from __future__ import annotations

import random

import numpy as np
import pytest
from kaldialign import edit_distance

from opd.rollout.drafts import MAX_WIDTH, Drafts

EOS = 99
DRAFT = [10, 11, 12, 13, 14, 15, 16, 17]


def read_on(drafts: Drafts, row: int = 0) -> list[int]:
    """What the draft says from here on, its EOS included."""
    ids = drafts.propose(MAX_WIDTH, np.full(len(drafts.next_R), MAX_WIDTH))[row]
    return ids[ids >= 0].tolist()


def write(drafts: Drafts, accepted: int, own: int) -> None:
    """One round of a single row: `accepted` tokens of its draft, then its own."""
    drafts.advance(np.array([accepted]), np.array([own]))


def width(drafts: Drafts, room: int = 50) -> int:
    return drafts.width(np.array([room]))


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([(2, 50)], [13, 14, 15, 16, 17, EOS]),  # one word for another
        ([(2, 13)], [14, 15, 16, 17, EOS]),  # the draft has a word too many
        ([(2, 14)], [15, 16, 17, EOS]),  # and two
        ([(2, 50), (0, 12)], [13, 14, 15, 16, 17, EOS]),  # the draft lacks a word: known one token later
        ([(2, 50), (0, 51), (0, 14)], [15, 16, 17, EOS]),  # two words for others
        ([(0, 60), (0, 61), (0, 62), (0, 10)], [11, 12, 13, 14, 15, 16, 17, EOS]),  # a start that the draft lacks
        ([(5, 17)], [EOS]),
        ([(8, 70)], []),  # the draft is over, the response is not
    ],
)
def test_a_draft_goes_on_behind_what_was_written(rounds: list[tuple[int, int]], expected: list[int]) -> None:
    drafts = Drafts([DRAFT], EOS, 100.0)
    for accepted, own in rounds:
        write(drafts, accepted, own)
    assert read_on(drafts) == expected


def test_distances_are_edit_distances() -> None:
    """Between what was written up to now and each beginning of the draft, where all before was accepted at once."""
    rng = random.Random(1)
    for _ in range(30):
        tokens = [rng.randrange(4) for _ in range(rng.randrange(1, 9))]
        drafts = Drafts([tokens], EOS, 100.0)
        accepted = rng.randrange(len(tokens))
        ids = [*tokens[:accepted], rng.randrange(4)]
        write(drafts, accepted, ids[-1])
        for _ in range(8):
            expected = [edit_distance(ids, [*tokens, EOS][:length])["total"] for length in range(len(tokens) + 2)]
            assert drafts._distance_RM[0].tolist() == expected
            ids.append(rng.randrange(4))
            write(drafts, 0, ids[-1])


def test_rows_are_walked_through_apart() -> None:
    drafts = Drafts([DRAFT, None, list(reversed(DRAFT))], EOS, 100.0)
    drafts.advance(np.array([3, 0, 1]), np.array([40, 50, 50]))
    assert read_on(drafts, 0) == [*DRAFT[4:], EOS]
    assert read_on(drafts, 1) == []
    assert read_on(drafts, 2) == [15, 14, 13, 12, 11, 10, EOS]
    drafts.keep(np.array([1, 2]))
    assert read_on(drafts, 0) == []
    assert read_on(drafts, 1) == [15, 14, 13, 12, 11, 10, EOS]
    drafts.advance(np.array([0, 2]), np.array([50, 12]))
    assert read_on(drafts, 1) == [11, 10, EOS]
    drafts.keep(np.array([0]))
    assert not drafts.any
    assert width(drafts) == 0


def test_a_draft_ends_at_its_first_eos() -> None:
    assert read_on(Drafts([[1, 2, EOS, 3], [4, 5, 6, 7, 8]], EOS, 100.0)) == [1, 2, EOS]


def test_more_is_checked_where_a_forward_costs_more_and_where_drafts_are_right() -> None:
    long = list(range(100, 140))
    widths = [width(Drafts([long], EOS, cost)) for cost in (1.0, 10.0, 100.0, 1e9)]
    assert widths == sorted(widths)
    assert widths[0] < 4
    assert widths[-1] == 41, "all of it and EOS"
    drafts = Drafts([long], EOS, 30.0)
    before = width(drafts)
    write(drafts, 8, 108)
    assert width(drafts) > before
    assert width(Drafts([long], EOS, 1e9), room=7) == 7
    assert width(Drafts([[*long, *long]], EOS, 1e9), room=100) == MAX_WIDTH
    assert width(Drafts([None], EOS, 1e9)) == 0


def test_a_useless_draft_is_dropped_and_a_good_one_taken_up_again() -> None:
    drafts = Drafts([list(range(100, 140))], EOS, 6.0)
    checked = []
    for own in range(8):  # none of them is in the draft
        checked.append(width(drafts))
        write(drafts, 0, own)
    assert checked[0] > 3
    assert checked[-3:] == [0, 0, 0]
    for own in range(108, 116):  # nothing is drafted, yet what is written is what stands there
        write(drafts, 0, own)
    assert width(drafts) > 3
