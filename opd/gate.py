"""The teacher gate: where there are references, utterances that the teacher itself gets wrong are not distilled."""

from __future__ import annotations

from collections.abc import Callable

from data.feed import Feed
from opd.evaluate import utterance_errors
from opd.text import scored_language
from opd.types import Batch, TeacherTranscript, Utterance

MAX_DRAWN = 100_000  # utterances of a stream, of which not one passes


class TeacherGate:
    """Lets utterances pass whose teacher transcript has a WER of at most `limit_of` them, and those without a reference.

    limit_of     None where the utterance's teacher has no limit
    transcribe   the teachers' transcripts of a batch, in order
    num_checked, num_left_out   utterances with a reference that were looked at, each once, and those left out
    """

    def __init__(
        self,
        limit_of: Callable[[Utterance], float | None],
        transcribe: Callable[[Batch], list[TeacherTranscript]],
        normaliser: str = "auto",
    ) -> None:
        self.limit_of = limit_of
        self.transcribe = transcribe
        self.normaliser = normaliser
        self._passes: dict[str, bool] = {}

    @property
    def num_checked(self) -> int:
        return len(self._passes)

    @property
    def num_left_out(self) -> int:
        return sum(not passes for passes in self._passes.values())

    def accept(self, utterances: Batch) -> Batch:
        """The utterances that pass, in order."""
        limits = {u.id: self.limit_of(u) for u in utterances if u.text is not None and u.id not in self._passes}
        new = [u for u in utterances if limits.get(u.id) is not None]
        if new:
            for utterance, transcript in zip(new, self.transcribe(new), strict=True):
                self._passes[utterance.id] = self._wer(utterance, transcript) <= (limits[utterance.id] or 0.0)
        return [u for u in utterances if self._passes.get(u.id, True)]

    def fill(self, feed: Feed, size: int) -> Batch:
        """`size` utterances that pass, as the feed has them. Raises ValueError where an epoch brings none."""
        batch: Batch = []
        drawn, limit = 0, feed.num_utterances or MAX_DRAWN
        while len(batch) < size:
            if not batch and drawn >= limit:
                raise ValueError(
                    f"teacher.gate_max_wer: the teacher gets all {limit} utterances of data.train_manifest wrong beyond "
                    "this; look at their texts, or raise the limit"
                )
            drawn += size - len(batch)
            batch += self.accept(feed.next_batch(size - len(batch)))
        return batch

    def _wer(self, utterance: Utterance, transcript: TeacherTranscript) -> float:
        if transcript.error is not None:
            return 0.0  # nothing was heard: what becomes of bad audio is data.on_bad_audio's
        language = scored_language(utterance.language)
        errors = utterance_errors(str(utterance.text), transcript.text, language, self.normaliser)
        return errors.wer_errors / max(1, errors.ref_words)
