"""Comparisons: which runs they stand for, and the numbers that are told of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data.manifest import write_manifest
from opd.compare import Finished, arm_configs, compare_arms, paired_bootstrap, run_comparison
from opd.config import config_from_dict, load_config
from opd.types import Utterance

COMPARE = [
    "recipe=tiny", "run_dir=/runs/c",
    "compare.seeds=[0, 1]", "compare.eval_set=unseen_voices", "compare.base_arm=opd", "compare.equal_cpu=[more_sft]",
    "compare.arms={more_sft: {stage: sft, data: {train_manifest: few.jsonl}}, opd: {}, paper: {loss: {renormalize: true}}}",
]  # fmt: skip


def test_arms_are_runs_from_one_start() -> None:
    settings = "compare.settings={clean: {}, noisy: {change: {optim: {lr: 0.5}}, arms: {opd: {loss: {top_k: 4}}}}}"
    arms = arm_configs(load_config([*COMPARE, settings]))
    names = [(arm.setting, arm.seed, arm.name) for arm in arms]
    clean = [("clean", seed, name) for seed in (0, 1) for name in ("more_sft", "opd", "paper")]
    assert names == [*clean, ("noisy", 0, "opd"), ("noisy", 1, "opd")]
    assert {arm.config.student.path for arm in arms} == {"seeds/tiny_student"}
    assert [arm.config.seed for arm in arms] == [arm.seed for arm in arms]
    assert arms[0].config.run_dir == "/runs/c/clean/seed-0/more_sft"
    assert (arms[0].config.stage, arms[0].config.data.train_manifest) == ("sft", "few.jsonl")
    assert [arm.config.loss.renormalize for arm in arms[:3]] == [False, False, True]
    assert (arms[-1].config.optim.lr, arms[-1].config.loss.top_k) == (0.5, 4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("compare.seeds=[]", "compare.seeds is missing"),
        ("compare.seeds=3", r"compare.seeds=3: must be a list of whole numbers, such as \[0, 1, 2\]"),
        ("compare.seeds=[true]", r"compare.seeds=\[True\]: must be a list of whole numbers"),
        ("compare.seeds=[0, 0]", r"compare.seeds=\[0, 0\]: a seed stands twice"),
        ("compare.base_arm=other", "compare.base_arm: other is no arm; there are more_sft, opd, paper"),
        ("compare.base_arm=[opd]", r"compare.base_arm=\['opd'\]: must be the name of an arm, such as opd"),
        ("compare.eval_set=[a]", "compare.eval_set=.*: must be the name of a set of data.eval_manifests"),
        ("compare.equal_cpu=true", r"compare.equal_cpu=True: must be a list of arms, such as \[more_sft\]"),
        ("compare.equal_cpu=more_sft", r"compare.equal_cpu=more_sft: must be a list of arms"),
        ("compare.equal_cpu=[[opd]]", "compare.equal_cpu: .*opd.* is no arm"),
        ("compare.arms=[more_sft, opd]", "compare.arms=.*: must be a mapping of arms to what differs, such as"),
        ("compare.arms.opd=5", "compare.arms.opd=5: must be a mapping"),
        ("compare.arms.opd=false", "compare.arms.opd=False: must be a mapping"),
        ("compare.settings=[a]", r"compare.settings=\['a'\]: must be a mapping of settings"),
        ("compare.settings={a: 5}", "compare.settings.a=5: must be a mapping"),
        ("compare.settings={a: {arms: [opd]}}", r"compare.settings.a.arms=\['opd'\]: must be a mapping"),
        ("compare.settings={a: {arms: {opd: 5}}}", "compare.settings.a.arms.opd=5: must be a mapping"),
        ("compare.settings={a: {change: 5}}", "compare.settings.a.change=5: must be a mapping"),
        ("compare.settings={a: {change: {optim: {lrr: 1}}}}", "compare.settings.a.change: unknown key optim.lrr"),
        ("compare.settings={a: {arms: {more_sft: {}}}}", "compare.settings.a.arms: opd is missing, the base arm"),
        (
            "compare.settings={a: {change: {data: {eval_manifests: {b: b.jsonl}}}}}",
            "compare.eval_set=unseen_voices: not in data.eval_manifests of arm more_sft in setting a, which has b",
        ),
        ("stages=[sft, opd]", r"stages=.* and compare are both given: .*\(stages=\[\] or compare={}\)"),
        ("compare.eval_set=other", "compare.eval_set=other: not in data.eval_manifests"),
        ("compare.colour=red", "compare: unknown key colour"),
        ("compare.settings={a: {arms: {x: {}}}}", "unknown arm x"),
        ("compare.settings={a: {speed: 1}}", "unknown key speed; a setting has change and arms"),
        ("compare.arms.opd={optim: {lr: 0}}", "optim.lr=0"),
    ],
)
def test_a_comparison_that_cannot_run_is_refused_at_once(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config([*COMPARE, override])


def test_the_interval_is_that_of_the_difference() -> None:
    """Against the normal approximation, on independent utterances of ten words each."""
    generator = np.random.default_rng(1)
    base = {str(i): (int(errors), 10) for i, errors in enumerate(generator.binomial(10, 0.2, 2000))}
    better = {str(i): (int(errors), 10) for i, errors in enumerate(generator.binomial(10, 0.15, 2000))}
    found = paired_bootstrap(better, base)
    errors_N2 = np.array([[better[i][0], base[i][0]] for i in base]) / 10
    differences_N = errors_N2[:, 0] - errors_N2[:, 1]
    half_width = 1.96 * differences_N.std() / np.sqrt(len(differences_N))
    assert found["difference"] == pytest.approx(differences_N.mean())
    assert found["interval"] == pytest.approx(
        [differences_N.mean() - half_width, differences_N.mean() + half_width], abs=6e-4
    )
    assert found["probability"] == 1.0
    equal = paired_bootstrap(base, base)
    assert (equal["difference"], equal["interval"]) == (0.0, [0.0, 0.0])


def summary_of(folder: Path, texts: list[str], manifest: Path, cpu: float, steps: int) -> dict:
    folder.mkdir(parents=True)
    rows = [{"id": f"u{i}", "pred_text": text} for i, text in enumerate(texts)]
    (folder / "transcripts-unseen_voices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wrong = sum(text != "one two" for text in texts)
    rates = {"before": {"wer": 0.4}, "after": {"wer": wrong / 2 / len(texts)}}
    return {
        "stage": "opd", "steps": steps, "seconds": {"total": 9.0}, "cpu_seconds": {"student": cpu, "teacher": 1.0},
        "eval": {"unseen_voices": rates}, "eval_manifests": {"unseen_voices": str(manifest)},
        "export_dir": str(folder / "export"),
    }  # fmt: skip


def test_the_table_counts_errors_over_the_seeds(tmp_path: Path) -> None:
    manifest = tmp_path / "eval.jsonl"
    write_manifest(manifest, [Utterance(f"u{i}", f"{i}.wav", "one two", "English") for i in range(3)])
    summaries = {
        "a": [
            summary_of(tmp_path / "a0", ["one two"] * 3, manifest, 4.0, 10),
            summary_of(tmp_path / "a1", ["one", "one two", "one two"], manifest, 6.0, 10),
        ],
        "base": [summary_of(tmp_path / f"b{i}", ["one", "one", "one two"], manifest, 9.0, 10) for i in range(2)],
    }
    config = config_from_dict({"recipe": "none", "eval": {"normaliser": "opd-basic-1"}})
    rows = {name: [Finished(config, summary) for summary in of_arm] for name, of_arm in summaries.items()}
    table = {row["arm"]: row for row in compare_arms(rows, "base", "unseen_voices")}
    assert table["a"]["wer_mean"] == pytest.approx(1 / 12)
    assert table["a"]["wer_sd"] == pytest.approx(np.std([0, 1 / 6], ddof=1))
    assert table["a"]["difference"] == pytest.approx((1 - 4) / 12)
    assert table["a"]["cpu_seconds"] == 6.0
    assert "difference" not in table["base"]


def test_a_line_without_a_language_is_compared_by_the_rules_of_its_run(tmp_path: Path) -> None:
    manifest = tmp_path / "eval.jsonl"
    write_manifest(manifest, [Utterance("u0", "0.wav", "it is twenty one", None)])
    folders = {name: summary_of(tmp_path / name, [text], manifest, 4.0, 10) for name, text in
               (("a", "it's 21"), ("base", "it is twenty one"))}  # fmt: skip
    for language, wrong in (("English", False), (None, True)):
        config = config_from_dict({"recipe": "none", "data": {"default_language": language}})
        rows = {name: [Finished(config, summary)] for name, summary in folders.items()}
        (row, _) = compare_arms(rows, "base", "unseen_voices")
        assert (row["difference"] > 0) is wrong, "the English rules write both the same way"


def comparison_of(folder: Path) -> list[str]:
    """Two arms on manifests whose lines are all that is looked at before training."""
    labelled = [Utterance(f"u{i}", f"{i}.wav", "one two", "English") for i in range(3)]
    write_manifest(folder / "eval.jsonl", labelled)
    data = "data: {train_manifest: " + str(folder / "eval.jsonl") + "}"
    return [
        *COMPARE, f"compare.arms={{more_sft: {{stage: sft, {data}}}, opd: {{}}}}", f"run_dir={folder / 'run'}",
        f"data.train_manifest={folder / 'eval.jsonl'}", f"data.eval_manifests={{unseen_voices: {folder / 'eval.jsonl'}}}",
        "train.num_steps=100",
    ]  # fmt: skip


def test_what_a_later_arm_cannot_run_with_is_refused_before_the_first(tmp_path: Path) -> None:
    begun = []
    config = load_config([*comparison_of(tmp_path), "compare.arms.opd.teacher.python_path=no/python"])
    with pytest.raises(ValueError, match="setting default, arm opd: teacher.python_path=no/python: there is no such"):
        run_comparison(config, lambda arm: begun.append(arm) or {})
    assert begun == []


def test_equal_cpu_is_refused_where_the_time_allows_no_step(tmp_path: Path) -> None:
    """The base arm's 3 s are less than the 5 s for which a teacher writes the transcripts of stage td."""

    def train(config) -> dict:
        is_td = config.stage == "td"
        summary = summary_of(Path(config.run_dir), ["one two"] * 3, tmp_path / "eval.jsonl", 9.0 if is_td else 2.0, 100)
        return summary | ({"stage": "td", "cpu_seconds": {"student": 9.0, "teacher": 5.0}} if is_td else {})

    arms = ["compare.arms={opd: {}, kd: {stage: td}}", "compare.equal_cpu=[kd]"]
    with pytest.raises(ValueError, match="compare.equal_cpu: in setting default, kd takes 5 s .* opd takes only 3 s"):
        run_comparison(load_config([*comparison_of(tmp_path), *arms]), train)


def test_equal_cpu_gives_an_arm_the_steps_that_the_base_arm_s_time_allows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def train(config) -> dict:
        asked.append((Path(config.run_dir).name, config.seed, config.train.num_steps))
        cpu = {"more_sft": 3.0, "opd": 9.0}.get(Path(config.run_dir).name, 7.0)
        return summary_of(Path(config.run_dir), ["one two"] * 3, tmp_path / "eval.jsonl", cpu, config.train.num_steps)

    summary = run_comparison(load_config(comparison_of(tmp_path)), train)
    assert asked[:4] == [("more_sft", 0, 100), ("opd", 0, 100), ("more_sft", 1, 100), ("opd", 1, 100)]
    # 10 s of student and teacher against 4 s for a hundred steps.
    assert asked[4:] == [("more_sft-equal-cpu", 0, 250), ("more_sft-equal-cpu", 1, 250)]
    assert [row["arm"] for row in summary["settings"]["default"]] == ["more_sft", "opd", "more_sft-equal-cpu"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["settings"] == summary["settings"]
    assert "more_sft-equal-cpu" in capsys.readouterr().out
