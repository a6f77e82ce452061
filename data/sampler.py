"""Which utterance comes next: shuffled epochs that resume at any position, with any batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_PIECE = 1 << 16  # draws that are looked at together


class EpochSampler:
    """Indices 0..num_utterances-1, each once an epoch, in an order that depends only on (seed, epoch).

    The position counts utterances, so a run can resume with another batch size or number of workers and see exactly
    what it would have seen. With `sort_keys` (say, durations) the first `sorted_epochs` epochs come in rising order of
    the key instead: easy utterances first, in batches of similar length (SortaGrad, Deep Speech 2).
    """

    def __init__(
        self,
        num_utterances: int,
        seed: int,
        *,
        sort_keys: Sequence[float] | np.ndarray | None = None,
        sorted_epochs: int = 0,
    ) -> None:
        if num_utterances < 1:
            raise ValueError(f"a sampler needs at least one utterance, not {num_utterances}: check the manifest")
        if seed < 0:
            raise ValueError(f"the sampler's seed must be 0 or more, not {seed}")
        if sorted_epochs < 0 or (sorted_epochs > 0 and sort_keys is None):
            raise ValueError(f"sorted_epochs is {sorted_epochs}: it must be 0 or more, and needs sort_keys above 0")
        if sort_keys is not None and len(sort_keys) != num_utterances:
            raise ValueError(f"there are {len(sort_keys)} sort_keys for {num_utterances} utterances: give one for each")
        self.num_utterances = num_utterances
        self.seed = seed
        self.sorted_epochs = sorted_epochs
        self.position = 0  # utterances handed out since the start of training
        self._sorted_order = None if sort_keys is None else np.argsort(np.asarray(sort_keys), kind="stable")
        self._orders: dict[int, np.ndarray] = {}  # of the newest two epochs: a look-ahead may be in the next one

    @property
    def epoch(self) -> int:
        """Number of complete epochs handed out."""
        return self.position // self.num_utterances

    def next_batch(self, batch_size: int) -> list[int]:
        """The next `batch_size` indices; a batch may cross into the next epoch, and so may hold an index twice."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
        batch: list[int] = []
        while len(batch) < batch_size:
            offset = self.position % self.num_utterances
            part = self._epoch_order(self.epoch)[offset : offset + batch_size - len(batch)]
            batch.extend(part.tolist())
            self.position += len(part)
        return batch

    def peek_batch(self, batch_size: int) -> list[int]:
        """What `next_batch` would return; the position stays."""
        position = self.position
        batch = self.next_batch(batch_size)
        self.position = position
        return batch

    def state_dict(self) -> dict[str, int]:
        """What `load_state_dict` needs to go on from here; plain integers."""
        return {
            "num_utterances": self.num_utterances,
            "seed": self.seed,
            "sorted_epochs": self.sorted_epochs,
            "position": self.position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError if it belongs to other data or another order."""
        for key in ("num_utterances", "seed", "sorted_epochs"):
            if state.get(key) != getattr(self, key):
                raise ValueError(
                    f"the checkpoint's sampler has {key} {state.get(key)}, but this run has {getattr(self, key)}: "
                    "resume with the manifest and settings of the first run, or start a new run"
                )
        position = state.get("position")
        if not isinstance(position, int) or position < 0:
            raise ValueError(f"the checkpoint's sampler position {position!r} is no number of utterances")
        self.position = position

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Integers [num_utterances]."""
        if epoch < self.sorted_epochs:
            assert self._sorted_order is not None, "the constructor asks for sort_keys with sorted_epochs"
            return self._sorted_order
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[min(self._orders)]
            self._orders[epoch] = _shuffled(self.num_utterances, self.seed, epoch)
        return self._orders[epoch]


def _shuffled(num: int, seed: int, epoch: int) -> np.ndarray:
    """0..num-1 in the order of an epoch; 4 bytes each where that is enough."""
    # Sorting raw draws, not Generator.permutation: numpy promises the same raw stream in every version, so that
    # a run may resume after an upgrade.
    generator = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    # What a stable argsort of the draws gives, in a third of its time and memory: the numbers stand in the draws' own low
    # bits, and where the others are equal, the low bits decide. In pieces, for new memory costs as much as the sorting.
    bits = np.uint64(max(1, (num - 1).bit_length()))
    low_mask = (np.uint64(1) << bits) - np.uint64(1)
    integers = (np.int32, np.uint32) if num < 2**31 else (np.int64, np.uint64)
    packed, order, low = np.empty(num, np.uint64), np.empty(num, integers[0]), np.empty(num, integers[1])
    pieces = [slice(begin, min(begin + _PIECE, num)) for begin in range(0, num, _PIECE)]
    for piece in pieces:
        draws = generator.random_raw(piece.stop - piece.start)
        low[piece] = draws & low_mask
        packed[piece] = (draws & ~low_mask) | np.arange(piece.start, piece.stop, dtype=np.uint64)
    packed.sort()
    tied = []
    for piece in pieces:
        order[piece] = packed[piece] & low_mask
        high = packed[piece.start : piece.stop + 1] >> bits
        tied.append(np.flatnonzero(high[1:] == high[:-1]) + piece.start)
    first = np.concatenate(tied)
    places = np.union1d(first, first + 1)
    numbers = order[places]
    order[places] = numbers[np.lexsort((numbers, low[numbers], packed[places] >> bits))]
    return order
