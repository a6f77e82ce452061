"""Which text is an utterance's draft."""

from __future__ import annotations

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
    assert drafts.of(BATCH, TEACHER) == with_teacher
    drafts.keep(BATCH, ["wrote a", "wrote b", ""])
    assert drafts.of(BATCH) == second
    assert DraftTexts(source, dict(saved)).of(BATCH) == second, "as a continued run does"


def test_what_a_reference_hides_is_not_kept() -> None:
    saved: dict[str, str] = {}
    DraftTexts("auto", saved).keep(BATCH, ["wrote a", "wrote b", "wrote c"])
    assert saved == {"b": "wrote b", "c": "wrote c"}
