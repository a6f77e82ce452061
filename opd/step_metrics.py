"""Metrics of a step from sums over all ranks: one flat dictionary, keys `group/name`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Metric -> sum over the trained positions. Of the renormalised form some are not known: it does not normalise the student
# over the vocabulary.
PER_POSITION = {
    "loss/k1": "k1",
    "loss/k3": "k3",
    "support/vuss": "support_size",
    "support/overlap": "overlap",
    "support/student_mass": "student_mass",
    "support/teacher_mass": "teacher_mass",
    "support/unmapped_mass": "unmapped_mass",
    "teacher/entropy": "teacher_entropy",
}
PER_END = {
    "teacher/eos_at_end": "teacher_eos_at_end",
    "student/eos_at_end": "student_eos_at_end",
}  # at the last position


def opd_metrics(sums: Mapping[str, float], rollout: Mapping[str, int], size: int, coverage: float) -> dict[str, float]:
    """A step of on-policy distillation.

    sums       of the update: loss and diagnostics over the trained positions
    rollout    of the rollout: tokens, forwards and drafted tokens, and utterances by how they ended
    size       utterances of the global batch
    coverage   share of the written positions that the teacher could score
    """
    positions, ends, written = (max(1.0, sums[name]) for name in ("positions", "ends", "written"))
    return {
        "loss/kl": sums["loss"],
        "optim/lr": sums["lr"],
        "optim/grad_norm": sums["grad_norm"],
        **{name: sums[source] / positions for name, source in PER_POSITION.items() if source in sums},
        **{name: sums[source] / ends for name, source in PER_END.items() if source in sums},
        "align/coverage": coverage,
        "align/dropped_share": sums["unaligned"] / written,
        "rollout/loop_dropped_share": sums["in_loops"] / written,
        "rollout/tokens": rollout["tokens"] / size,
        "rollout/forwards": rollout["forwards"] / size,
        "rollout/accept_rate": rollout["accepted"] / max(1, rollout["drafted"]),
        "rollout/finished_share": rollout["finished"] / size,
        "rollout/looped_share": rollout["looped"] / size,
        "rollout/empty_share": rollout["empty"] / size,
    }


def sft_metrics(sums: Mapping[str, Any]) -> dict[str, float]:
    """A step of fine-tuning on texts: cross-entropy per token and, where it is trained, the CTC aid."""
    positions = max(1.0, sums["positions"])
    metrics = {
        "loss/total": sums["loss"],
        "loss/ce": sums["ce"] / positions,
        "train/token_accuracy": sums["correct"] / positions,
        "optim/lr": sums["lr"],
        "optim/grad_norm": sums["grad_norm"],
    }
    if "ctc" in sums:
        metrics["loss/ctc"] = sums["ctc"] / positions
    return metrics


def overhead_seconds(metrics: Mapping[str, float], busy: Sequence[float], schedule: str) -> float:
    """What a step took beyond its workers' own work: calls, waiting in between, the driver.

    busy   seconds that the student's ranks and the teacher's workers were at it; with one_step_off both at the same time
    """
    worked = max(busy) if schedule == "one_step_off" else sum(busy)
    return metrics["time/step"] - metrics.get("time/gate", 0.0) - worked


def start_seconds(since_command: float, totals: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """Where the seconds up to the end of the first step went, evaluation apart: `total` and its parts.

    totals    seconds per phase so far; metrics are those of the first step
    """
    total = since_command - totals.get("eval", 0.0)
    parts = {name: totals[name] for name in ("start_ray", "start_student", "start_teacher") if name in totals}
    parts["first_step"] = sum(metrics.get(f"time/{phase}", 0.0) for phase in ("rollout", "teacher", "update"))
    return {"total": total, **parts, "imports_and_config": total - sum(parts.values())}
