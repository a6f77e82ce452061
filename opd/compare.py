"""Arms measured against each other: from the same start, on the same audio, over several seeds, with intervals.

    compare:
      seeds: [0, 1, 2]
      eval_set: unseen_voices         # what the table is about
      base_arm: opd                   # intervals are of the difference to it; its processor time is the budget of all
      equal_cpu: [more_sft]           # arms that also run with as many steps as that time allows
      arms:                           # name -> what differs from the recipe, as section: {key: value}
        more_sft: {stage: sft, data: {train_manifest: "synthetic:labelled"}}
        opd: {}
      settings:                       # optional: name -> what differs for all arms, and which arms run there
        noisy: {change: {data: {...}}, arms: {more_sft: {}, opd: {}}}

Each arm is an ordinary run in `<run_dir>/<setting>/seed-<n>/<arm>`, so a comparison that was interrupted goes on where it
stood; `stage:NAME` is another arm of the same seed and setting. Processor time is that of the student's ranks and the
teacher's workers in training and transcription, evaluation and start apart.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.index import open_manifest
from opd.checkpoint import atomic_write_text
from opd.config import derive
from opd.evaluate import utterance_errors
from opd.resolve import with_run_dir
from opd.schema import Config
from opd.tables import print_comparison

KEYS = ("seeds", "eval_set", "base_arm", "equal_cpu", "arms", "settings")
EQUAL_CPU = "-equal-cpu"
REPLICATIONS = 10_000
LEVEL = 95.0  # of the intervals, %


@dataclass(frozen=True)
class Arm:
    """One run: `name` in `setting` with `seed`."""

    setting: str
    seed: int
    name: str
    config: Config


def arm_configs(config: Config) -> list[Arm]:
    """All runs of a comparison with their steps as configured. Raises ValueError for what is missing or unknown."""
    compare = _checked(config)
    base = dataclasses.replace(config, compare={}, stages=[], ladder={})
    arms = []
    for setting, values in (compare.get("settings") or {"default": {}}).items():
        where = f"compare.settings.{setting}"
        if unknown := sorted((values or {}).keys() - {"change", "arms"}):
            raise ValueError(f"{where}: unknown key {unknown[0]}; a setting has change and arms")
        own = (values or {}).get("arms") or {name: {} for name in compare["arms"]}
        for seed in compare["seeds"]:
            for name, further in own.items():
                if name not in compare["arms"]:
                    raise ValueError(f"{where}.arms: unknown arm {name}; there are {', '.join(compare['arms'])}")
                folder = {"run_dir": f"{config.run_dir}/{setting}/seed-{seed}/{name}"} if config.run_dir else {}
                changes = [
                    (values or {}).get("change") or {}, compare["arms"][name] or {}, further or {}, {"seed": seed}, folder,
                ]  # fmt: skip
                arms.append(Arm(setting, seed, name, derive(base, changes, f"compare.arms.{name}")))
    return arms


def _checked(config: Config) -> dict[str, Any]:
    compare = config.compare
    if unknown := sorted(compare.keys() - set(KEYS)):
        raise ValueError(f"compare: unknown key {unknown[0]}; keys are {', '.join(KEYS)}")
    for name in ("seeds", "eval_set", "base_arm", "arms"):
        if not compare.get(name):
            raise ValueError(f"compare.{name} is missing; opd/compare.py shows the form")
    if not all(isinstance(seed, int) for seed in compare["seeds"]):
        raise ValueError(f"compare.seeds={compare['seeds']}: must be whole numbers")
    for name in (compare["base_arm"], *(compare.get("equal_cpu") or [])):
        if name not in compare["arms"]:
            raise ValueError(f"compare: {name} is no arm; there are {', '.join(compare['arms'])}")
    if compare["eval_set"] not in config.data.eval_manifests:
        raise ValueError(f"compare.eval_set={compare['eval_set']}: not in data.eval_manifests")
    return compare


def run_comparison(config: Config, train: Callable[[Config], dict[str, Any]]) -> dict[str, Any]:
    """Runs all arms; `train` runs one. Writes <run_dir>/summary.json, prints and returns the tables."""
    config = with_run_dir(config)
    run_dir = Path(str(config.run_dir))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for arm in arm_configs(config):
        _run(arm, train, results)
    base_arm = config.compare["base_arm"]
    for arm in arm_configs(config):
        if arm.name in (config.compare.get("equal_cpu") or []) and base_arm in results[arm.setting]:
            _run(_with_equal_cpu(arm, results[arm.setting], base_arm), train, results)
    tables = {
        setting: compare_arms(rows, base_arm, config.compare["eval_set"], config.eval.normaliser)
        for setting, rows in results.items()
    }
    summary = {
        "recipe": config.recipe_name, "seeds": config.compare["seeds"], "eval_set": config.compare["eval_set"],
        "base_arm": base_arm, "settings": tables,
    }  # fmt: skip
    atomic_write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    print_comparison(summary)
    print(f"run: {run_dir}")
    return summary


def _run(arm: Arm, train: Callable[[Config], dict[str, Any]], results: dict) -> None:
    print(f"== {arm.setting}, seed {arm.seed}, {arm.name} ==", flush=True)
    results.setdefault(arm.setting, {}).setdefault(arm.name, []).append(train(arm.config))


def _with_equal_cpu(arm: Arm, rows: dict[str, list[dict[str, Any]]], base_arm: str) -> Arm:
    """The arm with as many steps as the base arm's processor time allows; the median over the seeds, so all have as many."""
    budget = statistics.median(_cpu(row) for row in rows[base_arm])
    fixed = statistics.median(_cpu_before_training(row) for row in rows[arm.name])
    per_step = statistics.median((_cpu(row) - _cpu_before_training(row)) / row["steps"] for row in rows[arm.name])
    steps = max(1, round((budget - fixed) / per_step))
    name = arm.name + EQUAL_CPU
    change = {"train": {"num_steps": steps}, "run_dir": f"{arm.config.run_dir}{EQUAL_CPU}"}
    return dataclasses.replace(arm, name=name, config=derive(arm.config, [change], name))


