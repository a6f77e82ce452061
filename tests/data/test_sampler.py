"""The sampler: every utterance once an epoch, and an exact resume from any position."""

from __future__ import annotations

import json

import numpy as np
import pytest

from data.sampler import EpochSampler

NUM = 23


def drawn(sampler: EpochSampler, total: int, batch_size: int) -> list[int]:
    indices: list[int] = []
    while len(indices) < total:
        indices += sampler.next_batch(min(batch_size, total - len(indices)))
    return indices


def test_each_epoch_holds_every_utterance_once() -> None:
    sequence = drawn(EpochSampler(NUM, seed=1), 4 * NUM, batch_size=7)
    epochs = [tuple(sequence[i : i + NUM]) for i in range(0, len(sequence), NUM)]
    assert all(sorted(epoch) == list(range(NUM)) for epoch in epochs)
    assert len(set(epochs)) == 4, "epochs differ in order"
    assert epochs[0] != tuple(range(NUM))


@pytest.mark.parametrize("batch_size", [1, 5, NUM, 3 * NUM + 2])
def test_batch_size_does_not_change_the_sequence(batch_size: int) -> None:
    expected = drawn(EpochSampler(NUM, seed=1), 5 * NUM, batch_size=4)
    sampler = EpochSampler(NUM, seed=1)
    assert drawn(sampler, 5 * NUM, batch_size) == expected
    assert (sampler.position, sampler.epoch) == (5 * NUM, 5)


@pytest.mark.parametrize("sorted_epochs", [0, 1])
def test_resume_at_any_position_with_another_batch_size(sorted_epochs: int) -> None:
    def new() -> EpochSampler:
        return EpochSampler(NUM, seed=9, sort_keys=np.arange(NUM)[::-1].tolist(), sorted_epochs=sorted_epochs)

    expected = drawn(new(), 4 * NUM, batch_size=6)
    for position in range(3 * NUM):
        first = new()
        before = drawn(first, position, batch_size=6)
        state = json.loads(json.dumps(first.state_dict()))  # a checkpoint keeps it as JSON
        second = new()
        second.next_batch(11)  # what it did before is forgotten
        second.load_state_dict(state)
        assert before + drawn(second, 4 * NUM - position, batch_size=1 + position % 9) == expected


def test_seeds_give_different_orders() -> None:
    orders = {tuple(EpochSampler(NUM, seed).next_batch(NUM)) for seed in range(20)}
    assert len(orders) == 20


def test_order_is_a_fixed_function_of_seed_and_epoch() -> None:
    # Written down, so that an upgrade of numpy that changed the order would not go unnoticed in resumed runs.
    assert drawn(EpochSampler(6, seed=3), 12, batch_size=12) == [0, 1, 2, 5, 4, 3, 5, 3, 0, 1, 2, 4]


def test_sorted_epochs_come_first_and_shuffled_ones_after() -> None:
    durations = [3.0, 1.0, 2.0, 1.0]
    sampler = EpochSampler(4, seed=0, sort_keys=durations, sorted_epochs=2)
    assert sampler.next_batch(8) == [1, 3, 2, 0] * 2
    plain = EpochSampler(4, seed=0)
    plain.next_batch(8)
    assert sampler.next_batch(20) == plain.next_batch(20)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (EpochSampler(NUM + 1, seed=1), f"has num_utterances {NUM + 1}, but this run has {NUM}"),
        (EpochSampler(NUM, seed=2), "has seed 2, but this run has 1"),
        (EpochSampler(NUM, seed=1, sort_keys=range(NUM), sorted_epochs=1), "has sorted_epochs 1, but this run has 0"),
    ],
)
def test_state_of_another_run_is_refused(other: EpochSampler, message: str) -> None:
    sampler = EpochSampler(NUM, seed=1)
    sampler.next_batch(5)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(other.state_dict())
    assert sampler.position == 5, "nothing is changed by a refused state"


@pytest.mark.parametrize("position", [-1, None, 2.5])
def test_bad_position_is_refused(position: object) -> None:
    sampler = EpochSampler(NUM, seed=1)
    with pytest.raises(ValueError, match="is no number of utterances"):
        sampler.load_state_dict({**sampler.state_dict(), "position": position})


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="at least one utterance"):
        EpochSampler(0, seed=1)
    with pytest.raises(ValueError, match="seed must be 0 or more"):
        EpochSampler(3, seed=-1)
    with pytest.raises(ValueError, match="needs sort_keys"):
        EpochSampler(3, seed=1, sorted_epochs=1)
    with pytest.raises(ValueError, match="2 sort_keys for 3 utterances"):
        EpochSampler(3, seed=1, sort_keys=[1.0, 2.0], sorted_epochs=1)
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        EpochSampler(3, seed=1).next_batch(0)


def test_a_look_ahead_changes_nothing() -> None:
    sampler, other = EpochSampler(10, seed=3), EpochSampler(10, seed=3)
    for size in (4, 4, 7, 3):  # across the end of an epoch too
        ahead = sampler.peek_batch(size)
        assert sampler.state_dict() == other.state_dict()
        assert sampler.next_batch(size) == ahead == other.next_batch(size)


@pytest.mark.parametrize("piece", [1, 7, 1 << 16])
def test_equal_draws_keep_their_order(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """As a stable sort has them, wherever they meet."""
    draws = np.random.default_rng(3).integers(0, 50, size=1_000).astype(np.uint64) << np.uint64(8)

    class Draws:
        def __init__(self, sequence: np.random.SeedSequence) -> None:
            self.left = draws

        def random_raw(self, num: int) -> np.ndarray:
            drawn, self.left = self.left[:num], self.left[num:]
            return drawn

    monkeypatch.setattr(np.random, "Philox", Draws)
    monkeypatch.setattr("data.sampler._PIECE", piece)
    assert EpochSampler(1_000, seed=3).next_batch(1_000) == np.argsort(draws, kind="stable").tolist()


def test_a_look_ahead_into_the_next_epoch_sorts_no_epoch_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, drawn_epochs = EpochSampler(10, seed=3), []
    philox = np.random.Philox

    def counted(sequence: np.random.SeedSequence) -> np.random.Philox:
        drawn_epochs.append(sequence.entropy)
        return philox(sequence)

    monkeypatch.setattr(np.random, "Philox", counted)
    for _ in range(12):
        sampler.peek_batch(4)
        sampler.next_batch(4)
    assert drawn_epochs == [[3, epoch] for epoch in range(5)], "48 utterances of ten an epoch"


@pytest.mark.parametrize("num", [1, 2, 3, 1_000, 300_000])
def test_the_order_is_that_of_sorted_draws(num: int) -> None:
    draws = np.random.Philox(np.random.SeedSequence([8, 0])).random_raw(num)
    assert EpochSampler(num, seed=8).next_batch(num) == np.argsort(draws, kind="stable").tolist()
