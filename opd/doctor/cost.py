"""What a run will take: its memory, by arithmetic and as measured, and its time, from a step by the clock."""

from __future__ import annotations

import time

import psutil
import torch

from opd.doctor.examined import GB, Examined
from opd.doctor.report import Finding
from opd.memory import estimate, peak

TELL_MEMORY_ABOVE = 0.9
PROCESS = 1.0 * GB  # a Python process with torch and verl, on a host
SMALLER = "lower train.micro_batch_size, eval.batch_size or data.max_seconds; or use fewer workers on a node"


def check_expected_memory(examined: Examined) -> Finding | str:
    """The most that a run can need, on the longest audio that it allows (opd.memory), beside what there is."""
    config = examined.config
    if config.engine != "fsdp2":
        return Finding(
            "warning", f"there is no estimate for engine={config.engine}",
            "look at the measured memory below; python -m opd.memory with engine=fsdp2 says how much a rank holds there",
        )  # fmt: skip
    try:
        found = estimate(config)
    except ValueError as error:
        return Finding("warning", f"not known before it runs: {error}", "see the measured memory below")
    student, teachers = peak(found.student), {name: peak(phases) for name, phases in found.teachers.items()}
    said = f"at most {student / GB:.2f} GB of tensors a student rank"
    said += "".join(
        f", {size / GB:.2f} GB a teacher worker{' ' + name if name else ''}" for name, size in teachers.items()
    )
    if config.cluster.use_gpu:
        needed, kind = found.per_gpu, "GPU"
        have = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    else:
        count = config.num_teachers if teachers else 0
        workers = config.num_ranks * (student + PROCESS) + count * (max(teachers.values(), default=0.0) + PROCESS)
        needed, kind, have = workers / config.cluster.num_nodes, "node", psutil.virtual_memory().total
    said += f"; {needed / GB:.1f} GB on a {kind}"
    if have is None:
        return f"{said} (there is none here to compare with)"
    said += f" of {have / GB:.1f} GB"
    return Finding("warning", said, SMALLER) if needed > TELL_MEMORY_ABOVE * have else said


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
    return Finding("warning", said, SMALLER) if used > TELL_MEMORY_ABOVE else said
