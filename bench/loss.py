"""The loss from hidden states to the gradients of hidden states and output matrix, against verl's forward_kl_topk.

    python -m bench.loss [--json FILE] [--runs 5] [--positions 1536] [--vocab_size 151936] [--width 896] [--top_k 32]

verl 0.9.1 computes logits, their log-softmax, the student's top-k, a gather at the teacher's top-k, and differentiates
that. It knows no tail, so the measured case is one where the definitions agree: outside its top-k the teacher has next
to no mass (but an entry for every id, so that no work is saved). Its clamp of log-probabilities is off. The
renormalised form is checked against verl's function on the support's logits, and timed against its usual path.

Every run is a process of its own, on inputs of the same seed. Megabytes are peak resident memory over that at the
start, less the gradient of the output matrix, which both sides must return. Both sides run once for the check before
anything is timed; then they take turns. Exit status 1 where, at the default sizes, ours needs more than a tenth of the
memory or of 1.1 times the time, or the renormalised form is less than 6 times as fast.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from bench.command import Parser, command, positive, report_missed
from bench.tables import Row, print_rows, write_json
from opd.fused import fused_position_loss
from opd.schema import LossConfig
from opd.support import candidate_ids

OTHER = "verl_forward_kl_topk"
EOS = 7
NO_MASS = -60.0  # log-probability of an id that the teacher could write and does not
DEFAULTS = {"positions": 1536, "vocab_size": 151_936, "width": 896, "top_k": 32, "threads": 2}
LEAST = {"loss/tail": 1 / 1.1, "loss/renormalized": 6.0}  # times as fast as the other side
MAX_MEMORY = 0.1  # of the other side's, both without the matrix's gradient
SIDES = {"loss/tail": (OTHER, "tail"), "loss/renormalized": (f"{OTHER}_on_support", "renormalized")}  # what is compared


@dataclass(frozen=True)
class Sizes:
    positions: int
    vocab_size: int
    width: int
    top_k: int
    threads: int


@dataclass
class Scene:
    """The inputs of both sides; the matrix and the hidden states are leaves without a gradient yet."""

    hidden_ND: torch.Tensor
    weight_VD: torch.Tensor
    teacher_ids_NK: torch.Tensor
    teacher_logprobs_NK: torch.Tensor
    student_ids_NK: torch.Tensor


def make_scene(sizes: Sizes) -> Scene:
    """Random states, matrix and teacher. Half of the teacher's top-k are the student's; how long a loss takes does not
    depend on which ids those are, so they need not be the student's likeliest."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.empty(sizes.positions, sizes.width).normal_(generator=generator)
    weight_VD = torch.empty(sizes.vocab_size, sizes.width).normal_(std=3 / sizes.width**0.5, generator=generator)
    # Distinct in a row: a random start and a stride of its own.
    start_N1 = torch.randint(sizes.vocab_size, (sizes.positions, 1), generator=generator)
    ids_N2K = (start_N1 + torch.arange(2 * sizes.top_k) * (sizes.vocab_size // (2 * sizes.top_k))) % sizes.vocab_size
    half = sizes.top_k // 2
    return Scene(
        hidden_ND.requires_grad_(),
        weight_VD.requires_grad_(),
        teacher_ids_NK=ids_N2K[:, : sizes.top_k],
        teacher_logprobs_NK=torch.randn(sizes.positions, sizes.top_k, generator=generator).mul(2).log_softmax(-1),
        student_ids_NK=ids_N2K[:, half : half + sizes.top_k],
    )


# -- the sides: each leaves its gradients in the scene and returns the loss at each position --


def ours(scene: Scene, renormalize: bool) -> torch.Tensor:
    written_N = scene.student_ids_NK[:, 0]
    candidates_NC = candidate_ids(scene.student_ids_NK, written_N, EOS)
    same_NCK = candidates_NC[:, :, None] == scene.teacher_ids_NK[:, None]
    candidate_logprobs_NC = torch.where(same_NCK, scene.teacher_logprobs_NK[:, None], NO_MASS).amax(-1)
    zeros_N = torch.zeros(len(written_N), device=written_N.device)
    teacher = {
        "topk_ids_BTK": scene.teacher_ids_NK, "topk_logprobs_BTK": scene.teacher_logprobs_NK,
        "candidate_logprobs_BTC": candidate_logprobs_NC, "tail_logprob_BT": zeros_N + NO_MASS,
        "unmapped_mass_BT": zeros_N, "entropy_BT": zeros_N,
    }  # fmt: skip
    loss = fused_position_loss(
        scene.hidden_ND, scene.weight_VD, response_ids_N=written_N, rollout_logprobs_N=zeros_N,
        candidate_ids_NC=candidates_NC, teacher=teacher, eos_id=EOS, config=LossConfig(renormalize=renormalize),
    )  # fmt: skip
    loss.total.backward()
    return loss.loss_N


def verl_loss(logits_NV: torch.Tensor, ids_NK: torch.Tensor, logprobs_NK: torch.Tensor) -> torch.Tensor:
    """verl's forward_kl_topk at each position, on one packed sequence as verl hands it over."""
    from verl.trainer.distillation.fsdp.losses import compute_forward_kl_topk
    from verl.workers.config import DistillationConfig, DistillationLossConfig

    keys = DistillationLossConfig(
        loss_mode="forward_kl_topk", topk=ids_NK.shape[1], use_policy_gradient=False, log_prob_min_clamp=None
    )
    logprobs, ids = (torch.nested.nested_tensor([tensor], layout=torch.jagged) for tensor in (logprobs_NK, ids_NK))
    config = DistillationConfig(distillation_loss=keys)
    return compute_forward_kl_topk(logits_NV[None], logprobs, ids, config, "thd")["distillation_losses"][0]


def verl_side(scene: Scene) -> torch.Tensor:
    # The logits are not held here: what verl's own engine keeps of them would only add to its peak.
    loss_N = verl_loss(
        functional.linear(scene.hidden_ND, scene.weight_VD), scene.teacher_ids_NK, scene.teacher_logprobs_NK
    )
    loss_N.sum().backward()
    return loss_N.detach()


def verl_on_support(scene: Scene) -> torch.Tensor:
    """verl's function on logits that the support alone has: the renormalised form. Each id once: repeats cost nothing."""
    eos_N1 = torch.full_like(scene.student_ids_NK[:, :1], EOS)
    ids_NU = torch.cat([scene.teacher_ids_NK, scene.student_ids_NK, eos_N1], dim=1)
    repeated_NU = (ids_NU[:, :, None] == ids_NU[:, None]).tril(-1).any(-1)
    losses = []
    for rows in torch.arange(len(ids_NU)).split(128):
        logits_NU = torch.einsum("nd,nud->nu", scene.hidden_ND[rows], scene.weight_VD[ids_NU[rows]])
        columns_NK = torch.arange(scene.teacher_ids_NK.shape[1]).expand(len(rows), -1)
        masked_NU = logits_NU.masked_fill(repeated_NU[rows], -1e30)
        loss_N = verl_loss(masked_NU, columns_NK, scene.teacher_logprobs_NK[rows])
        loss_N.sum().backward()
        losses.append(loss_N.detach())
    return torch.cat(losses)


def load_side(name: str) -> Any:
    """The function of a side, with what it imports."""
    if name in ("tail", "renormalized"):
        return lambda scene: ours(scene, name == "renormalized")
    from trainers.env import set_verl_env

    set_verl_env(use_gpu=False)
    import verl.trainer.distillation.fsdp.losses  # noqa: F401
    import verl.workers.config  # noqa: F401

    return verl_side if name == OTHER else verl_on_support


# -- measuring --


def measure(name: str, sizes: Sizes, with_result: bool) -> dict[str, Any]:
    """One run of a side in this process, which is new: seconds, megabytes and, on demand, what was computed."""
    torch.set_num_threads(sizes.threads)
    side = load_side(name)
    small = Sizes(8, 4 * sizes.top_k + EOS, 8, sizes.top_k, sizes.threads)
    side(make_scene(small))  # threads and libraries are up
    scene = make_scene(sizes)
    before = reset_peak()
    began, cpu_began = time.perf_counter(), time.process_time()
    loss_N = side(scene)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    grad_hidden_ND, grad_weight_VD = scene.hidden_ND.grad, scene.weight_VD.grad
    assert grad_hidden_ND is not None and grad_weight_VD is not None
    found: dict[str, Any] = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "mb": (peak_bytes() - before - grad_weight_VD.numel() * 4) / 1e6,
    }
    if with_result:
        touched_V = torch.cat([scene.teacher_ids_NK[::16].flatten(), torch.arange(0, sizes.vocab_size, 97)]).unique()
        found["loss"] = loss_N.numpy()
        found["hidden gradient"] = grad_hidden_ND.numpy()
        found["matrix gradient"] = grad_weight_VD[touched_V].numpy()
        found["matrix gradient's norm"] = grad_weight_VD.norm()[None].numpy()
    return found


def reset_peak() -> int:
    """Resident bytes now, with the peak brought down to them where the system can do so (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # making the inputs needs no more than the inputs, so the peak so far is about what is held now
    return peak_bytes()


def peak_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def in_new_process(name: str, sizes: Sizes, with_result: bool = False) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, name, sizes, with_result).result()


def check(sizes: Sizes) -> None:
    """Raises ValueError where the sides do not compute the same values and gradients."""
    for case, (other, mine) in SIDES.items():
        theirs, own = in_new_process(other, sizes, True), in_new_process(mine, sizes, True)
        for what in ("loss", "hidden gradient", "matrix gradient", "matrix gradient's norm"):
            difference = float(np.linalg.norm(own[what] - theirs[what]) / np.linalg.norm(theirs[what]))
            print(f"{case}: {what} differs by {difference:.1e}")
            if not difference < 1e-4:
                raise ValueError(f"{case}: {what} differs from {other}'s by {difference:.1e}")


@command
def main(argv: list[str]) -> int:
    parser = Parser("loss", __doc__)
    parser.add_argument("--runs", type=positive, default=5)
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=positive, default=default)
    arguments = parser.parse_args(argv)
    chosen = {name: getattr(arguments, name) for name in DEFAULTS}
    sizes = Sizes(**chosen)
    print(f"{sizes}, float32, {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    check(sizes)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (OTHER, "tail", "renormalized")}
    for _ in range(arguments.runs):
        for name, found in runs.items():
            found.append(in_new_process(name, sizes))
            print(f"{name}: {found[-1]['seconds']:.2f} s, {found[-1]['mb']:,.0f} MB, load {os.getloadavg()[0]:.1f}")
    median = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    theirs = median[OTHER]
    rows, notes = [], {}
    for case, (_, name) in SIDES.items():
        own = median[name]
        rows.append(
            Row(
                case,
                own["seconds"],
                OTHER,
                theirs["seconds"],
                theirs["seconds"] / own["seconds"],
                own["mb"],
                theirs["mb"],
            )
        )
        notes[case] = f"processor time {own['cpu_seconds']:.1f} s against {theirs['cpu_seconds']:.1f} s"
    print_rows(rows, notes)
    if arguments.json:
        write_json(rows, arguments.json)
    return report_missed(missed_targets(rows), are_checked=chosen == DEFAULTS)


def missed_targets(rows: list[Row]) -> list[str]:
    """What is slower or larger than it should be, in words."""
    missed = []
    for row in rows:
        assert row.ratio is not None and row.ours_mb is not None and row.other_mb is not None, "all is measured"
        if row.ratio < LEAST[row.case]:
            missed.append(f"{row.case}: {row.ratio:.2f} times as fast, target {LEAST[row.case]:.2f}")
        if row.ours_mb > MAX_MEMORY * row.other_mb:
            missed.append(f"{row.case}: {row.ours_mb:,.0f} MB, target {MAX_MEMORY:g} of {row.other_mb:,.0f} MB")
    return missed


if __name__ == "__main__":
    raise SystemExit(main(None))
