"""Which utterances a teacher gate lets pass."""

from __future__ import annotations

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
    gate = TeacherGate(0.5, transcribe, "opd-basic-1")
    kept = gate.accept([unlabelled, *utterances])
    assert [u.id for u in kept] == ["unlabelled", "right", "near", "silent"]
    assert [u.id for u in gate.accept([*utterances, unlabelled])] == ["right", "near", "silent", "unlabelled"]
    assert asked == [["right", "near", "wrong", "silent"]], "each utterance is transcribed once"
    assert (gate.num_checked, gate.num_left_out) == (4, 1)
    assert [u.id for u in TeacherGate(0.0, transcribe, "opd-basic-1").accept(utterances[:3])] == ["right"]
