"""The loss of bench.gpu: all of it against verl's formula, and its part that is no product, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from bench.gpu_bench import Bench
from bench.loss import Scene, Sizes, make_scene, ours
from bench.tables import Row
from opd.fused import exponentials, gradient_of_rest
from opd.schema import LossConfig
from opd.support import FAR

VERL, COMPILED = "verl_forward_kl_topk", "torch_compile"


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


def chunk_cases(bench: Bench) -> list[tuple[Row, str]]:
    """What the loss does with the logits of a chunk between its products, as it does it and by one compiled function."""
    num_rows, vocab_size = min(LossConfig().chunk_size, bench.size.positions), bench.size.decoder["vocab_size"]
    generator = torch.Generator(bench.device).manual_seed(0)
    logits_nV = torch.empty(num_rows, vocab_size, device=bench.device).normal_(std=3.0, generator=generator)
    weight_n = torch.ones(num_rows, device=bench.device)
    eager_s = bench.seconds(lambda: chunk_part(logits_nV, weight_n))
    case, note = f"loss_{bench.name}/chunk", f"{num_rows} positions, without the products"
    if bench.device.type != "cuda":
        return [(Row(case, eager_s, COMPILED, None, None), f"{note}; compiled on CUDA only")]
    try:
        compiled = torch.compile(chunk_apart, dynamic=False)
        logits_nV.normal_(std=3.0, generator=generator)
        expected_nV, found_nV = chunk_part(logits_nV.clone(), weight_n), compiled(logits_nV.clone(), weight_n)
        torch.testing.assert_close(found_nV, expected_nV, rtol=1e-4, atol=1e-6)
        compiled_s = bench.seconds(lambda: compiled(logits_nV, weight_n))
    except Exception as error:  # no compiler, no Triton, a device that it does not know: the eager time stands alone
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return [(Row(case, eager_s, COMPILED, None, None), f"{note}; not compiled: {reason}")]
    return [(Row(case, eager_s, COMPILED, compiled_s, compiled_s / eager_s), note)]


def chunk_part(logits_nV: torch.Tensor, weight_n: torch.Tensor) -> torch.Tensor:
    """The chunk's passes over the vocabulary, in the logits' place: (n, V)."""
    exp_nV, _, sum_n1 = exponentials(logits_nV)
    return gradient_of_rest(exp_nV, sum_n1, weight_n)


def chunk_apart(logits_nV: torch.Tensor, weight_n: torch.Tensor) -> torch.Tensor:
    """The same into memory of its own: torch 2.13 does not compile it in place."""
    best_n1 = logits_nV.amax(1, keepdim=True).clamp(min=FAR)
    exp_nV = (logits_nV - best_n1).exp()
    sum_n1 = exp_nV.sum(1, keepdim=True).clamp(min=torch.finfo(exp_nV.dtype).tiny)
    return exp_nV * (weight_n[:, None] / sum_n1)
