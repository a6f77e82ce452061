"""What a run trains on, as its config names it: the sources, what is checked of them at start, and the feed of batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data.feed import Feed, ManifestFeed, MixedFeed, source_seed
from data.index import IndexedManifest, facts_of, open_manifest
from data.sampler import EpochSampler
from data.sound import is_stream
from data.timed import seconds_within
from opd.schema import Config, DataConfig
from opd.teachers.routing import Router
from opd.types import Batch, Utterance

if TYPE_CHECKING:
    from data.stream import StreamFeed


class TrainingData:
    """The sources of a run by name (one without `data.train_manifests`, named "") and the feed that hands them out.

    Raises ValueError for a manifest that cannot be used.
    """

    def __init__(self, config: Config) -> None:
        data = config.data
        self.config = config
        with_text = config.stage == "sft" or (config.stage == "opd" and config.rollout.source == "manifest")
        manifests = {name: source["path"] for name, source in data.train_manifests.items()} or {"": data.train_manifest}
        self.sources: dict[str, Sequence[Utterance]] = {}
        self._streams: dict[str, StreamFeed] = {}
        for name, path in manifests.items():
            if is_stream(str(path)):
                self._streams[name] = _open_stream(str(path), self._seed(name), with_text, data.language_of(name))
            else:
                self.sources[name] = open_manifest(
                    str(path), require_text=with_text, default_language=data.language_of(name)
                )
        self.feed = self._feed()

    def use(self, utterances: Sequence[Utterance]) -> None:
        """Trains on these instead: what the teacher wrote, in stage td."""
        self.sources, self._streams = {"": utterances}, {}
        self.feed = self._feed()

    def utterances(self) -> Sequence[Utterance]:
        """All of them, where there is one source."""
        (only,) = self.sources.values()
        return only

    def texts(self) -> Iterator[str]:
        """All transcripts, source by source; none of streams. It takes a pass over all lines."""
        return (u.text for utterances in self.sources.values() for u in utterances if u.text)

    def num_texts(self) -> int:
        """How many utterances have a `text`; those of streams are not counted."""
        return sum(facts_of(utterances).num_texts for utterances in self.sources.values())

    def check_routes(self, router: Router, *, is_new: bool) -> list[str]:
        """A sentence for each route whose match takes no utterance, where all lines were looked at and there is no stream.

        Raises ValueError for an utterance without a teacher, or whose language its teacher cannot be told. It looks at one
        utterance of each language, which an index knows. Where routes look at other fields it takes all lines: for a new
        run only (is_new), since one that goes on has passed this with the same lines and routes.
        """
        by_language_alone = all(match.keys() <= {"language"} for match in router.matches.values())
        taken: set[str] = set()
        for utterances in self.sources.values():
            if by_language_alone:
                taken |= router.check([utterances[position] for _, position in facts_of(utterances).languages])
            elif is_new:
                taken |= router.check(utterances)
        if self._streams or not is_new:
            return []
        idle = [name for name, match in router.matches.items() if match and name not in taken]
        return [
            f"teacher.routes.{name} has no utterance to score: no line of the training manifest has "
            f"{' and '.join(f'{field}: {values}' for field, values in router.matches[name].items())}, or an earlier route takes it"
            for name in idle
        ]

    def check_gate(self) -> None:
        """Raises ValueError where a teacher gate has no references to look at."""
        if not self._streams and not self.num_texts():
            raise ValueError(
                "teacher.gate_max_wer: no utterance of data.train_manifest has a `text` to compare the teacher with; give "
                "references, or set teacher.gate_max_wer=null"
            )

    def check_streamed(self, router: Router, batch: Batch) -> None:
        """As `check_routes`, for a batch of which some may come from a stream: that cannot be looked through before."""
        if self._streams:
            router.check(batch)

    def _seed(self, name: str) -> int:
        return source_seed(self.config.seed, name) if name else self.config.seed

    def _feed(self) -> Feed:
        feeds: dict[str, Feed] = {
            name: _manifest_feed(utterances, self._seed(name), self.config.data)
            for name, utterances in self.sources.items()
        }
        feeds |= self._streams
        if not self.config.data.train_manifests:
            (only,) = feeds.values()
            return only
        weights = {name: source.get("weight", 1.0) for name, source in self.config.data.train_manifests.items()}
        return MixedFeed(feeds, weights, self.config.seed)


def _open_stream(name: str, seed: int, require_text: bool, default_language: str | None) -> StreamFeed:
    from data.stream import StreamFeed  # here, because `datasets` takes seconds to import

    return StreamFeed(name, seed, require_text=require_text, default_language=default_language)


def _manifest_feed(utterances: Sequence[Utterance], seed: int, data: DataConfig) -> ManifestFeed:
    keys = _seconds(utterances, data.read_timeout_s) if data.sorted_epochs else None
    return ManifestFeed(
        utterances, EpochSampler(len(utterances), seed, sort_keys=keys, sorted_epochs=data.sorted_epochs)
    )


def _seconds(utterances: Sequence[Utterance], timeout_s: float) -> Sequence[float] | np.ndarray:
    """Length of each utterance: its `duration`, else what the header of its file says, read within timeout_s."""
    if not isinstance(utterances, IndexedManifest):
        return [float(u.extra.get("duration") or seconds_within(timeout_s, u)) for u in utterances]
    known = utterances.seconds()
    seconds = np.full(len(utterances), np.nan, np.float32) if known is None else np.array(known)
    for position in np.flatnonzero(np.isnan(seconds)).tolist():
        seconds[position] = seconds_within(timeout_s, utterances[position])
    return seconds
