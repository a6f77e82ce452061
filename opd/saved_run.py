"""A run directory as an export reads it, without its lock: config, an undamaged checkpoint, what was measured with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.checkpoint import RunDir
from opd.checkpoint_files import damage
from opd.resolve import absolute
from opd.saved_config import CONFIG_FILE, load_saved_config, with_defaults
from opd.schema import Config


def saved_config(run_dir: Path) -> dict[str, Any]:
    """The run's config with absolute paths. Raises ValueError where there is no run, or its config.yaml cannot be read."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"run_dir={run_dir}: there is no run here (no {CONFIG_FILE})")
    defaults = Config().to_dict()
    config = with_defaults(load_saved_config(path), defaults)
    for name, default in defaults.items():
        if isinstance(default, dict) and not isinstance(config[name], dict):
            raise ValueError(f"{path}: {name} is a section, not {config[name]!r}; restore it from a checkpoint's copy")
    return absolute(config)


def choose_step(run_dir: Path, config: dict[str, Any], step: int | None) -> int:
    """The step to export: `step`, or that of the newest undamaged checkpoint. Every file of it is read and checked.

    Damaged checkpoints that are passed over are warned of. Raises ValueError where `step` is not there or damaged, and
    where there is no undamaged one.
    """
    run = RunDir(run_dir, config, keep_last=1, lock_fd=None)
    if step is None:
        newest = run.latest()
        if newest is None:
            raise ValueError(f"run_dir={run_dir}: there is no complete checkpoint; start the run again to make one")
        return newest
    path = run.checkpoint_path(step)
    if not path.is_dir():
        there = run.complete_steps()
        raise ValueError(f"run_dir={run_dir}: no complete checkpoint of step {step}; there are {there or 'none'}")
    if problem := damage(path, contents=True):
        raise ValueError(
            f"step={step}: {path} is damaged: {problem}; restore it, name another step, or leave step= out to export "
            "the newest undamaged one"
        )
    return step


def run_facts(run_dir: Path, config: Mapping[str, Any], step: int, run_dtype: str) -> dict[str, Any]:
    """What the run directory tells of a checkpoint, with the evaluation of this very step if there was one.

    run_dtype   what the run rounds its own export to, and evaluates at its end; config.export.dtype is that of this export
    """
    facts: dict[str, Any] = {"recipe": Path(config["recipe"]).stem, "stage": config["stage"], "step": step}
    summary, dtype = _summary(run_dir / "summary.json"), config["export"]["dtype"]
    facts["languages"] = summary.get("languages")
    if summary and step == summary.get("exported_step", summary["steps"]):
        facts["eval"] = summary["eval"]
        if dtype != run_dtype:
            facts["evaluated_weights"] = f"rounded to {run_dtype}, these are in {dtype}"
    elif evaluation := _evaluation_within(run_dir, config, step):
        facts["eval"] = evaluation
        if dtype != "float32":
            facts["evaluated_weights"] = f"float32, not yet rounded to {dtype}"
    return facts


def _summary(path: Path) -> dict[str, Any]:
    """summary.json, empty for a run that has not come to its end."""
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        problem = None if isinstance(summary["eval"], dict) and "steps" in summary else "steps or eval is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise ValueError(
            f"{path}: the run's results cannot be read ({problem}); remove this file to export without them, or remove "
            "it and start the run again with the same command, which measures them anew"
        )
    return summary


def _evaluation_within(run_dir: Path, config: Mapping[str, Any], step: int) -> dict[str, Any]:
    """{set: results} of an evaluation between the steps.

    The evaluation after the end is not one of them: metrics.jsonl has it under the last step, although it is that of
    the exported checkpoint, which may be an earlier one. Where both are under one step, it comes second.
    """
    every = config["eval"]["eval_every"]
    if not every or step % every or step == config["train"]["num_steps"]:
        return {}
    after: dict[str, dict[str, Any]] = {}
    for values in _metrics(run_dir / "metrics.jsonl"):
        names = [key.removeprefix("eval/wer/") for key in values if key.startswith("eval/wer/")]
        if values.get("step") == step:
            for name in names:
                rates = {key: values[f"eval/{key}/{name}"] for key in ("wer", "cer", "num_utterances")}
                after.setdefault(name, rates)
    loop_state = run_dir / "checkpoints" / f"step-{step:06d}" / "loop_state.json"
    state = json.loads(loop_state.read_text(encoding="utf-8"))
    before, teacher = state.get("eval_before") or {}, state.get("eval_teacher") or {}
    return {
        name: {
            "before": before.get(name),
            # The normaliser is not in metrics.jsonl; it is the same all through a run.
            "after": {**rates, "normaliser": (before.get(name) or {}).get("normaliser")},
            "teacher": teacher.get(name),
        }
        for name, rates in after.items()
        if None not in rates.values()  # a rate that is not finite, on a set without words
    }


def _metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; the last one may be half written."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if line.endswith("}"):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(
                    f"{path}:{number}: no JSON ({error}); remove this line, or export the run's last step"
                ) from error
    return rows
