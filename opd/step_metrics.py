"""Metrics of a step from sums over all ranks: one flat dictionary, keys `group/name`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


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
        "loss/k1": sums["k1"] / positions,
        "loss/k3": sums["k3"] / positions,
        "optim/lr": sums["lr"],
        "optim/grad_norm": sums["grad_norm"],
        "support/vuss": sums["support_size"] / positions,
        "support/overlap": sums["overlap"] / positions,
        "support/student_mass": sums["student_mass"] / positions,
        "support/teacher_mass": sums["teacher_mass"] / positions,
        "support/unmapped_mass": sums["unmapped_mass"] / positions,
        "teacher/entropy": sums["teacher_entropy"] / positions,
        "teacher/eos_at_end": sums["teacher_eos_at_end"] / ends,
        "student/eos_at_end": sums["student_eos_at_end"] / ends,
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
