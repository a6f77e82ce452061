"""Which text a rollout starts from as its draft. It changes how fast the student writes, not what."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from opd.types import Batch

# Each checkpoint holds them all: about 15 MB of transcripts of usual length. Once there are so many, those that are
# there stay, with their newest text, and no others come in: epochs of a larger set then find a draft for a fixed part of
# it. Dropping the oldest instead would drop nearly all of them before their utterances come again.
MAX_DRAFTS = 100_000


class DraftTexts:
    """A draft of each utterance's response: the manifest's text, what a teacher wrote, the student's last rollout.

    earlier   utterance id -> the text of its last rollout. Kept up to date here and saved with the run: a continued run
              must draft as an unbroken one does, for forwards of other shapes differ in their last bits
    """

    def __init__(
        self,
        source: str,
        earlier: dict[str, str],
        teacher: Callable[[Batch], Mapping[str, str]] | None = None,
        limit: int = MAX_DRAFTS,
    ) -> None:
        """source: auto (the first there is), reference, earlier, ctc (the ranks make those) or none.

        teacher   utterance id -> what a teacher wrote, of those for which that is known
        limit     how many `earlier` holds at most
        """
        self.source = source
        self.earlier = earlier
        self.teacher = teacher
        self.limit = limit

    def of(self, batch: Batch) -> list[str | None]:
        """One text, or None, for each utterance."""
        if self.source in ("none", "ctc"):
            return [None] * len(batch)
        references = {u.id: u.text for u in batch} if self.source != "earlier" else {}
        earlier = self.earlier if self.source != "reference" else {}
        teacher: Mapping[str, str] = {}
        if self.teacher is not None and self.source == "auto":
            teacher = self.teacher([u for u in batch if not u.text])
        return [references.get(u.id) or teacher.get(u.id) or earlier.get(u.id) for u in batch]

    def keep(self, batch: Batch, texts: Sequence[str]) -> None:
        """Notes what the student wrote, where it may be of use when the utterance comes again."""
        if self.source not in ("auto", "earlier"):
            return
        for utterance, text in zip(batch, texts, strict=True):
            is_of_use = text and (self.source == "earlier" or not utterance.text)
            if is_of_use and (len(self.earlier) < self.limit or utterance.id in self.earlier):
                self.earlier[utterance.id] = text
