"""Rollout, loss and whole steps at the sizes of ARK-ASR-0.6B and 3B, with random weights, on one CUDA device.

    python -m bench.gpu [--json FILE] [--size 06b|3b|all|tiny] [--device cuda|cpu] [--seconds 390] [--runs 3]

Needs torch and transformers only (no verl, no Ray), and no file but this repository. Ends within eight minutes on one
H100: a case that fails, runs out of memory or would begin too late is a row without figures, and the rest goes on.

rollout_S/plain        without drafts, against transformers' greedy `generate`; both with prompt and encoder
rollout_S/no_graphs    the same without CUDA graphs
rollout_S/wer10        with drafts of which 10 % of the tokens are wrong
rollout_S/read_weights a plain decoding step of ours against the time that reading the weights once takes at the
                       bandwidth of a copy: the ratio is the share of the limit that is reached
loss_S/tail, loss_S/renormalized   from hidden states to both gradients, against verl 0.9.1's formula written plainly
                       (logits, log-softmax in float32, top-k, gather, backward)
step_S/wer10           rollout with drafts, scores of a teacher of 1.7B's size, loss, backward and AdamW, against
                       `generate`, full logits of both models and the same AdamW

In bfloat16 two ways of computing the same round differently, so how much of what both wrote is the same is told; in
float32 (--device cpu) it must be all.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from bench.gpu_models import SIZES, Size, bandwidth, decoding_arguments, make_inputs, make_model, with_errors
from bench.gpu_step import GpuStep
from bench.loss import Scene, Sizes, make_scene, ours
from bench.tables import Row, print_rows, write_json
from opd.rollout.graphs import GraphSteps
from opd.rollout.speculative import RolloutCounts, forward_cost, speculate
from opd.rollout.steps import DecoderSteps
from opd.types import Rollout

HF, VERL, READ, PLAIN = "hf_generate", "verl_forward_kl_topk", "read_weights", "plain_step"
DRAFT_ERRORS = 0.10


@dataclass
class Bench:
    """What the cases of a size share."""

    name: str
    size: Size
    device: torch.device
    dtype: torch.dtype
    runs: int
    bytes_per_s: float

    @property
    def arguments(self) -> dict[str, Any]:
        return decoding_arguments(self.size, self.device)

    def model(self) -> Any:
        return make_model(self.size.decoder, self.size.whisper, self.device, self.dtype)

    def inputs(self) -> dict[str, torch.Tensor]:
        return make_inputs(self.size, self.device, self.dtype, self.size.whisper["num_mel_bins"])

    def seconds(self, function: Callable[[], Any]) -> float:
        return seconds_of(function, self.device, self.runs)

    def peak_mb(self, function: Callable[[], Any]) -> float | None:
        """Megabytes over what is allocated now; None where the device does not count."""
        if self.device.type != "cuda":
            return None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 1e6


def seconds_of(function: Callable[[], Any], device: torch.device, runs: int) -> float:
    """Median over runs, after one that is not counted."""
    taken = []
    for _ in range(runs + 1):
        synchronize(device)
        began = time.perf_counter()
        function()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# -- rollout --


@torch.inference_mode()
def rollout_cases(bench: Bench) -> list[tuple[Row, str]]:
    model, inputs, arguments = bench.model(), bench.inputs(), bench.arguments
    decoder_size = sum(p.numel() for p in model.model.parameters())
    cost = forward_cost(decoder_size, model.config.num_hidden_layers, bench.device.type, torch.get_num_threads())
    graphs = GraphSteps(model)

    def write(steps: Any, drafts: Any) -> tuple[Rollout, RolloutCounts]:
        return speculate(model, inputs, steps=steps, drafts=drafts, forward_cost=cost, **arguments)

    def generate() -> torch.Tensor:
        return model.generate(
            **inputs, max_new_tokens=bench.size.tokens, do_sample=False,
            eos_token_id=arguments["eos_id"], pad_token_id=arguments["pad_id"],
        )[:, inputs["input_ids"].shape[1] :]  # fmt: skip

    plain, _ = write(graphs, None)
    tokens = int(plain.response_mask_BT.sum())
    same = same_share(plain.response_ids_BT, generate().cpu())
    rows_ids = [ids[mask].tolist() for ids, mask in zip(plain.response_ids_BT, plain.response_mask_BT, strict=True)]
    drafts = with_errors(rows_ids, DRAFT_ERRORS, bench.size.decoder["vocab_size"])
    drafted, counts = write(graphs, drafts)
    same_drafted = same_share(drafted.response_ids_BT, plain.response_ids_BT)
    if bench.dtype == torch.float32 and (same < 1 or same_drafted < 1):
        raise ValueError(f"other tokens: {same:.2%} of generate's are ours, {same_drafted:.2%} with drafts")

    prefill_s = bench.seconds(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
    other_s = bench.seconds(generate)
    others = {
        "plain": bench.seconds(lambda: write(graphs, None)),
        "no_graphs": bench.seconds(lambda: write(DecoderSteps(model), None)),
        "wer10": bench.seconds(lambda: write(graphs, drafts)),
    }
    forwards = int(counts.forwards_B.sum()) / len(rows_ids)
    notes = {
        "plain": f"{same:.1%} of the tokens are generate's",
        "no_graphs": "no CUDA graphs" if bench.device.type == "cuda" else "plain memory",
        "wer10": f"{forwards:.1f} forwards a row; {same_drafted:.1%} of the tokens as without drafts",
    }
    cases = [
        (
            Row(f"rollout_{bench.name}/{case}", seconds, HF, other_s, other_s / seconds),
            f"{tokens / seconds:,.0f} tokens/s against {tokens / other_s:,.0f}; {notes[case]}",
        )
        for case, seconds in others.items()
    ]
    num_steps = max(1, plain.response_ids_BT.shape[1] - 1)
    num_bytes = decoder_size * bench.dtype.itemsize  # the output matrix is the embedding
    read = read_weights_case(bench.name, others["plain"], prefill_s, num_steps, num_bytes, bench.bytes_per_s)
    return [*cases, read]


def read_weights_case(
    name: str, rollout_s: float, prefill_s: float, num_steps: int, num_bytes: int, bytes_per_s: float
) -> tuple[Row, str]:
    """A decoding step is what the rollout takes over its prefill; where noise leaves nothing, the row has no figures."""
    case, step_s, limit_s = f"rollout_{name}/{READ}", (rollout_s - prefill_s) / num_steps, num_bytes / bytes_per_s
    if step_s <= 0:
        why = f"the prefill took {prefill_s:.4f} s, the whole rollout {rollout_s:.4f} s: raise --runs"
        return Row(case, None, READ, limit_s, None), why
    note = f"{num_bytes / 1e9:.2f} GB of weights; {step_s / limit_s:.2f} times the limit; prefill {prefill_s:.3f} s"
    return Row(case, step_s, READ, limit_s, limit_s / step_s), note


def same_share(ids_BT: torch.Tensor, other_BT: torch.Tensor) -> float:
    """Share of positions at which both have the same id; a missing one is another."""
    length = max(ids_BT.shape[1], other_BT.shape[1])
    padded = [torch.nn.functional.pad(ids, (0, length - ids.shape[1]), value=-1) for ids in (ids_BT, other_BT)]
    return float((padded[0] == padded[1]).double().mean())


# -- loss --


def loss_cases(bench: Bench) -> list[tuple[Row, str]]:
    size = bench.size
    top_k = bench.arguments["top_k"]
    sizes = Sizes(size.positions, size.decoder["vocab_size"], size.decoder["hidden_size"], top_k, 0)
    scene = to_device(make_scene(sizes), bench)

    def forget() -> None:
        scene.hidden_ND.grad = scene.weight_VD.grad = None

    def run(side: Callable[[Scene], torch.Tensor]) -> torch.Tensor:
        forget()
        return side(scene)

    sides: dict[str, Callable[[Scene], torch.Tensor]] = {
        "tail": lambda s: ours(s, renormalize=False),
        "renormalized": lambda s: ours(s, renormalize=True),
    }
    theirs_N = run(verl_formula)
    other_s = bench.seconds(lambda: run(verl_formula))
    forget()
    grad_mb = scene.weight_VD.numel() * bench.dtype.itemsize / 1e6  # both must return it
    other_mb = bench.peak_mb(lambda: run(verl_formula))
    cases = []
    for case, side in sides.items():
        own_N = run(side)
        difference = float((own_N - theirs_N).norm() / theirs_N.norm())
        # With k ids of weight on the teacher's side, the tail's form is verl's; the renormalised one is another loss.
        if case == "tail" and not difference < (1e-4 if bench.dtype == torch.float32 else 3e-2):
            raise ValueError(f"the losses differ by {difference:.1e} of their norm")
        seconds = bench.seconds(lambda: run(side))  # noqa: B023  called at once
        forget()
        mb = bench.peak_mb(lambda: run(side))  # noqa: B023
        forget()
        row = Row(f"loss_{bench.name}/{case}", seconds, VERL, other_s, other_s / seconds)
        if mb is not None and other_mb is not None:
            row = replace(row, ours_mb=mb - grad_mb, other_mb=other_mb - grad_mb)
        note = f"{size.positions} positions; memory without the matrix's gradient"
        cases.append((row, note + (f"; differs by {difference:.1e}" if case == "tail" else "")))
    return cases


def to_device(scene: Scene, bench: Bench) -> Scene:
    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(bench.device, bench.dtype if tensor.requires_grad else None)

    fields = {name: moved(tensor).requires_grad_(tensor.requires_grad) for name, tensor in vars(scene).items()}
    return Scene(**fields)


def verl_formula(scene: Scene) -> torch.Tensor:
    """verl 0.9.1's forward_kl_topk without its clamp, as a formula."""
    logits_NV = torch.nn.functional.linear(scene.hidden_ND, scene.weight_VD).float()
    log_q_NV = logits_NV.log_softmax(-1)
    log_q_NV.topk(scene.teacher_ids_NK.shape[1], dim=-1)  # it counts the overlap
    log_q_NK = log_q_NV.gather(-1, scene.teacher_ids_NK)
    log_p_NK = scene.teacher_logprobs_NK
    loss_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).sum(-1)
    loss_N.sum().backward()
    return loss_N.detach()


