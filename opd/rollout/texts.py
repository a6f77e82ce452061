"""Which text a rollout starts from as its draft. It changes how fast the student writes, not what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opd.types import Batch


class DraftTexts:
    """A draft of each utterance's response: the manifest's text, what a teacher wrote, the student's last rollout.

    earlier   utterance id -> the text of its last rollout. Kept up to date here and saved with the run: a continued run
              must draft as an unbroken one does, for forwards of other shapes differ in their last bits
    """

    def __init__(self, source: str, earlier: dict[str, str]) -> None:
        """source: auto (the first there is), reference, earlier or none."""
        self.source = source
        self.earlier = earlier

    def of(self, batch: Batch, teacher: Mapping[str, str] | None = None) -> list[str | None]:
        """One text, or None, for each utterance; `teacher` has transcripts by utterance id."""
        if self.source == "none":
            return [None] * len(batch)
        references = {u.id: u.text for u in batch} if self.source != "earlier" else {}
        earlier = self.earlier if self.source != "reference" else {}
        teacher = teacher or {} if self.source == "auto" else {}
        return [references.get(u.id) or teacher.get(u.id) or earlier.get(u.id) for u in batch]

    def keep(self, batch: Batch, texts: Sequence[str]) -> None:
        """Notes what the student wrote, where it may be of use when the utterance comes again."""
        if self.source not in ("auto", "earlier"):
            return
        for utterance, text in zip(batch, texts, strict=True):
            if text and (self.source == "earlier" or not utterance.text):
                self.earlier[utterance.id] = text
