"""Audio of the next batch is read, resampled and made mel while the current one trains."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from data.audio import BadAudio
from data.collate import Collator
from data.timed import result_within
from opd.types import Batch

Prompts = tuple[dict[str, torch.Tensor], list[BadAudio]]


class PromptLoader:
    """Model inputs of prompts on the CPU, and the audio that was bad; made ahead of time where it was asked for.

    num_threads   that read audio on this rank; 0 makes everything when it is taken. Decoding, resampling and the
                  spectrum leave Python's lock, so threads are enough and nothing is copied between processes.
    """

    def __init__(self, collator: Collator, processor: Any, num_threads: int, timeout_s: float = 120.0) -> None:
        self.collator = collator
        self.processor = processor
        self.num_threads, self.timeout_s = num_threads, timeout_s
        self._readers = ThreadPoolExecutor(max(1, num_threads), "read")
        # Another pool: a task that waits for readers must not take a reader's place.
        self._makers = ThreadPoolExecutor(1, "make")
        self._pending: dict[tuple[str, ...], Future[Prompts]] = {}
        self._waited_s = 0.0

    def prefetch(self, shard: Batch) -> None:
        """Begins to make the prompts of a shard. Of what was begun before, all but the newest is dropped."""
        if self.num_threads:
            while len(self._pending) > 1:  # that one may be the batch which is taken next
                del self._pending[next(iter(self._pending))]
            self._pending[_key(shard)] = self._makers.submit(self._make, shard)

    def take(self, shard: Batch) -> Prompts:
        """The prompts of a shard, left-padded. Raises BadAudio where the policy is to stop, and ValueError after `timeout_s`."""
        began = time.perf_counter()
        pending = self._pending.pop(_key(shard), None) or self._makers.submit(self._make, shard)
        prompts = result_within(self.timeout_s, pending, self.collator.reading)
        self._waited_s += time.perf_counter() - began
        return prompts

    def take_waited_s(self) -> float:
        """Seconds that `take` has waited since this was last asked."""
        waited_s, self._waited_s = self._waited_s, 0.0
        return waited_s

    def _make(self, shard: Batch) -> Prompts:
        parts = max(1, min(self.num_threads, len(shard)))
        bounds = [len(shard) * part // parts for part in range(parts + 1)]
        pieces = [shard[low:high] for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
        read = list(self._readers.map(self.collator.collate, pieces))
        waveforms = [clip for clips, _ in read for clip in clips]
        return self.processor.build_inputs(waveforms), [error for _, errors in read for error in errors]


def _key(shard: Batch) -> tuple[str, ...]:
    return tuple(utterance.id for utterance in shard)
