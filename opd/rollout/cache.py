"""A KV cache whose rows grow each at its own pace, so that a rejected draft token costs one row a slot and no other."""

from __future__ import annotations

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class _Writes:
    """Where the running forward puts its keys and values; one for all layers."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.first, self.end = 0, 0  # slots that are written lie in [first, end)
        self.slots_RW: torch.Tensor | None = None  # of each token; None: all rows write from `first` on
        self.places_N: torch.Tensor | None = (
            None  # (R * W * H,) those slots in buffers flattened to (R * H * capacity, D)
        )


def first_slots(num_rows: int, num_heads: int, capacity: int, device: torch.device) -> torch.Tensor:
    """Where each row's and head's first slot is in a flattened buffer: (R, H)."""
    return torch.arange(num_rows * num_heads, device=device).view(num_rows, num_heads) * capacity


class KeyStore:
    """Memory for the keys and values of one rollout after the other, which stays where it is.

    layers   of each decoder layer (keys, values), (num_rows, H, capacity, D) each; made when the first rollout writes
    """

    def __init__(self, num_rows: int, capacity: int) -> None:
        self.num_rows, self.capacity = num_rows, capacity
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def of_layer(self, index: int, states: tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
        """Buffers of a layer for as many rows as the states (R, H, W, D) have."""
        if len(self.layers) == index:
            # Zeros: a masked slot has weight 0, and 0 times what stood in fresh memory could be NaN.
            keys, values = (s.new_zeros(self.num_rows, s.shape[1], self.capacity, s.shape[3]) for s in states)
            self.layers.append((keys, values))
        return [buffer[: states[0].shape[0]] for buffer in self.layers[index]]


class _RowLayer(CacheLayerMixin):
    """One layer's buffers. They are kept as (R, H, capacity, D), a matrix for each row and head that attention multiplies by."""

    is_sliding = False

    def __init__(self, writes: _Writes, store: KeyStore | None, index: int) -> None:
        super().__init__()
        self.writes, self.store, self.index = writes, store, index

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        store, index = self.store, self.index
        if store is None:
            store, index = KeyStore(key_states.shape[0], self.writes.capacity), 0
        self.keys, self.values = store.of_layer(index, (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (R, H, W, D) and returns all slots up to the last one written, (R, H, end, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        writes = self.writes
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            if writes.slots_RW is None:
                buffer[:, :, writes.first : writes.end] = new
                continue
            if writes.places_N is None:  # the first layer finds it out for all
                first_RH = first_slots(new.shape[0], new.shape[1], writes.capacity, new.device)
                writes.places_N = (first_RH[:, None] + writes.slots_RW[..., None]).flatten()
            buffer.flatten(0, 2).index_copy_(0, writes.places_N, new.transpose(1, 2).flatten(0, 2))
        return self.keys[:, :, : writes.end], self.values[:, :, : writes.end]

    def grow(self, capacity: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : old.shape[2]] = old
            setattr(self, name, new)

    def keep(self, rows: torch.Tensor) -> None:
        for name in ("keys", "values"):
            kept = getattr(self, name).index_select(0, rows)
            setattr(self, name, kept if self.store is None else getattr(self, name)[: len(rows)].copy_(kept))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.writes.first + query_length, 0

    def get_seq_length(self) -> int:
        return self.writes.end if self.is_initialized else 0

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The older name of `get_max_length`."""
        return self.get_max_length()


class RowCache(Cache):
    """Fits transformers' models. The caller says before each forward where every row writes.

    The prompt takes the first slots; after it, the slot of a token is the length of the prompt plus the token's
    position in the response. What a rejected token left behind is hidden by the caller's mask and written over later.
    """

    def __init__(self, capacity: int, store: KeyStore | None = None) -> None:
        """capacity: slots of a row to begin with; it grows when they are used up, but not in a store."""
        super().__init__(layers=[])
        self.writes, self.store = _Writes(capacity), store

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.layers) <= layer_idx:
            self.layers.append(_RowLayer(self.writes, self.store, len(self.layers)))
        return self.layers[layer_idx].update(key_states, value_states)

    def place(self, first: int, end: int, slots_RW: torch.Tensor | None = None) -> None:
        """The next forward writes into the slots `slots_RW` (R, W), all in [first, end); None: every row into all of them."""
        writes = self.writes
        if end > writes.capacity:
            assert self.store is None, "a store was made with too few slots"
            writes.capacity = end + max(16, writes.capacity // 4)
            for layer in self.layers:
                layer.grow(writes.capacity)
        writes.first, writes.end, writes.slots_RW, writes.places_N = first, end, slots_RW, None

    def keep(self, rows: torch.Tensor) -> None:
        """Keeps these rows (int64 indices) and gives the memory of the others back."""
        for layer in self.layers:
            layer.keep(rows)

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].dtype
