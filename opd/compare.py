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
from opd.text import scored_language

EQUAL_CPU = "-equal-cpu"
REPLICATIONS = 10_000
LEVEL = 95.0  # of the intervals, %
_FORMS: dict[str, tuple[type, str]] = {  # key of `compare` -> its type, and what an error says of it
    "seeds": (list, "a list of whole numbers, such as [0, 1, 2]"),
    "eval_set": (str, "the name of a set of data.eval_manifests"),
    "base_arm": (str, "the name of an arm, such as opd"),
    "equal_cpu": (list, "a list of arms, such as [more_sft]"),
    "arms": (dict, "a mapping of arms to what differs, such as {more_sft: {stage: sft}, opd: {}}"),
    "settings": (dict, "a mapping of settings to their change and arms, such as {noisy: {change: {...}, arms: {...}}}"),
}


@dataclass(frozen=True)
class Arm:
    """One run: `name` in `setting` with `seed`."""

    setting: str
    seed: int
    name: str
    config: Config


@dataclass(frozen=True)
class Finished:
    """The config of a run and its summary."""

    config: Config
    summary: dict[str, Any]


def arm_configs(config: Config) -> list[Arm]:
    """All runs of a comparison with their steps as configured. Raises ValueError for what is missing, wrong or unknown."""
    compare = _checked(config)
    base = dataclasses.replace(config, compare={}, stages=[], ladder={})
    arms = []
    settings = _mapping(compare.get("settings"), "compare.settings", "{noisy: {change: {...}}}")
    for setting, values in (settings or {"default": {}}).items():
        form = "{change: {...}, arms: {...}}"
        configs = _setting_configs(base, compare, setting, _mapping(values, f"compare.settings.{setting}", form))
        for seed in compare["seeds"]:
            for name, one in configs.items():
                folder = f"{config.run_dir}/{setting}/seed-{seed}/{name}" if config.run_dir else None
                arms.append(Arm(setting, seed, name, dataclasses.replace(one, seed=seed, run_dir=folder)))
    return arms


def _setting_configs(base: Config, compare: dict[str, Any], setting: str, values: dict[str, Any]) -> dict[str, Config]:
    """Arm -> its config, of the arms that run in a setting."""
    where = f"compare.settings.{setting}"
    if unknown := sorted(values.keys() - {"change", "arms"}):
        raise ValueError(f"{where}: unknown key {unknown[0]}; a setting has change and arms")
    own = _mapping(values.get("arms"), f"{where}.arms", "{opd: {}}") or dict.fromkeys(compare["arms"], {})
    for name in own:
        if name not in compare["arms"]:
            raise ValueError(f"{where}.arms: unknown arm {name}; there are {', '.join(compare['arms'])}")
    if compare["base_arm"] not in own:
        raise ValueError(
            f"{where}.arms: {compare['base_arm']} is missing, the base arm that all others are compared with; add "
            f"{compare['base_arm']}: {{}}"
        )
    changed = derive(base, [_mapping(values.get("change"), f"{where}.change")], f"{where}.change")
    configs = {}
    for name, further in own.items():
        arm, in_setting = f"compare.arms.{name}", f"{where}.arms.{name}"
        one = derive(changed, [_mapping(compare["arms"][name], arm)], arm)
        configs[name] = derive(one, [_mapping(further, in_setting)], in_setting)
        if compare["eval_set"] not in configs[name].data.eval_manifests:
            raise ValueError(
                f"compare.eval_set={compare['eval_set']}: not in data.eval_manifests of arm {name} in setting {setting}, "
                f"which has {', '.join(configs[name].data.eval_manifests) or 'none'}"
            )
    return configs


