"""A Hugging Face data set that is streamed: no copy on disk, no access by position, and yet an exact resume."""

from __future__ import annotations

import zlib
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from data.huggingface import RowConverter, inline_sound, parse_name
from data.import_huggingface import open_data, reason
from opd.types import Batch, Utterance


@dataclass
class _Block:
    """Rows of the stream in the order in which they are handed out.

    number   of the block in its epoch
    stream   where the stream stood before it; None at the begin of an epoch
    """

    epoch: int
    number: int
    stream: dict[str, Any] | None
    rows: list[tuple[int, dict[str, Any]]] = field(default_factory=list)


class StreamFeed:
    """Epochs over a stream (a `data.feed.Feed`): files in an order of the epoch's, rows shuffled within blocks of `buffer`.

    A shuffle buffer that is refilled row by row cannot be saved without all that is in it. A block can: where the stream
    stood before it, and how many of its utterances were handed out. Going on reads that one block again.
    An utterance carries its sound with it (`data.sound`), as no other process can ask a stream for it.
    """

    num_utterances: int | None = None

    def __init__(
        self, name: str, seed: int, *, require_text: bool = False, default_language: str | None = None
    ) -> None:
        self.name = parse_name(name)
        self.seed = seed
        self.require_text = require_text
        self.position = 0
        datasets.disable_progress_bars()
        given = self.name
        data, self._audio = open_data(
            given.path, split=given.split, audio=given.columns.audio, streaming=True, subset=given.subset
        )
        self._convert = RowConverter(given, self._audio, data.features, default_language)
        self._data = data.to_iterable_dataset() if isinstance(data, datasets.Dataset) else data
        self._blocks: deque[_Block] = deque()  # the one that is handed out, and those that a look ahead has read
        self._offset = 0  # utterances of the first block that were handed out
        self._begin(epoch=0, number=0, stream=None)

    def next_batch(self, batch_size: int) -> Batch:
        batch: Batch = []
        while len(batch) < batch_size:
            if not self._blocks:
                self._read_block()
            elif self._offset == len(self._blocks[0].rows):
                if len(self._blocks) == 1:
                    self._read_block()
                self._blocks.popleft()
                self._offset = 0
            block = self._blocks[0]
            taken = block.rows[self._offset : self._offset + batch_size - len(batch)]
            batch += [self._utterance(block, *row) for row in taken]
            self._offset += len(taken)
        self.position += batch_size
        return batch

    def peek_batch(self, batch_size: int) -> Batch:
        while sum(len(block.rows) for block in self._blocks) - self._offset < batch_size:
            self._read_block()
        rows = ((block, row) for block in self._blocks for row in block.rows)
        return [self._utterance(block, *row) for block, row in islice(rows, self._offset, self._offset + batch_size)]

    def shares(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        state = {"seed": self.seed, "buffer": self.name.buffer, "position": self.position, "offset": self._offset}
        if not self._blocks:
            return state | {"epoch": 0, "number": 0, "stream": None}
        block = self._blocks[0]
        return state | {"epoch": block.epoch, "number": block.number, "stream": block.stream}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key, own in (("seed", self.seed), ("buffer", self.name.buffer)):
            if state.get(key) != own:
                raise ValueError(
                    f"the checkpoint's stream has {key} {state.get(key)}, but this run has {own}: resume with the settings "
                    "of the first run, or start a new run"
                )
        self.position, self._offset = state["position"], state["offset"]
        self._blocks.clear()
        self._begin(state["epoch"], state["number"], state["stream"])
        if self._offset:
            self._read_block()

    def _begin(self, epoch: int, number: int, stream: dict[str, Any] | None) -> None:
        """The next block is this one."""
        self._epoch, self._number = epoch, number
        # Another order of the files in each epoch: an epoch that is not 0 shuffles them.
        self._data.set_epoch((zlib.crc32(str(self.seed).encode()) << 20) + epoch + 1)
        if stream is not None:
            self._data.load_state_dict(stream)
        self._rows = iter(self._data)

    def _read_block(self) -> None:
        stream = self._data.state_dict() if self._number else None
        rows = self._next_rows()
        if rows:
            order = np.random.Philox(np.random.SeedSequence([self.seed, self._epoch, self._number])).random_raw(
                len(rows)
            )
            first = self._number * self.name.buffer
            shuffled = [(first + index, rows[index]) for index in np.argsort(order, kind="stable").tolist()]
            self._blocks.append(_Block(self._epoch, self._number, stream, shuffled))
            self._number += 1
        elif self._number == 0:
            raise ValueError(f"{self.name.path}: the stream has no rows: choose another split")
        else:
            self._begin(self._epoch + 1, 0, None)
            self._read_block()

    def _next_rows(self) -> list[dict[str, Any]]:
        """The rows of a block; none at the end of an epoch."""
        rows: list[dict[str, Any]] = []
        try:
            rows.extend(islice(self._rows, self.name.buffer))
        except Exception as error:  # the library raises many kinds, its own and pyarrow's
            where = f"{self.name.path}:row {self._number * self.name.buffer + len(rows)} of epoch {self._epoch + 1}"
            why = reason(error, Path(self.name.path))
            raise ValueError(f"{where}: the stream cannot be read ({why}): fetch the data set again") from error
        return rows

    def _utterance(self, block: _Block, number: int, row: dict[str, Any]) -> Utterance:
        where = f"{self.name.path}:row {number} of epoch {block.epoch + 1}"
        try:
            address, default_id = inline_sound(row[self._audio], self._convert.folder)
        except OSError as error:
            raise ValueError(f"{where}: {error.strerror}: choose a column with audio=COLUMN") from error
        plain = {key: value for key, value in row.items() if key != self._audio}
        utterance = self._convert.utterance(plain, address, where, default_id or address)
        if self.require_text and not (utterance.text and utterance.text.strip()):
            raise ValueError(f"{where}: this set needs a transcript: its text is empty, or name it with text=COLUMN")
        return utterance
