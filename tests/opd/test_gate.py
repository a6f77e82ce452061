"""Which utterances a teacher gate lets pass."""

from __future__ import annotations

import pytest

from data.feed import ManifestFeed
from data.sampler import EpochSampler
from opd.gate import TeacherGate
from opd.types import Batch, TeacherTranscript, Utterance


def test_what_the_teacher_gets_wrong_is_left_out_once_and_counted() -> None:
    written = {"right": "one two", "near": "one three", "wrong": "nine", "silent": ""}
    asked: list[list[str]] = []

    def transcribe(utterances: Batch) -> list[TeacherTranscript]:
        asked.append([u.id for u in utterances])
        return [
            TeacherTranscript(written[u.id], -0.1, 3, True, False, "no file" if u.id == "silent" else None)
            for u in utterances
        ]

    utterances = [Utterance(name, "x.wav", "one two", "English") for name in written]
    unlabelled = Utterance("unlabelled", "x.wav")
    gate = TeacherGate(lambda _: 0.5, transcribe, "opd-basic-1")
    kept = gate.accept([unlabelled, *utterances])
    assert [u.id for u in kept] == ["unlabelled", "right", "near", "silent"]
    assert [u.id for u in gate.accept([*utterances, unlabelled])] == ["right", "near", "silent", "unlabelled"]
    assert asked == [["right", "near", "wrong", "silent"]], "each utterance is transcribed once"
    assert (gate.num_checked, gate.num_left_out) == (4, 1)
    one_teacher = TeacherGate(lambda u: 0.0 if u.id == "wrong" else None, transcribe, "opd-basic-1")
    assert [u.id for u in one_teacher.accept(utterances)] == ["right", "near", "silent"], "the other has no limit"
    assert asked.pop() == ["wrong"]
    assert [u.id for u in TeacherGate(lambda _: 0.0, transcribe, "opd-basic-1").accept(utterances[:3])] == ["right"]


def test_batches_are_filled_with_what_passes_and_an_epoch_without_any_stops() -> None:
    def transcribe(utterances: Batch) -> list[TeacherTranscript]:
        return [TeacherTranscript(u.extra["heard"], -0.1, 3, True, False) for u in utterances]

    utterances = [
        Utterance(f"u{i}", "x.wav", "one", "English", extra={"heard": "one" if i % 3 else "two"}) for i in range(9)
    ]
    feed, unfiltered = (ManifestFeed(utterances, EpochSampler(9, seed=2)) for _ in range(2))
    gate = TeacherGate(lambda _: 0.0, transcribe, "opd-basic-1")
    batches = [gate.fill(feed, 4) for _ in range(6)]
    expected = [u for u in unfiltered.next_batch(feed.state_dict()["position"]) if u.extra["heard"] == "one"]
    assert [u for batch in batches for u in batch] == expected, "in the feed's order, none left out twice"
    assert {len(batch) for batch in batches} == {4}
    nothing = ManifestFeed(utterances[::3], EpochSampler(3, seed=2))
    with pytest.raises(
        ValueError, match="teacher.gate_max_wer: the teacher gets all 3 utterances of data.train_manifest"
    ):
        gate.fill(nothing, 2)
