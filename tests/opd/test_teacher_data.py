"""Teacher data: the filters, the manifest that comes out, and going on after an interruption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from data.manifest import read_manifest
from opd.schema import TdConfig
from opd.teacher_data import TeacherData
from opd.types import TeacherTranscript, Utterance

GOOD = TeacherTranscript("one two", -0.2, 3, finished=True, looped=False)


def utterance(name: str, text: str | None = None) -> Utterance:
    return Utterance(name, f"/audio/{name}.wav", text, "English", extra={"duration": 1.0, "speaker": "s1"})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"error": "unreadable", "text": ""}, "bad_audio"),
        ({"text": ""}, "empty"),
        ({"finished": False}, "unfinished"),
        ({"looped": True}, "looped"),
        ({"avg_logprob": -1.01}, "low_logprob"),
        ({"text": "x" * 31}, "too_fast"),
        ({"text": "x"}, "too_slow"),
        ({"text": "one three four"}, "wrong"),
        ({"text": "one three"}, None),
    ],
)
def test_each_filter_by_itself(change: dict, reason: str | None, tmp_path: Path) -> None:
    config = TdConfig(min_chars_per_second=2.0, max_wer=0.5)
    data = TeacherData(tmp_path, config, "teacher", "opd-basic-1")
    assert data.reason(utterance("a", "one two"), dataclasses.replace(GOOD, **change)) == reason


def test_an_interrupted_stage_goes_on_and_ends_in_an_ordinary_manifest(tmp_path: Path) -> None:
    utterances = [utterance(name, text) for name, text in (("a", "one to"), ("b", None), ("c", None), ("d", None))]
    written = {
        "a": GOOD,
        "b": dataclasses.replace(GOOD, text="zwei\u2028drei ü"),  # a line separator of Unicode ends no line here
        "c": dataclasses.replace(GOOD, looped=True),
        "d": GOOD,
    }
    first = TeacherData(tmp_path / "td", TdConfig(), "seeds/teacher", "opd-basic-1")
    batches = first.pending(utterances, 2)
    batch = next(batches)
    first.add(batch, [written[u.id] for u in batch])
    path = tmp_path / "td" / "transcripts.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"id": "c", "te', encoding="utf-8")  # killed while it wrote

    again = TeacherData(tmp_path / "td", TdConfig(), "seeds/teacher", "opd-basic-1")
    assert not again.is_complete()
    left = list(again.pending(utterances, 3))
    assert [[u.id for u in batch] for batch in left] == [["c", "d"]]
    again.add(left[0], [written[u.id] for u in left[0]])
    counts = again.write(utterances)
    assert again.is_complete()
    assert (counts["num_utterances"], counts["num_kept"], counts["left_out"]) == (4, 3, {"looped": 1})
    assert again.counts() == counts
    rows = read_manifest(again.manifest, require_text=True)
    assert [(u.id, u.text) for u in rows] == [("a", "one two"), ("b", "zwei\u2028drei ü"), ("d", "one two")]
    assert rows[0].extra == {
        "duration": 1.0, "speaker": "s1", "text_source": "seeds/teacher", "avg_logprob": -0.2, "num_tokens": 3,
        "reference": "one to",
    }  # fmt: skip
    assert rows[0].audio == "/audio/a.wav"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert [line["id"] for line in lines] == ["a", "b", "c", "d"], "nothing is transcribed twice"


def test_nothing_that_passes_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    data = TeacherData(tmp_path, TdConfig(), "teacher")
    utterances = [utterance("a"), utterance("b")]
    data.add(utterances, [dataclasses.replace(GOOD, finished=False), dataclasses.replace(GOOD, text="")])
    with pytest.raises(ValueError, match=r"none of the 2 transcripts passes the filters \(empty 1, unfinished 1\)"):
        data.write(utterances)
    assert not data.is_complete()
