"""The batches of a run: what is handed out, what is read ahead, and where a checkpoint goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.feed import ManifestFeed
from data.sampler import EpochSampler
from opd.batches import Batches, BatchLog
from opd.config import load_config
from opd.gate import TeacherGate
from opd.schedule import RolloutLine
from opd.types import Batch, TeacherTranscript, Utterance

UTTERANCES = [
    Utterance(f"u{i}", "x.wav", "one", "English", extra={"heard": "one" if i % 3 else "two"}) for i in range(9)
]


class Done:
    """Scores that are there."""

    def wait(self) -> tuple[list, float]:
        return [], 1.0


def transcribe(utterances: Batch) -> list[TeacherTranscript]:
    return [TeacherTranscript(u.extra["heard"], -0.1, 3, True, False) for u in utterances]


def new_feed(state: dict | None = None) -> ManifestFeed:
    feed = ManifestFeed(UTTERANCES, EpochSampler(len(UTTERANCES), seed=2))
    if state is not None:
        feed.load_state_dict(state)
    return feed


def new_batches(path: Path, feed: ManifestFeed, with_gate: bool, read: list[Batch], *overrides: str) -> Batches:
    config = load_config(
        ["recipe=tiny", "train.batch_size=4", "train.micro_batch_size=2", "train.num_steps=7", *overrides]
    )
    gate = TeacherGate(lambda _: 0.0, transcribe, "opd-basic-1") if with_gate else None
    return Batches(config, feed, gate, read.append, BatchLog(path, 0, is_on=False))


@pytest.mark.parametrize("with_gate", [False, True])
def test_the_audio_of_the_next_batch_is_read_ahead(tmp_path: Path, with_gate: bool) -> None:
    read: list[Batch] = []
    batches = new_batches(tmp_path / "log", new_feed(), with_gate, read, "data.group_by_length=false")
    handed_out = [batches.next() for _ in range(7)]
    expected = [u for u in new_feed().next_batch(70) if u.extra["heard"] == "one" or not with_gate][:28]
    assert [u for batch in handed_out for u in batch] == expected
    assert read[:6] == handed_out[1:], "each batch but the first was read before it was asked for"
    assert len(read) == (6 if with_gate else 7), "a gate asks the teacher about no batch that nobody trains on"


@pytest.mark.parametrize("schedule", ["sync", "one_step_off"])
@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("stopped", [1, 3])
def test_a_run_that_was_stopped_anywhere_trains_on_what_the_whole_run_does(
    tmp_path: Path, schedule: str, with_gate: bool, stopped: int
) -> None:
    """What was drawn but not trained when the run was stopped, in line or behind the gate, is not lost."""
    config = load_config(
        ["recipe=tiny", f"schedule={schedule}", "train.num_steps=7", "checkpoint.checkpoint_every=100"]
    )

    def train(first: int, last: int, feed: ManifestFeed) -> tuple[list[Batch], dict]:
        batches, line, trained = new_batches(tmp_path / "log", feed, with_gate, []), RolloutLine(config), []
        for step in range(first, last + 1):
            while line.wants_rollout(step):
                line.add(step, batches.next(), None, Done())
            trained.append(line.take(step).batch)
        return trained, batches.state_dict(is_waiting=not line.is_empty)

    whole, _ = train(1, 7, new_feed())
    before, state = train(1, stopped, new_feed())
    after, _ = train(stopped + 1, 7, new_feed(state))
    assert before + after == whole


def test_logged_batches_go_on_where_the_checkpoint_was(tmp_path: Path) -> None:
    path = tmp_path / "batches.jsonl"
    batches = [[Utterance(id=f"é{step}{i}", audio="a.wav") for i in range(2)] for step in range(1, 5)]
    log = BatchLog(path, 0, is_on=True)
    for batch in batches:
        log.add(batch)
    with open(path, "a") as file:
        file.write('{"step": 5, "ids": ["cut sh')
    log = BatchLog(path, 2, is_on=True)
    log.add(batches[3])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [
        {"step": 1, "ids": ["é10", "é11"]}, {"step": 2, "ids": ["é20", "é21"]}, {"step": 3, "ids": ["é40", "é41"]},
    ]  # fmt: skip
    BatchLog(tmp_path / "off.jsonl", 0, is_on=False).add(batches[0])
    assert not (tmp_path / "off.jsonl").exists()
