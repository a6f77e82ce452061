"""What a run writes into its summary.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.run import Run


def summary_of(run: Run, exported_step: int, export_dir: Path, after: dict[str, Any]) -> dict[str, Any]:
    """The summary of a run that has come to its end; `after` is the evaluation of the exported weights by set."""
    config, state = run.config, run.state
    before, teacher = state["eval_before"], state.get("eval_teacher", {})
    evaluation = {
        name: {"before": before.get(name), "after": after[name], **({"teacher": teacher[name]} if teacher else {})}
        for name in after
    }
    summary = {
        "recipe": config.recipe_name, "stage": config.stage, "steps": run.step, "exported_step": exported_step,
        "seed": config.seed,
        "seconds": {name: round(value, 3) for name, value in run.timer.seconds().items()},
        "cpu_seconds": {name: round(value, 2) for name, value in state["cpu_seconds"].items()},
        "start": run.history.get("start"),
        "eval": evaluation,
        "train_manifest": config.data.train_manifest, "train_manifests": config.data.train_manifests,
        "eval_manifests": config.data.eval_manifests,
        "train_texts": run.data.num_texts(),
        "export_dir": str(export_dir),
        "languages": run.evaluate.languages(),
    }  # fmt: skip
    if config.stage == "td":
        summary["teacher_data"] = run.teacher_data.counts()
    if run.gate is not None:
        summary["gate"] = {"checked": run.gate.num_checked, "left_out": run.gate.num_left_out}
    return summary
