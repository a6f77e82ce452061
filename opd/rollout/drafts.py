"""Drafts of responses: where each one is to be read next, and how many of its tokens a forward should check.

Plain numpy on the host: a round of the speculative rollout costs about as much as a plain step, so this must not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MAX_WIDTH = 64  # draft tokens of a row checked in one forward; each needs logits over the whole vocabulary
# What is believed about a draft before anything of it was checked: this share of its tokens is right, held as firmly
# as if this many had been checked. Older checks count less by FADING with each newer one.
PRIOR_RATE, PRIOR_TESTS, FADING = 0.9, 1.0, 0.8


class Drafts:
    """The drafts of R rows, all of them walked through side by side."""

    def __init__(self, drafts: Sequence[Sequence[int] | None], eos_id: int, forward_cost: float) -> None:
        """drafts: ids without EOS, None where a row has no draft; forward_cost: see `width`."""
        rows = [[] if draft is None else [*draft, eos_id] for draft in drafts]
        rows = [row[: row.index(eos_id) + 1] if row else row for row in rows]
        self.forward_cost = forward_cost
        self.length_R = np.array([len(row) for row in rows])
        longest = int(self.length_R.max(initial=0))
        self.any = longest > 0
        self.tokens_RM = np.full((len(rows), longest + MAX_WIDTH + 1), -1)
        for target_M, row in zip(self.tokens_RM, rows, strict=True):
            target_M[: len(row)] = row
        self.next_R = np.zeros(len(rows), dtype=np.int64)  # first token of the draft that was not used yet
        self._row_R = np.arange(len(rows))
        self._columns_M = np.arange(longest + MAX_WIDTH + 1)
        self._place_M = self._columns_M[: longest + 1]
        # Edit distance between what the row has written and the first 0, 1, ... tokens of its draft.
        self._distance_RM = np.tile(self._place_M, (len(rows), 1))
        self._beyond_RM = np.where(self._place_M > self.length_R[:, None], 1 << 40, 0)
        self._right_R = np.full(len(rows), PRIOR_RATE * PRIOR_TESTS)
        self._tested_R = np.full(len(rows), PRIOR_TESTS)

    def keep(self, rows: np.ndarray) -> None:
        """Goes on with these rows alone."""
        for name in ("length_R", "tokens_RM", "next_R", "_distance_RM", "_beyond_RM", "_right_R", "_tested_R"):
            setattr(self, name, getattr(self, name)[rows])
        self._row_R = np.arange(len(rows))
        self.any = bool(self.length_R.any())

    def width(self, room_R: np.ndarray) -> int:
        """How many draft tokens the next forward should check in each row: the number that writes tokens fastest.

        A forward costs as much as `forward_cost` tokens, and one more for each token of each row. A row's tokens are
        expected to be right at the rate they were so far, so a row whose draft is useless asks for none. `room_R` is
        the number of tokens that a row may draft; below 0 where it writes nothing any more.
        """
        if not self.any:
            return 0
        left_R = np.minimum(self.length_R - self.next_R, room_R)
        longest = min(int(left_R.max()), MAX_WIDTH)
        if longest <= 0:
            return 0
        count_W = self._columns_M[1 : longest + 1]
        rate_R = np.clip(self._right_R / self._tested_R, 0.01, 0.99)
        reached_RW = rate_R[:, None] ** count_W * (count_W <= left_R[:, None])
        written_W = np.empty(longest + 1)
        written_W[0] = np.count_nonzero(room_R >= 0)
        written_W[1:] = reached_RW.sum(0)
        cost_W = self.forward_cost + len(rate_R) * self._columns_M[1 : longest + 2]
        return int((written_W.cumsum() / cost_W).argmax())

    def propose(self, width: int, room_R: np.ndarray) -> np.ndarray:
        """The next `width` draft tokens of each row, then one -1: (R, width + 1), -1 where there are none."""
        if width == 0:
            return np.full((len(self.next_R), 1), -1)
        columns_W = self._columns_M[: width + 1]
        ids_RW = self.tokens_RM[self._row_R[:, None], self.next_R[:, None] + columns_W]
        return np.where(columns_W < np.minimum(room_R, width)[:, None], ids_RW, -1)

    def advance(self, accepted_R: np.ndarray, own_R: np.ndarray) -> None:
        """Notes what the rows wrote: `accepted_R` tokens of the draft, then one of their own.

        The draft goes on where it fits best to what was written. An accepted token settles how it is aligned so far.
        """
        if not self.any:
            return
        place_R = self.next_R + accepted_R
        guess_R = self.tokens_RM[self._row_R, place_R]
        self._note_rate(accepted_R, guess_R >= 0, guess_R == own_R)
        settled_RM = np.abs(self._place_M - place_R[:, None])
        before_RM = np.where((accepted_R > 0)[:, None], settled_RM, self._distance_RM)
        match_RM = self.tokens_RM[:, : len(self._place_M) - 1] == own_R[:, None]
        after_RM = before_RM + 1
        np.minimum(after_RM[:, 1:], before_RM[:, :-1] + ~match_RM, out=after_RM[:, 1:])
        # A skipped draft token costs 1 more: the least over all places before, each with its way to go.
        after_RM -= self._place_M
        np.minimum.accumulate(after_RM, axis=1, out=after_RM)
        after_RM += self._place_M
        self._distance_RM = after_RM
        # Read on at the least distance, which may be one higher just behind the token last written. Between equals:
        # behind that token; else one token in place of another; else the first.
        cost_RM = 4 * after_RM + self._beyond_RM
        cost_RM[:, 1:] -= 6 * match_RM
        diagonal_R = np.minimum(place_R + 1, len(self._place_M) - 1)
        cost_RM[self._row_R, diagonal_R] -= 1
        self.next_R = cost_RM.argmin(1)

    def _note_rate(self, accepted_R: np.ndarray, tested_R: np.ndarray, right_R: np.ndarray) -> None:
        """Counts checked tokens: the accepted ones, and the one that stood where the row wrote its own.

        The latter is known also where no token was drafted, so a draft that has become useful again is noticed.
        """
        faded_R = FADING**accepted_R
        # FADING's geometric series: what n equal checks in a row add.
        series_R = (1 - faded_R) / (1 - FADING)
        fading_R = np.where(tested_R, FADING, 1.0)
        self._right_R = (self._right_R * faded_R + series_R) * fading_R + (tested_R & right_R)
        self._tested_R = (self._tested_R * faded_R + series_R) * fading_R + tested_R
