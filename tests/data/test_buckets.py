"""Who computes what beside whom: nothing of a batch is lost, work is even, padding is small."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.buckets import LengthSpread, rows_by_budget, spread_by_length, utterance_seconds
from data.manifest import read_manifest
from opd.types import Utterance


def batch_of(seconds: list[float]) -> list[Utterance]:
    return [Utterance(str(i), "a.wav", extra={"duration": length}) for i, length in enumerate(seconds)]


def test_ranks_get_equal_work_and_neighbours_of_equal_length() -> None:
    seconds = [3.0, 30.0, 4.0, 5.0, 29.0, 10.0, 11.0, 2.0]
    batch = batch_of(seconds)
    spread = spread_by_length(batch, 2)
    assert sorted(u.id for u in spread) == sorted(u.id for u in batch)
    shards = [[u.extra["duration"] for u in spread[:4]], [u.extra["duration"] for u in spread[4:]]]
    assert shards == [[30.0, 10.0, 5.0, 2.0], [29.0, 11.0, 4.0, 3.0]]
    assert spread_by_length(batch_of([1.0, 2.0, 3.0]), 3)[0].extra["duration"] == 3.0


def test_length_is_known_from_times_a_field_or_the_file(speech: dict[str, Path], tmp_path: Path) -> None:
    assert utterance_seconds(Utterance("a", "none.wav", begin_time=1.5, end_time=4.0)) == 2.5
    assert utterance_seconds(batch_of([7.5])[0]) == 7.5
    assert utterance_seconds(Utterance("a", str(tmp_path / "none.wav"))) == 0.0, "the collator will name it"
    for utterance in read_manifest(speech["train"])[:3]:
        bare = Utterance(utterance.id, utterance.audio)
        assert 0.3 < utterance_seconds(bare) < 30.0


@pytest.mark.parametrize("budget", [1, 20, 60, 1000])
def test_micro_batches_keep_to_the_budget(budget: int) -> None:
    lengths = [5, 20, 7, 7, 19, 3, 12]
    packed = rows_by_budget(lengths, budget)
    assert sorted(row for rows in packed for row in rows) == list(range(len(lengths)))
    for rows in packed:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= budget
    assert packed[0][0] == 1, "the longest comes first: what does not fit into memory shows at once"
    if budget == 60:
        assert packed == [[1, 4, 6], [2, 3, 0, 5]], "3 x 20 positions, then 4 x 7"


def test_a_batch_that_was_looked_at_is_not_measured_again(speech: dict[str, Path], tmp_path: Path) -> None:
    utterances = [Utterance(u.id, u.audio) for u in read_manifest(speech["eval"])[:6]]
    expected = spread_by_length(utterances, 2)
    spread = LengthSpread(2)
    assert spread(utterances[:3]) == spread_by_length(utterances[:3], 2)
    assert spread(utterances) == expected
    gone = [Utterance(u.id, str(tmp_path / "gone.wav")) for u in utterances]  # measured again, all would be equal
    assert [u.id for u in spread(gone)] == [u.id for u in expected]
    assert spread(utterances[:3]) == spread_by_length(utterances[:3], 2)
