"""Teacher data: the filters, the manifest that comes out, and going on after an interruption."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from data.manifest import read_manifest
from opd.config import config_from_dict
from opd.schema import TdConfig
from opd.teacher_data import TeacherData, transcript_settings
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
    data = TeacherData(tmp_path, config, lambda _: "teacher", "opd-basic-1")
    assert data.reason(utterance("a", "one two"), dataclasses.replace(GOOD, **change)) == reason


def test_a_length_that_blocks_is_named(tmp_path: Path, pipe: Path) -> None:
    data = TeacherData(tmp_path, TdConfig(), lambda _: "teacher", read_timeout_s=0.5)
    with pytest.raises(ValueError, match=r"data\.read_timeout_s=0\.5 s: a \(.*pipe\.wav\)"):
        data.reason(Utterance("a", str(pipe)), GOOD)


def test_an_interrupted_stage_goes_on_and_ends_in_an_ordinary_manifest(tmp_path: Path) -> None:
    utterances = [utterance(name, text) for name, text in (("a", "one to"), ("b", None), ("c", None), ("d", None))]
    written = {
        "a": GOOD,
        "b": dataclasses.replace(GOOD, text="zwei\u2028drei ü"),  # a line separator of Unicode ends no line here
        "c": dataclasses.replace(GOOD, looped=True),
        "d": GOOD,
    }
    first = TeacherData(tmp_path / "td", TdConfig(), lambda _: "seeds/teacher", "opd-basic-1")
    batches = first.pending(utterances, 2)
    batch = next(batches)
    first.add([(u, written[u.id]) for u in batch])
    path = tmp_path / "td" / "transcripts.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"id": "c", "te', encoding="utf-8")  # killed while it wrote

    again = TeacherData(tmp_path / "td", TdConfig(), lambda _: "seeds/teacher", "opd-basic-1")
    assert not again.is_complete()
    left = list(again.pending(utterances, 3))
    assert [[u.id for u in batch] for batch in left] == [["c", "d"]]
    again.add([(u, written[u.id]) for u in left[0]])
    said = again.write(utterances)
    counts = again.counts()
    assert said == "teacher data: 3 of 4 transcripts kept, left out: looped 1"
    assert again.is_complete()
    assert (counts["num_utterances"], counts["num_kept"], counts["left_out"]) == (4, 3, {"looped": 1})
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
    data = TeacherData(tmp_path, TdConfig(), lambda _: "teacher")
    utterances = [utterance("a"), utterance("b")]
    transcripts = [dataclasses.replace(GOOD, finished=False), dataclasses.replace(GOOD, text="")]
    data.add(list(zip(utterances, transcripts, strict=True)))
    with pytest.raises(ValueError, match=r"none of the 2 transcripts passes the filters \(empty 1, unfinished 1\)"):
        data.write(utterances)
    assert not data.is_complete()


def test_transcripts_of_other_settings_are_not_mixed_in(tmp_path: Path) -> None:
    config = {"recipe": "test", "stage": "td", "student": {"path": "s"}, "data": {"train_manifest": "m"}}

    def settings(**keys: str) -> dict:
        return transcript_settings(config_from_dict(config | {"teacher": {"path": "seeds/one"} | keys}))

    first = TeacherData(tmp_path, TdConfig(), lambda _: "seeds/one")
    first.check_settings(settings(path="seeds/other"))  # nothing was transcribed yet
    first.check_settings(settings())
    first.add([(utterance("a"), GOOD)])
    again = TeacherData(tmp_path, TdConfig(), lambda _: "seeds/one")
    again.check_settings(settings())
    with pytest.raises(
        ValueError, match=r"transcripts\.jsonl: .* teacher\.path was seeds/one, now seeds/other; restore"
    ):
        again.check_settings(settings(path="seeds/other"))


def test_other_filters_are_applied_to_the_same_transcripts(tmp_path: Path) -> None:
    utterances = [utterance("a"), utterance("b")]
    data = TeacherData(tmp_path, TdConfig(), lambda _: "t")
    data.add([(utterances[0], GOOD), (utterances[1], dataclasses.replace(GOOD, avg_logprob=-0.9))])
    assert "2 of 2 transcripts kept" in data.write(utterances)
    strict = TeacherData(tmp_path, TdConfig(min_avg_logprob=-0.5), lambda _: "t")
    assert data.is_complete()
    assert not strict.is_complete()
    assert strict.num_transcribed == 2
    assert "1 of 2 transcripts kept" in strict.write(utterances)
    assert strict.is_complete()


def test_bad_audio_stops_or_is_listed_and_limited(tmp_path: Path) -> None:
    utterances = [utterance(f"u{i}") for i in range(100)]

    def transcribe(batch: list[Utterance]) -> list[TeacherTranscript]:
        bad = dataclasses.replace(GOOD, text="", error="no such file")
        return [bad if u.id in ("u5", "u6", "u7") else GOOD for u in batch]

    data = TeacherData(tmp_path, TdConfig(), lambda _: "t", max_bad_share=0.02)
    with pytest.raises(
        ValueError, match=r"utterance u5: no such file; mend or remove it, or set data\.on_bad_audio=skip"
    ):
        data.transcribe(utterances, transcribe, 10, "stop")
    assert data.num_transcribed == 7, "the good ones of its batch are kept"
    data.transcribe(utterances, transcribe, 10, "skip")
    assert data.num_transcribed == 100
    with pytest.raises(ValueError, match=r"3\.0% of the utterances are bad audio, above data\.max_bad_share=0\.02"):
        data.write(utterances)
    listed = [json.loads(line) for line in (tmp_path / "bad_audio.jsonl").read_text().splitlines()]
    assert listed[0] == {"id": "u5", "audio": "/audio/u5.wav", "reason": "no such file"}
    more = TeacherData(tmp_path, TdConfig(), lambda _: "t", max_bad_share=0.05)
    assert more.write(utterances) == "teacher data: 97 of 100 transcripts kept, left out: bad_audio 3"
