"""What a run will take: its time, from a step by the clock, and its memory."""

from __future__ import annotations

import time

import psutil

from opd.doctor.report import Finding
from opd.doctor.static import GB, Examined

TELL_MEMORY_ABOVE = 0.9


def check_time(examined: Examined) -> str:
    """Seconds of a step and of the run, from the step by the clock."""
    live, config = examined.live, examined.config
    scale = config.train.batch_size / len(live.batch)
    parts = {name: live.seconds[name] * scale for name in ("rollout", "teacher", "update") if name in live.seconds}
    step = sum(parts.values())
    listed = ", ".join(f"{name} {seconds:.3g}" for name, seconds in parts.items())
    utterances = sum(map(len, examined.eval_sets.values()))
    evaluation, before = 0.0, 0.0
    if utterances:
        part = live.batch[: config.eval.batch_size]
        began = time.perf_counter()
        live.student.transcribe(part)
        middle = time.perf_counter()
        evaluation = (middle - began) / len(part) * utterances
        if config.stage == "opd" and config.eval.teacher:
            live.teacher.transcribe(part)
            before = (time.perf_counter() - middle) / len(part) * utterances
    count = 2 + (config.train.num_steps // config.eval.eval_every if config.eval.eval_every else 0)
    total = config.train.num_steps * step + count * evaluation + before + live.seconds.get("start", 0.0)
    said = f"{step:.3g} s a step of {config.train.batch_size} utterances ({listed})"
    if scale != 1:
        said += f", from one of {len(live.batch)}"
    return (
        f"{said}; {config.train.num_steps} steps, {count} evaluations of {utterances} utterances and the start: about "
        f"{duration(total)}, without checkpoints"
    )


def duration(seconds: float) -> str:
    """For people."""
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def check_memory(examined: Examined) -> Finding | str:
    """The most that the workers have taken so far, beside what their machines have."""
    live, config = examined.live, examined.config
    peaks = {"student rank": live.student.peak_memory()}
    if examined.with_teacher and live.teacher is not None:
        peaks["teacher worker"] = live.teacher.peak_memory()
    kind = "device" if config.cluster.use_gpu else "host"
    said = ", ".join(f"{max(p[kind] for p in found) / GB:.2f} GB a {name}" for name, found in peaks.items())
    longest = max(examined.seconds)
    said += f" at most, on audio of up to {longest:.1f} s (data.max_seconds={config.data.max_seconds:g})"
    fix = "lower train.micro_batch_size, eval.batch_size or data.max_seconds; or use fewer workers on a node"
    if kind == "device":
        all_peaks = [p for found in peaks.values() for p in found]
        used = max(1 - p["free"] / p["total"] for p in all_peaks)
        said += f"; the fullest GPU is at {used:.0%} of {max(p['total'] for p in all_peaks) / GB:.0f} GB"
    else:
        # The nodes are taken to be like this one, and the workers to be spread evenly.
        total = sum(p["host"] for found in peaks.values() for p in found) / config.cluster.num_nodes
        memory = psutil.virtual_memory().total
        used = total / memory
        said += f"; {total / GB:.1f} of {memory / GB:.1f} GB on a node"
    return Finding("warning", said, fix) if used > TELL_MEMORY_ABOVE else said