def _mapping(value: Any, where: str, example: str = "{optim: {lr: 1.0e-4}}") -> dict[str, Any]:
    """A mapping with names as its keys; null is an empty one. Raises ValueError for anything else."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{where}={value}: must be a mapping by name, such as {example}")
    return value


def _checked(config: Config) -> dict[str, Any]:
    compare = config.compare
    if config.stages:
        raise ValueError(
            f"stages={config.stages} and compare are both given: a comparison runs its arms and no stages; leave one out "
            "(stages=[] or compare={})"
        )
    if unknown := sorted(compare.keys() - _FORMS.keys()):
        raise ValueError(f"compare: unknown key {unknown[0]}; keys are {', '.join(_FORMS)}")
    for name, (form, meaning) in _FORMS.items():
        if compare.get(name) is not None and not isinstance(compare[name], form):
            raise ValueError(f"compare.{name}={compare[name]}: must be {meaning}")
    for name in ("seeds", "eval_set", "base_arm", "arms"):
        if not compare.get(name):
            raise ValueError(f"compare.{name} is missing: give {_FORMS[name][1]}")
    _mapping(compare["arms"], "compare.arms", "{opd: {}}")
    seeds = compare["seeds"]
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise ValueError(f"compare.seeds={seeds}: must be {_FORMS['seeds'][1]}")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"compare.seeds={seeds}: a seed stands twice, and would count as two runs; give each once")
    for key, names in (("base_arm", [compare["base_arm"]]), ("equal_cpu", compare.get("equal_cpu") or [])):
        for name in names:
            if name not in list(compare["arms"]):
                raise ValueError(f"compare.{key}: {name} is no arm; there are {', '.join(compare['arms'])}")
    return compare


def run_comparison(config: Config, train: Callable[[Config], dict[str, Any]]) -> dict[str, Any]:
    """Runs all arms; `train` runs one. Writes <run_dir>/summary.json, prints and returns the tables.

    Raises ValueError before the first arm for what a later one could not run with, as far as it is there already.
    """
    from opd.ahead import check_ahead  # what only a run needs; `arm_configs` is asked of every config

    config = with_run_dir(config)
    run_dir = Path(str(config.run_dir))
    check_ahead(config)
    results: dict[str, dict[str, list[Finished]]] = {}
    arms = arm_configs(config)
    for arm in arms:
        _run(arm, train, results)
    compare, base_arm = config.compare, config.compare["base_arm"]
    repeated = [arm for arm in arms if arm.name in (compare.get("equal_cpu") or [])]
    for arm in [_with_equal_cpu(arm, results[arm.setting], base_arm) for arm in repeated]:
        _run(arm, train, results)
    tables = {setting: compare_arms(rows, base_arm, compare["eval_set"]) for setting, rows in results.items()}
    summary = {
        "recipe": config.recipe_name, "seeds": compare["seeds"], "eval_set": compare["eval_set"],
        "base_arm": base_arm, "settings": tables,
    }  # fmt: skip
    atomic_write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    print_comparison(summary)
    print(f"run: {run_dir}")
    return summary


def _run(arm: Arm, train: Callable[[Config], dict[str, Any]], results: dict[str, dict[str, list[Finished]]]) -> None:
    print(f"== {arm.setting}, seed {arm.seed}, {arm.name} ==", flush=True)
    finished = Finished(arm.config, train(arm.config))
    results.setdefault(arm.setting, {}).setdefault(arm.name, []).append(finished)


def _with_equal_cpu(arm: Arm, rows: dict[str, list[Finished]], base_arm: str) -> Arm:
    """The arm with as many steps as the base arm's processor time allows; the median over the seeds, so all have as many.

    Raises ValueError where that is less than one step.
    """
    own = [finished.summary for finished in rows[arm.name]]
    budget = statistics.median(_cpu(finished.summary) for finished in rows[base_arm])
    fixed = statistics.median(_cpu_before_training(row) for row in own)
    per_step = statistics.median((_cpu(row) - _cpu_before_training(row)) / row["steps"] for row in own)
    steps = round((budget - fixed) / per_step)
    if steps < 1:
        raise ValueError(
            f"compare.equal_cpu: in setting {arm.setting}, {arm.name} takes {fixed:.0f} s of processor time before its first "
            f"step and {per_step:.2g} s for each, but {base_arm} takes only {budget:.0f} s in all; take {arm.name} out of "
            "compare.equal_cpu and start again with the same run_dir: what has run is kept"
        )
    name = arm.name + EQUAL_CPU
    change = {"train": {"num_steps": steps}, "run_dir": f"{arm.config.run_dir}{EQUAL_CPU}"}
    return dataclasses.replace(arm, name=name, config=derive(arm.config, [change], name))


def _cpu(summary: dict[str, Any]) -> float:
    return sum(summary["cpu_seconds"].values())


def _cpu_before_training(summary: dict[str, Any]) -> float:
    """Stage td: what the teacher took to transcribe. Kept transcripts of another arm took nothing."""
    return summary["cpu_seconds"]["teacher"] if summary["stage"] == "td" else 0.0


def compare_arms(rows: dict[str, list[Finished]], base_arm: str, eval_set: str) -> list[dict[str, Any]]:
    """One row per arm: mean WER over the seeds, its spread, the difference to the base arm with its interval."""
    errors = {name: _errors(finished, eval_set) for name, finished in rows.items()}
    table = []
    for name, finished in rows.items():
        summaries = [one.summary for one in finished]
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
        if name != base_arm:
            row |= paired_bootstrap(errors[name], errors[base_arm])
        table.append(row)
    return table


def _errors(runs: Sequence[Finished], eval_set: str) -> dict[str, tuple[int, int]]:
    """Utterance id -> (word errors summed over the seeds, reference words times the seeds), by the rules of each run."""
    counts: dict[str, tuple[int, int]] = {}
    for finished in runs:
        summary, config = finished.summary, finished.config
        run_dir = Path(summary["export_dir"]).parent
        lines = (run_dir / f"transcripts-{eval_set}.jsonl").read_text(encoding="utf-8").split("\n")
        texts = {row["id"]: row["pred_text"] for row in map(json.loads, filter(None, lines))}
        manifest, default = summary["eval_manifests"][eval_set], config.data.default_language
        for utterance in open_manifest(manifest, require_text=True, default_language=default):
            if utterance.id in texts:
                language = scored_language(utterance.language)
                one = utterance_errors(str(utterance.text), texts[utterance.id], language, config.eval.normaliser)
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
