"""Drafts of responses: where each one is to be read next, and how many of its tokens a forward should check.

Plain numpy on the host: a round of the speculative rollout costs about as much as a plain step, so this must not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_WIDTH = 64  # draft tokens of a row checked in one forward; each needs logits over the whole vocabulary
PINNED_BY = 3  # accepted tokens in a row after which the alignment is no longer in question
# What is believed about a draft before anything of it was checked: this share of its tokens is right, held as firmly
# as if this many had been checked. Older checks count less by FADING with each newer one.
PRIOR_RATE, PRIOR_TESTS, FADING = 0.9, 1.0, 0.8


class Drafts:
    """The drafts of B rows, all of them walked through side by side."""

    def __init__(self, drafts: Sequence[Sequence[int] | None], eos_id: int, forward_cost: float) -> None:
        """drafts: ids without EOS, None where a row has no draft; forward_cost: see `width`."""
        rows = [[*draft, eos_id] if draft is not None else [] for draft in drafts]
        self.forward_cost = forward_cost
        self.length_B = np.array([len(row) for row in rows], dtype=np.int64)
        longest = max(1, int(self.length_B.max(initial=0)))
        self.tokens_BM = np.full((len(rows), longest + MAX_WIDTH), -1, dtype=np.int64)
        for target_M, row in zip(self.tokens_BM, rows, strict=True):
            target_M[: len(row)] = row
        self.next_B = np.zeros(len(rows), dtype=np.int64)  # first token of the draft that was not used yet
        self._place_M = np.arange(longest + 1, dtype=np.int64)
        # Edit distance between what the row has written and the first 0, 1, ... tokens of its draft.
        self._distance_BM = np.tile(self._place_M, (len(rows), 1))
        self._right_B = np.full(len(rows), PRIOR_RATE * PRIOR_TESTS)
        self._tested_B = np.full(len(rows), PRIOR_TESTS)

    def width(self, rows: np.ndarray, room_R: np.ndarray, num_held: int) -> int:
        """How many draft tokens the next forward should check in each row: the number that writes tokens fastest.

        A forward costs as much as `forward_cost` tokens, and one more for each token of each of the `num_held` rows it
        runs. A row's tokens are expected to be right at the rate they were so far, so a row whose draft is useless
        asks for none. `room_R` is the number of tokens that a row may still draft.
        """
        left_R = np.minimum(self.length_B[rows] - self.next_B[rows], room_R)
        longest = min(int(left_R.max(initial=0)), MAX_WIDTH)
        if longest <= 0:
            return 0
        count_W = np.arange(1, longest + 1)
        rate_R = np.clip(self._right_B[rows] / self._tested_B[rows], 0.01, 0.99)
        reached_RW = rate_R[:, None] ** count_W * (count_W <= left_R[:, None])
        written_W = len(rows) + np.concatenate([[0.0], reached_RW.sum(0).cumsum()])
        cost_W = self.forward_cost + num_held * np.arange(1, longest + 2)
        return int((written_W / cost_W).argmax())

    def propose(self, rows: np.ndarray, width: int, room_R: np.ndarray) -> np.ndarray:
        """The next `width` draft tokens of each row: (R, width), -1 where there are none."""
        columns_W = np.arange(width)
        ids_RW = self.tokens_BM[rows[:, None], self.next_B[rows, None] + columns_W]
        return np.where(columns_W < room_R[:, None], ids_RW, -1)

    def advance(self, rows: np.ndarray, accepted_R: np.ndarray, written_RW: np.ndarray) -> None:
        """Notes what the rows wrote: `accepted_R` tokens of the draft, then one of their own at that column.

        written_RW: (R, at least accepted + 1). The draft goes on where it fits best to all that was written.
        """
        place_R = self.next_B[rows] + accepted_R
        own_R = written_RW[np.arange(len(rows)), accepted_R]
        guess_R = self.tokens_BM[rows, place_R]
        self._note_rate(rows, accepted_R, guess_R >= 0, guess_R == own_R)
        distance_RM = self._distance_BM[rows]
        pinned_R = accepted_R >= PINNED_BY
        distance_RM[pinned_R] = np.abs(self._place_M - place_R[pinned_R, None])
        begin_R = np.where(pinned_R, accepted_R, 0)
        tokens_RM = self.tokens_BM[rows, : len(self._place_M) - 1]
        for offset in range(int((accepted_R - begin_R).max(initial=0)) + 1):
            column_R = begin_R + offset
            token_R1 = written_RW[np.arange(len(rows)), np.minimum(column_R, accepted_R)][:, None]
            longer_RM = self._one_longer(distance_RM, tokens_RM == token_R1)
            distance_RM = np.where((column_R <= accepted_R)[:, None], longer_RM, distance_RM)
        self._distance_BM[rows] = distance_RM
        self.next_B[rows] = self._best_place(rows, distance_RM, tokens_RM == own_R[:, None], place_R + 1)

    def _note_rate(self, rows: np.ndarray, accepted_R: np.ndarray, tested_R: np.ndarray, right_R: np.ndarray) -> None:
        """Counts checked tokens: the accepted ones, and the one that stood where the row wrote its own.

        The latter is known also where no token was drafted, so a draft that has become useful again is noticed.
        """
        faded_R = FADING ** (accepted_R + tested_R)
        # FADING's geometric series: what n equal checks in a row add.
        series_R = (1 - FADING**accepted_R) / (1 - FADING) * np.where(tested_R, FADING, 1.0)
        self._right_B[rows] = self._right_B[rows] * faded_R + series_R + (tested_R & right_R)
        self._tested_B[rows] = self._tested_B[rows] * faded_R + series_R + tested_R

    def _one_longer(self, distance_RM: np.ndarray, match_RM: np.ndarray) -> np.ndarray:
        """The distances after one more written token, which equals the draft's tokens at `match_RM`."""
        reached_RM = distance_RM + 1
        np.minimum(reached_RM[:, 1:], distance_RM[:, :-1] + ~match_RM, out=reached_RM[:, 1:])
        # A skipped draft token costs 1 more: the least over all places before, each with its way to go.
        return np.minimum.accumulate(reached_RM - self._place_M, axis=1) + self._place_M

    def _best_place(
        self, rows: np.ndarray, distance_RM: np.ndarray, match_RM: np.ndarray, diagonal_R: np.ndarray
    ) -> np.ndarray:
        """Where to read on: at the least distance, which may be one higher just behind the token last written.

        Between equals: behind that token; else one token in place of another; else the first.
        """
        cost_RM = 4 * distance_RM
        cost_RM[:, 1:] -= 6 * match_RM
        cost_RM -= self._place_M == diagonal_R[:, None]
        cost_RM[self._place_M > self.length_B[rows, None]] = np.iinfo(np.int64).max
        return cost_RM.argmin(1)
