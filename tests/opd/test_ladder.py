"""A ladder as the configs of its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.manifest import write_manifest
from opd.config import load_config
from opd.ladder import run_ladder, stage_configs
from opd.types import Utterance

LADDER = [
    "recipe=tiny", "stages=[teacher, sft, td, opd, opd_alone]", "run_dir=/runs/x", "optim.lr=2e-3",
    "ladder.teacher={stage: sft, student: {init: {vocab_size: 300}}, train: {num_steps: 9}, loss: {ctc_weight: 0.5}}",
    "ladder.sft={data: {train_manifest: few.jsonl}, student: {path: seeds/tiny_student}}",
    "ladder.td={teacher: {path: 'stage:teacher'}}",
    "ladder.opd_alone={stage: opd, student: {path: 'stage:sft'}, teacher: {gate_max_wer: 0.3}}",
]  # fmt: skip


def test_each_stage_starts_from_the_one_before_unless_it_says_otherwise() -> None:
    stages = dict(stage_configs(load_config(LADDER)))
    assert list(stages) == ["teacher", "sft", "td", "opd", "opd_alone"]
    assert [stage.stage for stage in stages.values()] == ["sft", "sft", "td", "opd", "opd"]
    starts = [stage.student.path for stage in stages.values()]
    assert starts == [None, "seeds/tiny_student", "stage:sft", "stage:td", "stage:sft"]
    assert stages["teacher"].student.init == {"vocab_size": 300}
    assert all(not stages[name].student.init for name in list(stages)[1:])
    assert stages["td"].run_dir == "/runs/x/td"
    assert stages["td"].teacher.path == "stage:teacher"
    assert stages["opd"].teacher.path == "seeds/tiny_teacher"
    assert (stages["teacher"].train.num_steps, stages["sft"].train.num_steps) == (9, 400)
    assert (stages["teacher"].loss.ctc_weight, stages["opd"].loss.ctc_weight) == (0.5, 0.0)
    assert (stages["opd_alone"].teacher.gate_max_wer, stages["opd"].teacher.gate_max_wer) == (0.3, None)
    assert all(stage.optim.lr == pytest.approx(2e-3) for stage in stages.values())
    assert [name for name, _ in stage_configs(load_config([*LADDER, "stages=[sft, opd]"]))] == ["sft", "opd"]
    assert all(not stage.stages and not stage.ladder for stage in stages.values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages=[sft, sft]", "a name stands twice"),
        ("stages=[first]", "first is no kind of stage; set ladder.first.stage"),
        ("ladder.odp.optim.lr=1", "ladder.odp: there is no such stage; stages are td, opd"),
        ("ladder.opd.optim.lrr=1", "ladder.opd: unknown key optim.lrr; did you mean optim.lr"),
        ("ladder.opd.optim.lr=0", "optim.lr=0.*above 0"),
        ("ladder.opd.teacher.path=null", "teacher.path is missing: stage opd needs a teacher"),
        ("ladder.opd=fast", "ladder.opd: must be a mapping"),
        ("ladder.opd=[]", "ladder.opd: must be a mapping"),
        ("ladder.opd.student=3", "ladder.opd: student is a section; write its keys below it"),
    ],
)
def test_a_ladder_that_cannot_run_is_refused_at_once(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(["recipe=tiny", "stages=[td, opd]", override])


def ladder_of(folder: Path) -> list[str]:
    """SFT, TD and OPD on manifests whose lines are all that is looked at before training."""
    labelled = [Utterance(f"u{i}", f"{i}.wav", "one two", "English") for i in range(3)]
    write_manifest(folder / "labelled.jsonl", labelled)
    write_manifest(folder / "audio.jsonl", [Utterance(u.id, u.audio, None, u.language) for u in labelled])
    return [
        "recipe=tiny", "stages=[sft, td, opd]", f"run_dir={folder / 'run'}",
        f"data.train_manifest={folder / 'audio.jsonl'}", f"ladder.sft.data.train_manifest={folder / 'labelled.jsonl'}",
        f"data.eval_manifests={{held_out: {folder / 'labelled.jsonl'}}}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "ladder.opd.teacher.python_path=no/python",
            "stage opd: teacher.python_path=no/python: there is no such interp",
        ),
        ("ladder.opd.teacher.path=nowhere", "stage opd: teacher.path=nowhere: there is no such folder"),
        (
            "ladder.opd.teacher.routes={a: {path: nowhere}}",
            "stage opd: teacher.routes.a.path=nowhere: there is no such",
        ),
        ("ladder.opd.student.path=stage:last", "stage opd: student.path=stage:last: .* must come before this one"),
        ("ladder.opd.data.train_manifest=no.jsonl", "stage opd: manifest no.jsonl cannot be read"),
        (
            "ladder.opd.data.train_manifest=stage:sft",
            "stage opd: data.train_manifest=stage:sft: that run has stage: sft",
        ),
        (
            "ladder.opd.data.eval_manifests={a: FOLDER/audio.jsonl}",
            "stage opd: .*audio.jsonl:1: this set needs a transcript",
        ),
        ("ladder.opd.teacher.routes={de: {match: {language: de}}}", "stage opd: utterance 'u0' .* has no teacher"),
        ("ladder.td.teacher.routes={de: {match: {language: de}}}", "stage td: utterance 'u0' .* has no teacher"),
    ],
)
def test_what_a_later_stage_cannot_run_with_is_refused_before_the_first(
    override: str, message: str, tmp_path: Path
) -> None:
    begun = []
    config = load_config([*ladder_of(tmp_path), override.replace("FOLDER", str(tmp_path))])
    with pytest.raises(ValueError, match=message):
        run_ladder(config, lambda stage: begun.append(stage) or {})
    assert begun == []


@pytest.mark.parametrize("teacher", ["path=stage:sft", "routes={a: {match: {task: asr}, path: 'stage:sft'}, rest: {}}"])
def test_what_an_earlier_stage_makes_is_not_asked_for_before_it(teacher: str, tmp_path: Path) -> None:
    begun = []

    def train(stage: Any) -> dict[str, Any]:
        begun.append(stage.stage)
        Path(stage.run_dir).mkdir(parents=True)
        return {"stage": stage.stage, "steps": 1, "eval": {}, "seconds": {"total": 1.0}}

    made = ["ladder.opd.data.train_manifest=stage:td", f"ladder.opd.teacher.{teacher}"]
    run_ladder(load_config([*ladder_of(tmp_path), *made]), train)
    assert begun == ["sft", "td", "opd"]
