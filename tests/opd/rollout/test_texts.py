"""Which text is an utterance's draft."""

from __future__ import annotations

import json
import random

import pytest

from opd.rollout.texts import DraftTexts
from opd.types import Utterance

BATCH = [Utterance("a", "a.wav", text="spoken a"), Utterance("b", "b.wav"), Utterance("c", "c.wav", text="")]
TEACHER = {"a": "taught a", "c": "taught c"}


@pytest.mark.parametrize(
    ("source", "first", "with_teacher", "second"),
    [
        ("auto", ["spoken a", None, None], ["spoken a", None, "taught c"], ["spoken a", "wrote b", None]),
        ("reference", ["spoken a", None, None], ["spoken a", None, None], ["spoken a", None, None]),
        ("earlier", [None, None, None], [None, None, None], ["wrote a", "wrote b", None]),
        ("none", [None, None, None], [None, None, None], [None, None, None]),
    ],
)
def test_the_first_there_is(source: str, first: list, with_teacher: list, second: list) -> None:
    saved: dict[str, str] = {}
    drafts = DraftTexts(source, saved)
    assert drafts.of(BATCH) == first
    asked: list[str] = []

    def teacher(batch: list[Utterance]) -> dict[str, str]:
        asked.extend(u.id for u in batch)
        return {u.id: TEACHER[u.id] for u in batch if u.id in TEACHER}

    assert DraftTexts(source, saved, teacher).of(BATCH) == with_teacher
    assert asked == (["b", "c"] if source == "auto" else []), "a reference needs no teacher"
    drafts.keep(BATCH, ["wrote a", "wrote b", ""])
    assert drafts.of(BATCH) == second
    assert DraftTexts(source, dict(saved)).of(BATCH) == second, "as a continued run does"


def test_what_a_reference_hides_is_not_kept() -> None:
    saved: dict[str, str] = {}
    DraftTexts("auto", saved).keep(BATCH, ["wrote a", "wrote b", "wrote c"])
    assert saved == {"b": "wrote b", "c": "wrote c"}


def test_no_more_texts_are_kept_than_the_limit_and_their_share_has_a_draft_in_every_epoch() -> None:
    utterances = [Utterance(id=str(i), audio=f"{i}.wav") for i in range(300)]
    drafts = DraftTexts("auto", {}, limit=100)
    for epoch in range(4):
        shuffled = random.Random(epoch).sample(utterances, 300)
        found = 0
        for start in range(0, 300, 10):
            batch = shuffled[start : start + 10]
            # As after a resume at any step: what is kept went through a checkpoint.
            drafts = DraftTexts("auto", json.loads(json.dumps(drafts.earlier)), limit=100)
            texts = drafts.of(batch)
            assert all(t in (None, f"{u.id} of {epoch - 1}") for u, t in zip(batch, texts, strict=True))
            found += sum(text is not None for text in texts)
            drafts.keep(batch, [f"{u.id} of {epoch}" for u in batch])
        assert found == (100 if epoch else 0)
        assert len(drafts.earlier) == 100