def _cpu(summary: dict[str, Any]) -> float:
    return sum(summary["cpu_seconds"].values())


def _cpu_before_training(summary: dict[str, Any]) -> float:
    """Stage td: what the teacher took to transcribe. Kept transcripts of another arm took nothing."""
    return summary["cpu_seconds"]["teacher"] if summary["stage"] == "td" else 0.0


def compare_arms(
    rows: dict[str, list[dict[str, Any]]], base_arm: str, eval_set: str, normaliser: str
) -> list[dict[str, Any]]:
    """One row per arm: mean WER over the seeds, its spread, the difference to the base arm with its interval."""
    errors = {name: _errors(summaries, eval_set, normaliser) for name, summaries in rows.items()}
    table = []
    for name, summaries in rows.items():
        wers = [summary["eval"][eval_set]["after"]["wer"] for summary in summaries]
        row: dict[str, Any] = {
            "arm": name,
            "wer_before": summaries[0]["eval"][eval_set]["before"]["wer"],
            "wers": wers,
            "wer_mean": statistics.mean(wers),
            "wer_sd": statistics.stdev(wers) if len(wers) > 1 else None,
            "steps": summaries[0]["steps"],
            "cpu_seconds": statistics.mean(_cpu(summary) for summary in summaries),
            "seconds": statistics.mean(summary["seconds"]["total"] for summary in summaries),
        }
        if name != base_arm and base_arm in errors:
            row |= paired_bootstrap(errors[name], errors[base_arm])
        table.append(row)
    return table


def _errors(summaries: Sequence[dict[str, Any]], eval_set: str, normaliser: str) -> dict[str, tuple[int, int]]:
    """Utterance id -> (word errors summed over the seeds, reference words times the seeds)."""
    counts: dict[str, tuple[int, int]] = {}
    for summary in summaries:
        run_dir = Path(summary["export_dir"]).parent
        lines = (run_dir / f"transcripts-{eval_set}.jsonl").read_text(encoding="utf-8").split("\n")
        texts = {row["id"]: row["pred_text"] for row in map(json.loads, filter(None, lines))}
        for utterance in open_manifest(summary["eval_manifests"][eval_set], require_text=True):
            if utterance.id in texts:
                one = utterance_errors(str(utterance.text), texts[utterance.id], utterance.language, normaliser)
                errors, words = counts.get(utterance.id, (0, 0))
                counts[utterance.id] = (errors + one.wer_errors, words + one.ref_words)
    return counts


def paired_bootstrap(
    arm: dict[str, tuple[int, int]], base: dict[str, tuple[int, int]], *, seed: int = 0
) -> dict[str, Any]:
    """WER of `arm` minus that of `base` and its percentile interval over resampled utterances, the same for both sides.

    Each is utterance id -> (errors, reference words). `probability` is the share of the resamples in which the arm has
    fewer errors than the base (Bisani and Ney, 2004).
    """
    ids = sorted(arm.keys() & base.keys())
    counts_NC = np.array([[arm[i][0] - base[i][0], base[i][1]] for i in ids], dtype=np.float64)
    generator = np.random.default_rng(seed)
    drawn_RN = generator.integers(len(ids), size=(REPLICATIONS, len(ids)))
    sums_RC = counts_NC[drawn_RN].sum(1)
    differences_R = sums_RC[:, 0] / sums_RC[:, 1]
    low, high = np.percentile(differences_R, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return {
        "difference": float(counts_NC[:, 0].sum() / counts_NC[:, 1].sum()),
        "interval": [float(low), float(high)],
        "probability": float((differences_R < 0).mean()),
    }


if __name__ == "__main__":
    print(
        "error: opd.compare is no command; python -m opd.train recipe=tiny_compare runs a comparison", file=sys.stderr
    )
    raise SystemExit(2)
