"""The short forwards of a rollout as CUDA graphs: hundreds of kernels started at once, which take longer to start than to run.

A graph replays the same kernels on the same memory. So everything it reads and writes has one place for good: inputs,
keys and values (`cache.KeyStore`), logits. Attention runs over all slots and the mask hides those that are not written
yet. Rows and widths are rounded up to a few sizes with a graph each; what is added writes into a spare slot.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from opd.rollout.cache import KeyStore, RowCache, first_slots
from opd.rollout.drafts import MAX_WIDTH
from opd.rollout.steps import DecoderSteps, can_step

SLOTS = 64  # the number of slots is a multiple of it: attention kernels want masks of aligned rows
WIDTHS = (1, 2, 4, 8, 16, 32, MAX_WIDTH + 1)


class GraphSteps:
    """`DecoderSteps` on fixed memory. On CUDA the second use of a size captures a graph, which the next ones replay.

    Kept from one rollout to the next; `bind` it to the model before each. It keeps the memory of keys, values and logits.
    Elsewhere than on CUDA it computes the same on the same fixed memory, without graphs: slower than `DecoderSteps`.
    """

    def __init__(self, model: nn.Module, use_graphs: bool = True) -> None:
        """model: see `steps.can_step`; use_graphs: False computes without graphs on CUDA too."""
        self.steps = DecoderSteps(model)
        self._addresses = self.steps.addresses()
        self.use_graphs = use_graphs and self.steps.norm.is_cuda
        self.store: KeyStore | None = None
        self._pool: Any = None  # memory that the graphs share: one runs at a time
        self._buckets: dict[tuple[int, int], _Bucket] = {}
        self._logits_NV: torch.Tensor | None = None  # of all sizes: each overwrites those of the one before

    def bind(self, model: nn.Module) -> GraphSteps:
        """Takes over the weights of the model. Graphs stay where the weights are still in the same memory."""
        steps = DecoderSteps(model)
        addresses = steps.addresses()
        if addresses != self._addresses:
            self.steps, self._addresses = steps, addresses
            self._forget()
        return self

    def reads(self, model: nn.Module) -> bool:
        """Whether the model's weights are where the last rollout found them, so that its graphs can be kept."""
        return can_step(model) and DecoderSteps(model).addresses() == self._addresses

    @property
    def num_graphs(self) -> int:
        """Graphs that are captured now."""
        return sum(bucket.graph is not None for bucket in self._buckets.values())

    def new_cache(self, num_rows: int, num_slots: int) -> RowCache:
        """The cache of a rollout: `num_slots` are the most that a row can need. There is one at a time."""
        needed = -(-(num_slots + 1) // SLOTS) * SLOTS  # the last slot is the spare one
        store = self.store
        if store is None or num_rows > store.num_rows or needed > store.capacity:
            rows, capacity = (store.num_rows, store.capacity) if store is not None else (0, 0)
            self.store = store = None  # its memory is free before the new one is made
            self._forget()
            self.store = store = KeyStore(max(rows, num_rows), max(capacity, needed))
        return RowCache(store.capacity, store)

    def _forget(self) -> None:
        self._buckets, self._pool, self._logits_NV = {}, None, None

    def __call__(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past_key_values: RowCache,
        use_cache: bool = True,
    ) -> Any:
        """As `DecoderSteps`. The logits are overwritten by the next call."""
        store = self.store
        assert store is not None and past_key_values.store is store, "the cache is not that of new_cache"
        rows, width = input_ids.shape
        size = (_round_up(rows, store.num_rows), next(w for w in WIDTHS if w >= width))
        if self._logits_NV is None or len(self._logits_NV) < size[0] * size[1]:
            self._forget()  # graphs write into the old one
            self._logits_NV = self.steps.head.new_empty(size[0] * size[1], len(self.steps.head))
        bucket = self._buckets.get(size)
        if bucket is None:
            logits_NV = self._logits_NV[: size[0] * size[1]]
            bucket = self._buckets[size] = _Bucket(store, *size, attention_mask, logits_NV)
        bucket.fill(input_ids, attention_mask, position_ids, past_key_values)
        self._run(bucket)
        return SimpleNamespace(logits=bucket.logits_NV.view(*size, -1)[:rows, :width])

    def _run(self, bucket: _Bucket) -> None:
        bucket.num_runs += 1
        if self.use_graphs and bucket.graph is None and bucket.num_runs > 1:
            # The first run has set up what libraries set up at their first call.
            bucket.graph = self._capture(bucket)
        if bucket.graph is None:
            bucket.compute(self.steps)
        else:
            bucket.graph.replay()

    def _capture(self, bucket: _Bucket) -> Any:
        """The graph of a bucket's forward. Raises RuntimeError, which says how to do without, where there can be none."""
        try:
            graph = torch.cuda.CUDAGraph()
            # Other threads of the process (audio readers) may use CUDA meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                bucket.compute(self.steps)
        except RuntimeError as error:
            size = "{} rows of {} tokens".format(*bucket.ids_RW.shape)
            raise RuntimeError(
                f"the rollout's forward of {size} cannot be captured as a CUDA graph ({str(error).strip()}): set "
                "rollout.cuda_graphs=false, which is slower and writes the same"
            ) from error
        self._pool = graph.pool() if self._pool is None else self._pool
        return graph


class _Bucket:
    """The inputs of forwards of one size, R rows and W tokens, and the part of the store that they use.

    It stands in for the cache while `DecoderSteps` computes: `update` and `writes` are what that needs of one.
    """

    def __init__(self, store: KeyStore, num_rows: int, width: int, mask: torch.Tensor, logits_NV: torch.Tensor) -> None:
        """mask: any mask, for its type and device; logits_NV: where logits are written, N = R * W."""
        self.layers = [(keys[:num_rows], values[:num_rows]) for keys, values in store.layers]
        self.writes = SimpleNamespace(capacity=store.capacity)
        self.far = torch.finfo(mask.dtype).min
        self.ids_RW = torch.zeros(num_rows, width, dtype=torch.int64, device=mask.device)
        self.positions_RW = torch.zeros_like(self.ids_RW)
        num_heads = self.layers[0][0].shape[1]
        self.first_R1H = first_slots(num_rows, num_heads, store.capacity, mask.device)[:, None]
        self.places_RWH = self.first_R1H.repeat(1, width, 1)
        self.mask_R1WL = mask.new_zeros(num_rows, 1, width, store.capacity)
        self.graph: Any = None
        self.logits_NV = logits_NV
        self.num_runs = 0

    def fill(self, ids_RW: torch.Tensor, mask_R1WL: torch.Tensor, positions_RW: torch.Tensor, cache: RowCache) -> None:
        """Puts the inputs of a forward of at most this size into their places."""
        rows, width = ids_RW.shape
        first, end, slots_RW = cache.writes.first, cache.writes.end, cache.writes.slots_RW
        if slots_RW is None:
            slots_RW = torch.arange(first, end, device=ids_RW.device).expand(rows, width)
        self.ids_RW[:rows, :width] = ids_RW
        self.positions_RW[:rows, :width] = positions_RW
        self.places_RWH.copy_((self.first_R1H + (self.writes.capacity - 1)).expand_as(self.places_RWH))
        self.places_RWH[:rows, :width] = self.first_R1H[:rows] + slots_RW[..., None]
        self.mask_R1WL.fill_(self.far)
        self.mask_R1WL[:rows, :, :width, :end] = mask_R1WL

    def compute(self, steps: DecoderSteps) -> None:
        """The logits of what was filled in."""
        cache: Any = self
        steps(self.ids_RW, self.mask_R1WL, self.positions_RW, cache, out_NV=self.logits_NV)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (R, H, W, D) and returns all slots, (R, H, capacity, D)."""
        keys, values = self.layers[layer_idx]
        for buffer, new in ((keys, key_states), (values, value_states)):
            buffer.flatten(0, 2).index_copy_(0, self.places_RWH.flatten(), new.transpose(1, 2).flatten(0, 2))
        return keys, values


def _round_up(rows: int, most: int) -> int:
    """The next power of two, or the number of rows of the store."""
    return min(most, 1 << (rows - 1).bit_length())
