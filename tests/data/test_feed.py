"""Feeds: what is handed out depends on seed and position alone, and goes on exactly, whatever the batches' size."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import pytest

from data.feed import Feed, ManifestFeed, MixedFeed, source_seed
from data.sampler import EpochSampler
from opd.types import Utterance

SIZES = {"small": 7, "large": 40, "medium": 13}
WEIGHTS = {"small": 1, "large": 2.5, "medium": 0.5}


def manifest_feed(name: str, num: int, seed: int) -> ManifestFeed:
    utterances = [Utterance(id=f"{name}{i}", audio="a.wav") for i in range(num)]
    return ManifestFeed(utterances, EpochSampler(num, source_seed(seed, name)))


def mixed(seed: int = 3, weights: dict[str, float] | None = None, names: tuple[str, ...] = tuple(SIZES)) -> MixedFeed:
    feeds = {name: manifest_feed(name, SIZES[name], seed) for name in names}
    return MixedFeed(feeds, weights or {name: WEIGHTS[name] for name in names}, seed)


def ids(feed: Feed, total: int, batch_size: int) -> list[str]:
    found: list[str] = []
    while len(found) < total:
        found += [u.id for u in feed.next_batch(min(batch_size, total - len(found)))]
    return found


def test_each_source_runs_through_its_own_epochs_in_proportion_to_its_weight() -> None:
    sequence = ids(mixed(), 8_000, batch_size=32)
    by_source = {name: [i for i in sequence if i.startswith(f"{name}/")] for name in SIZES}
    for name, own in by_source.items():
        assert len(own) / 8_000 == pytest.approx(WEIGHTS[name] / 4, abs=0.02)
        num = SIZES[name]
        epochs = [own[i : i + num] for i in range(0, len(own) - num + 1, num)]
        assert all(sorted(epoch) == sorted(f"{name}/{name}{i}" for i in range(num)) for epoch in epochs)
        assert epochs[0] != epochs[1]
    assert len({Counter(i.split("/")[0] for i in sequence[k : k + 32])["small"] for k in range(0, 3_200, 32)}) > 3


@pytest.mark.parametrize("batch_size", [1, 9, 500])
def test_batch_size_and_order_of_names_do_not_change_the_sequence(batch_size: int) -> None:
    expected = ids(mixed(), 9_000, batch_size=32)  # beyond two blocks of draws
    assert ids(mixed(names=("medium", "small", "large")), 9_000, batch_size) == expected
    assert ids(mixed(seed=4), 100, 10) != expected[:100]


def test_resume_at_any_position_with_another_batch_size() -> None:
    expected = ids(mixed(), 400, batch_size=8)
    for position in range(0, 300, 7):
        first = mixed()
        before = ids(first, position, batch_size=8) if position else []
        state = json.loads(json.dumps(first.state_dict()))
        second = mixed()
        second.next_batch(11)  # what it did before is forgotten
        second.load_state_dict(state)
        assert second.shares() == first.shares()
        assert before + ids(second, 400 - position, batch_size=12) == expected


@pytest.mark.parametrize("make", [mixed, lambda: manifest_feed("large", 40, 3)])
def test_a_look_ahead_changes_nothing(make) -> None:  # type: ignore[no-untyped-def]
    feed, other = make(), make()
    for size in (4, 40, 7, 31):
        ahead = feed.peek_batch(size)
        assert feed.state_dict() == other.state_dict()
        assert feed.next_batch(size) == ahead == other.next_batch(size)


def test_shares_are_of_what_was_handed_out() -> None:
    feed = mixed()
    assert feed.shares() == {"small": 0, "large": 0, "medium": 0}
    counts = Counter(i.split("/")[0] for i in ids(feed, 50, batch_size=8))
    assert feed.shares() == {name: counts[name] / 50 for name in SIZES}
    assert manifest_feed("small", 7, 3).shares() == {}


def test_sources_of_one_size_have_orders_of_their_own() -> None:
    assert manifest_feed("a", 30, 3).sampler.next_batch(30) != manifest_feed("b", 30, 3).sampler.next_batch(30)


def test_state_of_another_run_is_refused() -> None:
    feed = mixed()
    with pytest.raises(ValueError, match="has seed 4, but this run has 3"):
        feed.load_state_dict(mixed(seed=4).state_dict())
    with pytest.raises(ValueError, match="has weights "):
        feed.load_state_dict(mixed(weights={**WEIGHTS, "small": 2}).state_dict())
    assert feed.position == 0


@pytest.mark.parametrize(
    "change", [lambda ids: ids[::-1], lambda ids: [*ids[:-1], "new"]], ids=["order", "one of them"]
)
def test_state_of_other_utterances_is_refused(change: Callable[[list[str]], list[str]]) -> None:
    def feed(names: list[str]) -> ManifestFeed:
        return ManifestFeed([Utterance(id=i, audio="a.wav") for i in names], EpochSampler(len(names), 3))

    ids = [f"u{i}" for i in range(12)]
    first, other = feed(ids), feed(change(ids))
    first.next_batch(5)
    state = json.loads(json.dumps(first.state_dict()))
    with pytest.raises(ValueError, match="made with 12 other utterances, or with these in another order"):
        other.load_state_dict(state)
    assert other.sampler.position == 0, "nothing is changed by a refused state"
    with pytest.raises(ValueError, match=r"^source a: the checkpoint was made with 12 other"):
        MixedFeed({"a": other}, {"a": 1}, 0).load_state_dict(
            MixedFeed({"a": first}, {"a": 1}, 0).state_dict(),
        )
    del state["ids_digest"]  # as older checkpoints are
    other.load_state_dict(state)
    assert other.sampler.position == 5


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_bad_weights(weight: float) -> None:
    with pytest.raises(ValueError, match="the weight of small is"):
        mixed(weights={**WEIGHTS, "small": weight})
