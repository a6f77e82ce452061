"""What a run is fed with: batches of utterances in a fixed order, from one manifest or from several by their weights.

A feed counts its position in utterances, whatever the size of a batch or the number of ranks: `state_dict` after any of
them, loaded into a new feed, goes on with the very next one.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from data.index import ids_digest
from data.sampler import EpochSampler
from opd.types import Batch, Utterance

_BLOCK = 4096  # draws that are made at a time
_MIXING = 1  # third word of the seed of the draws between sources; an epoch's order has two


class Feed(Protocol):
    """num_utterances: of an epoch over all sources; None where that is not known."""

    num_utterances: int | None

    def next_batch(self, batch_size: int) -> Batch:
        """The next `batch_size` utterances; an utterance may occur twice where a batch crosses into the next epoch."""

    def peek_batch(self, batch_size: int) -> Batch:
        """What `next_batch` would return; the position stays."""

    def shares(self) -> dict[str, float]:
        """Share of each source in what was handed out so far; empty where there is one source."""

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on from here, ready for JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError if it belongs to other data or another order."""


class ManifestFeed:
    """Shuffled epochs over the utterances of one manifest."""

    def __init__(self, utterances: Sequence[Utterance], sampler: EpochSampler) -> None:
        self.utterances = utterances
        self.sampler = sampler
        self.num_utterances: int | None = len(utterances)
        self._ids_digest: str | None = None

    def next_batch(self, batch_size: int) -> Batch:
        return [self.utterances[index] for index in self.sampler.next_batch(batch_size)]

    def peek_batch(self, batch_size: int) -> Batch:
        return [self.utterances[index] for index in self.sampler.peek_batch(batch_size)]

    def shares(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {**self.sampler.state_dict(), "ids_digest": self._digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        saved, own = state.get("ids_digest"), self._digest()  # older checkpoints and indexes have none
        if None not in (saved, own) and saved != own and state.get("num_utterances") == self.num_utterances:
            raise ValueError(
                f"the checkpoint was made with {self.num_utterances} other utterances, or with these in another order (their "
                "ids differ): resume with the manifest of the first run, or start a new run"
            )
        self.sampler.load_state_dict(state)

    def _digest(self) -> str | None:
        if self._ids_digest is None:
            self._ids_digest = ids_digest(self.utterances)
        return self._ids_digest


class MixedFeed:
    """Several feeds: each utterance comes from one of them, drawn with a probability in proportion to its weight.

    Each source runs through its own epochs, so a small one with a large weight is heard more often. The ids of
    utterances begin with the name of their source ("name/id"), since two manifests may use the same ones.
    """

    def __init__(self, feeds: Mapping[str, Feed], weights: Mapping[str, float], seed: int) -> None:
        if not feeds or feeds.keys() != weights.keys():
            raise ValueError(
                f"there are feeds {', '.join(feeds)} and weights of {', '.join(weights)}: give one for each"
            )
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight of {name} is {weight}: it must be a number above 0")
        self.names = sorted(feeds)  # so that the order in which a recipe lists them changes nothing
        self.feeds = {name: feeds[name] for name in self.names}
        self.weights = {name: float(weights[name]) for name in self.names}
        self.seed = seed
        self.position = 0
        self._handed_out = dict.fromkeys(self.names, 0)
        sizes = [feed.num_utterances for feed in feeds.values()]
        self.num_utterances: int | None = None if None in sizes else sum(size or 0 for size in sizes)
        self._bounds = np.cumsum([self.weights[name] for name in self.names])
        self._bounds /= self._bounds[-1]
        self._block: tuple[int, np.ndarray] = (-1, np.empty(0))

    def next_batch(self, batch_size: int) -> Batch:
        sources = self._sources(batch_size)
        parts = {name: iter(self.feeds[name].next_batch(n)) for name, n in _counts(sources).items()}
        batch = [_named(name, next(parts[name])) for name in sources]
        self.position += batch_size
        for name in sources:
            self._handed_out[name] += 1
        return batch

    def peek_batch(self, batch_size: int) -> Batch:
        sources = self._sources(batch_size)
        parts = {name: iter(self.feeds[name].peek_batch(n)) for name, n in _counts(sources).items()}
        return [_named(name, next(parts[name])) for name in sources]

    def shares(self) -> dict[str, float]:
        return {name: count / max(1, self.position) for name, count in self._handed_out.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "weights": self.weights,
            "position": self.position,
            "handed_out": dict(self._handed_out),
            "sources": {name: feed.state_dict() for name, feed in self.feeds.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in ("seed", "weights"):
            if state.get(key) != getattr(self, key):
                raise ValueError(
                    f"the checkpoint's data has {key} {state.get(key)}, but this run has {getattr(self, key)}: "
                    "resume with the manifests and settings of the first run, or start a new run"
                )
        for name, feed in self.feeds.items():
            try:
                feed.load_state_dict(state["sources"][name])
            except ValueError as error:
                raise ValueError(f"source {name}: {error}") from error
        self.position, self._handed_out = state["position"], dict(state["handed_out"])

    def _sources(self, batch_size: int) -> list[str]:
        """The source of each of the next utterances: it depends on (seed, position, weights) alone."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
        positions = range(self.position, self.position + batch_size)
        return [self.names[self._draws(p // _BLOCK)[p % _BLOCK]] for p in positions]

    def _draws(self, block: int) -> np.ndarray:
        """int64 [_BLOCK], an index into `names` for each position of a block."""
        if self._block[0] != block:
            raw = np.random.Philox(np.random.SeedSequence([self.seed, block, _MIXING])).random_raw(_BLOCK)
            shares = (raw >> np.uint64(11)) * 2.0**-53  # [0, 1)
            self._block = block, np.searchsorted(self._bounds, shares, side="right")
        return self._block[1]


def source_seed(seed: int, name: str) -> int:
    """The seed of one of several sources: it depends on its own name, not on what others there are."""
    return (seed << 32) + zlib.crc32(name.encode())


def _counts(sources: list[str]) -> dict[str, int]:
    return {name: sources.count(name) for name in dict.fromkeys(sources)}


def _named(name: str, utterance: Utterance) -> Utterance:
    return replace(utterance, id=f"{name}/{utterance.id}")
