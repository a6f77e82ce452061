"""Batches by length: which utterances of a global batch go to which rank, and which of a rank are computed together.

The global batch stays what the sampler drew, and so does its gradient; only who computes what beside whom changes.
"""

from __future__ import annotations

from collections.abc import Sequence

from data.audio import BadAudio
from data.timed import seconds_within
from opd.types import Batch, Utterance


def utterance_seconds(utterance: Utterance, timeout_s: float = 120.0) -> float:
    """Seconds of audio, by the manifest's times or `duration`, else by the file's header; 0 where it cannot be read.

    Raises ValueError where the header is not read within timeout_s seconds.
    """
    if utterance.begin_time >= 0 and utterance.end_time >= 0:
        return utterance.end_time - utterance.begin_time
    duration = utterance.extra.get("duration")
    if isinstance(duration, int | float) and not isinstance(duration, bool):
        return float(duration)
    try:
        return seconds_within(timeout_s, utterance)
    except BadAudio:
        return 0.0  # the collator reads it again, and says what is wrong with it


def spread_by_length(batch: Batch, num_ranks: int, timeout_s: float = 120.0) -> Batch:
    """The batch in an order whose equal contiguous shards hold about as much audio each, every shard from long to short.

    Ranks wait for each other in every step, so a rank with the long utterances holds up all. Neighbours of a shard are of
    similar length, so a micro-batch of them has little padding.
    """
    seconds = [utterance_seconds(utterance, timeout_s) for utterance in batch]
    longest_first = sorted(range(len(batch)), key=lambda index: -seconds[index])
    shards: list[list[int]] = [[] for _ in range(num_ranks)]
    for turn, index in enumerate(longest_first):  # there and back again: 0 1 2 2 1 0 0 1 2
        round_number, place = divmod(turn, num_ranks)
        shards[place if round_number % 2 == 0 else num_ranks - 1 - place].append(index)
    return [batch[index] for shard in shards for index in shard]


class LengthSpread:
    """`spread_by_length` for a run, which looks at each batch twice: to read its audio ahead, and to train on it.

    The lengths of the batch that was looked at last are kept, so that no file's header is read twice.
    """

    def __init__(self, num_ranks: int, timeout_s: float = 120.0) -> None:
        """timeout_s: longest wait for the header of a file."""
        self.num_ranks, self.timeout_s = num_ranks, timeout_s
        self._last: tuple[list[str], Batch] = ([], [])  # ids as they were given, and the batch they became

    def __call__(self, batch: Batch) -> Batch:
        ids = [utterance.id for utterance in batch]
        if ids != self._last[0]:
            self._last = (ids, spread_by_length(batch, self.num_ranks, self.timeout_s))
        return self._last[1]


def rows_by_budget(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows packed into micro-batches of at most `budget` padded positions (rows times the longest), longest rows first.

    A row that is longer than the budget is a micro-batch of its own. Rows keep their order where lengths are equal.
    """
    packed: list[list[int]] = []
    longest = 0
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if not packed or (len(packed[-1]) + 1) * longest > budget:
            packed.append([])
            longest = lengths[row]
        packed[-1].append(row)
    return packed