# -- a whole step --


def step_cases(bench: Bench) -> list[tuple[Row, str]]:
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


def run_cases(names: list[str], device: torch.device, runs: int, seconds: float) -> tuple[list[Row], dict[str, str]]:
    """All cases of some sizes; what fails or comes too late is a row without figures."""
    began = time.perf_counter()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bytes_per_s = bandwidth(device, 1 << (30 if device.type == "cuda" else 26))
    print(f"a copy reads and writes {bytes_per_s / 1e9:,.0f} GB/s")
    rows, notes = [], {}
    for name in names:
        bench = Bench(name, SIZES[name], device, dtype, runs, bytes_per_s)
        for kind, (cases, other) in CASES.items():
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", metavar="FILE", help="write the rows there")
    parser.add_argument("--size", default="all", choices=[*SIZES, "all"], help="all: 06b and 3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=390, help="no case begins later")
    parser.add_argument("--runs", type=int, default=3, help="runs of which the median is taken")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{what}; torch {torch.__version__}, transformers {transformers.__version__}")
    names = ["06b", "3b"] if options.size == "all" else [options.size]
    rows, notes = run_cases(names, device, options.runs, options.seconds)
    print_rows(rows, notes)
    if options.json:
        write_json(rows, options.json)
    return 1 if any(row.ours_s is None for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
