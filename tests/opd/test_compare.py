"""Comparisons: which runs they stand for, and the numbers that are told of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from main_job import last_of_each

from data.manifest import write_manifest
from opd.compare import arm_configs, compare_arms, paired_bootstrap, run_comparison
from opd.config import load_config
from opd.types import Utterance

COMPARE = [
    "recipe=tiny", "run_dir=/runs/c",
    "compare.seeds=[0, 1]", "compare.eval_set=unseen_voices", "compare.base_arm=opd", "compare.equal_cpu=[more_sft]",
    "compare.arms={more_sft: {stage: sft, data: {train_manifest: few.jsonl}}, opd: {}, paper: {loss: {renormalize: true}}}",
]  # fmt: skip


def test_arms_are_runs_from_one_start() -> None:
    settings = "compare.settings={clean: {}, noisy: {change: {optim: {lr: 0.5}}, arms: {opd: {loss: {top_k: 4}}}}}"
    arms = arm_configs(load_config(last_of_each([*COMPARE, settings])))
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
        ("compare.base_arm=other", "other is no arm; there are more_sft, opd, paper"),
        ("compare.eval_set=other", "compare.eval_set=other: not in data.eval_manifests"),
        ("compare.colour=red", "compare: unknown key colour"),
        ("compare.settings={a: {arms: {x: {}}}}", "unknown arm x"),
        ("compare.settings={a: {speed: 1}}", "unknown key speed; a setting has change and arms"),
        ("compare.arms.opd={optim: {lr: 0}}", "optim.lr=0"),
    ],
)
def test_a_comparison_that_cannot_run_is_refused_at_once(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(last_of_each([*COMPARE, override]))


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
    rows = {
        "a": [
            summary_of(tmp_path / "a0", ["one two"] * 3, manifest, 4.0, 10),
            summary_of(tmp_path / "a1", ["one", "one two", "one two"], manifest, 6.0, 10),
        ],
        "base": [summary_of(tmp_path / f"b{i}", ["one", "one", "one two"], manifest, 9.0, 10) for i in range(2)],
    }
    table = {row["arm"]: row for row in compare_arms(rows, "base", "unseen_voices", "opd-basic-1")}
    assert table["a"]["wer_mean"] == pytest.approx(1 / 12)
    assert table["a"]["wer_sd"] == pytest.approx(np.std([0, 1 / 6], ddof=1))
    assert table["a"]["difference"] == pytest.approx((1 - 4) / 12)
    assert table["a"]["cpu_seconds"] == 6.0
    assert "difference" not in table["base"]


def test_equal_cpu_gives_an_arm_the_steps_that_the_base_arm_s_time_allows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "eval.jsonl"
    write_manifest(manifest, [Utterance(f"u{i}", f"{i}.wav", "one two", "English") for i in range(3)])
    asked = []

    def train(config) -> dict:
        asked.append((Path(config.run_dir).name, config.seed, config.train.num_steps))
        cpu = {"more_sft": 3.0, "opd": 9.0}.get(Path(config.run_dir).name, 7.0)
        return summary_of(Path(config.run_dir), ["one two"] * 3, manifest, cpu, config.train.num_steps)

    arms = "compare.arms={more_sft: {stage: sft, data: {train_manifest: few.jsonl}}, opd: {}}"
    summary = run_comparison(
        load_config(last_of_each([*COMPARE, arms, f"run_dir={tmp_path / 'run'}", "train.num_steps=100"])), train
    )
    assert asked[:4] == [("more_sft", 0, 100), ("opd", 0, 100), ("more_sft", 1, 100), ("opd", 1, 100)]
    # 10 s of student and teacher against 4 s for a hundred steps.
    assert asked[4:] == [("more_sft-equal-cpu", 0, 250), ("more_sft-equal-cpu", 1, 250)]
    assert [row["arm"] for row in summary["settings"]["default"]] == ["more_sft", "opd", "more_sft-equal-cpu"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["settings"] == summary["settings"]
    assert "more_sft-equal-cpu" in capsys.readouterr().out
