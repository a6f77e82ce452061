"""The cases of bench.gpu in their order. What fails or would begin too late is a row without figures."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch

from bench.gpu_bench import Bench, bandwidth
from bench.gpu_loss import COMPILED, VERL, chunk_cases, loss_cases
from bench.gpu_models import SIZES, with_errors
from bench.gpu_rollout import DRAFT_ERRORS, HF, rollout_cases
from bench.gpu_step import GpuStep
from bench.tables import Row

PLAIN = "plain_step"


def step_cases(bench: Bench) -> list[tuple[Row, str]]:
    if bench.no_graphs:
        raise ValueError(bench.no_graphs)
    size = bench.size
    step = GpuStep(size, bench.device, bench.dtype, master=bench.name != "3b")
    inputs, arguments = bench.inputs(), bench.arguments
    mine, theirs = step.ours(inputs, arguments, None, update=False), step.plain(inputs, arguments, update=False)
    difference = abs(mine - theirs) / abs(theirs)
    if not difference < (1e-4 if bench.dtype == torch.float32 else 0.1):
        raise ValueError(f"the losses are {mine:.6f} and {theirs:.6f}")
    drafts = with_errors(step.written, DRAFT_ERRORS, size.decoder["vocab_size"])
    mb = bench.peak_mb(lambda: step.ours(inputs, arguments, drafts))
    seconds = bench.seconds(lambda: step.ours(inputs, arguments, drafts))
    other_mb = bench.peak_mb(lambda: step.plain(inputs, arguments))
    other_s = bench.seconds(lambda: step.plain(inputs, arguments))
    held_gb = torch.cuda.memory_allocated() / 1e9 if bench.device.type == "cuda" else 0.0
    audio_s = size.batch_size * size.seconds
    note = (
        f"{audio_s / seconds:,.0f} audio-hours a GPU-hour against {audio_s / other_s:,.0f}; losses differ by "
        f"{difference:.1e}; weights and AdamW in {step.kept_in}, {held_gb:.1f} GB held beside; drafts of the first "
        "rollout, whose weights have moved since"
    )
    return [(Row(f"step_{bench.name}/wer10", seconds, PLAIN, other_s, other_s / seconds, mb, other_mb), note)]


CASES: dict[str, tuple[Callable[[Bench], list[tuple[Row, str]]], str]] = {
    "rollout": (rollout_cases, HF),
    "loss": (loss_cases, VERL),
    "step": (step_cases, PLAIN),
}
LAST = {"loss_chunk": (chunk_cases, COMPILED)}  # after those of all sizes: a compiler may take its time


def run_cases(
    names: list[str], device: torch.device, runs: int, seconds: float, no_graphs: str = ""
) -> tuple[list[Row], dict[str, str]]:
    """All cases of some sizes. no_graphs: why those that run on graphs are not timed."""
    began = time.perf_counter()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bytes_per_s = bandwidth(device, 1 << (30 if device.type == "cuda" else 26))
    print(f"a copy reads and writes {bytes_per_s / 1e9:,.0f} GB/s")
    rows, notes = [], {}
    for name, kind, (cases, other) in [
        (name, kind, case) for part in (CASES, LAST) for name in names for kind, case in part.items()
    ]:
        bench = Bench(name, SIZES[name], device, dtype, runs, bytes_per_s, no_graphs)
        try:
            if time.perf_counter() - began > seconds:
                raise TimeoutError(f"left out, {seconds:.0f} s are over")
            done = cases(bench)
        except Exception as error:  # whatever a device or a version of a library may raise: the rest goes on
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            done = [(Row(f"{kind}_{name}", None, other, None, None), reason)]
        for row, note in done:
            rows.append(row)
            notes[row.case] = note
            print(f"{time.perf_counter() - began:.0f} s: {row.case} done", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows, notes
