"""A ladder as the configs of its stages."""

from __future__ import annotations

import pytest
from main_job import last_of_each

from opd.config import load_config
from opd.ladder import stage_configs

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
    assert [name for name, _ in stage_configs(load_config(last_of_each([*LADDER, "stages=[sft, opd]"])))] == [
        "sft",
        "opd",
    ]
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
    ],
)
def test_a_ladder_that_cannot_run_is_refused_at_once(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(last_of_each(["recipe=tiny", "stages=[td, opd]", override]))
