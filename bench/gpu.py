"""Rollout, loss and whole steps at the sizes of ARK-ASR-0.6B and 3B, with random weights, on one CUDA device.

    python -m bench.gpu [--json FILE] [--size 06b|3b|all|tiny] [--device cuda|cpu] [--seconds 390] [--runs 3]

Needs torch (2.5 or newer) and transformers (4.57 or newer) only: no verl, no Ray, and no file but this repository. Before
torch 2.8 the loss multiplies in float32, which is slower. Ends within eight minutes on one H100: a case that fails, runs
out of memory or would begin too late is a row without figures, the rest goes on, and the exit status is 1.

rollout_S/plain        without drafts, against transformers' greedy `generate`; both with prompt and encoder. The CUDA
                       graphs are kept from one rollout to the next, as in training with DeepSpeed's stages 1 and 2
rollout_S/fresh_graphs the same with graphs that are captured in each rollout, as in training with FSDP2
rollout_S/no_graphs    the same without CUDA graphs, as with rollout.cuda_graphs=false
rollout_S/wer10        as rollout_S/plain with drafts of which 10 % of the tokens are wrong
rollout_S/read_weights a plain decoding step of ours against the time that reading the weights once takes at the
                       bandwidth of a copy: the ratio is the share of the limit that is reached
loss_S/tail, loss_S/renormalized   from hidden states to both gradients, against verl 0.9.1's formula written plainly
                       (logits, log-softmax in float32, top-k, gather, backward)
loss_S/chunk           what the loss does with a chunk's logits between its products, against torch.compile's of the same
step_S/wer10           rollout with drafts, scores of a teacher of 1.7B's size, loss, backward and AdamW, against
                       `generate`, full logits of both models and the same AdamW

First a small float32 model writes several rollouts on graphs; where they are not those of plain decoding, nothing that
runs on graphs is timed. In bfloat16 two ways of computing the same round differently, so how much of what both wrote is
the same is told, and how many of the tokens are the model's likeliest when it is given all before them ("teacher-forced");
in float32 (--device cpu) it must be all.
"""

from __future__ import annotations

import argparse
import sys

import torch
import transformers

from bench.command import Parser, command, positive
from bench.tables import print_rows, write_json

OLDEST = {"torch": (2, 5), "transformers": (4, 57)}


@command
def main(argv: list[str]) -> int:
    parser = Parser("gpu", __doc__)
    parser.add_argument("--size", default="all", choices=["tiny", "06b", "3b", "all"], help="all: 06b and 3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=390, help="no case begins later")
    parser.add_argument("--runs", type=positive, default=3, help="runs of which the median is taken")
    options = parser.parse_args(argv)
    for name, version in (("torch", torch.__version__), ("transformers", transformers.__version__)):
        check_version(name, version)
    return run(options, find_device(options.device))


def check_version(name: str, version: str) -> None:
    """Raises ValueError for a version that lacks what is used here."""
    oldest = OLDEST[name]
    if tuple(int(part) for part in version.split(".")[:2]) < oldest:
        raise ValueError(f"{name} {version} is too old: bench.gpu needs {'.'.join(map(str, oldest))} or newer")


def find_device(name: str) -> torch.device:
    """Raises ValueError for a device that torch does not have."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"--device {name}: torch {torch.__version__} cannot use it ({reason}); on a CPU, --size tiny --device cpu "
            "checks the code"
        ) from error
    return device


def run(options: argparse.Namespace, device: torch.device) -> int:
    """All cases of the options; what they need is imported here, after the versions were looked at."""
    from bench.gpu_cases import run_cases
    from bench.gpu_rollout import check_graphs
    from opd.fused import SUMS_HALVES

    on_cuda = device.type == "cuda"
    what = torch.cuda.get_device_name(device) if on_cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{what}; torch {torch.__version__}, transformers {transformers.__version__}")
    if on_cuda and not SUMS_HALVES:
        print(f"torch {torch.__version__} has no product of halves summed in float32: the loss multiplies in float32")
    no_graphs = ""
    try:
        print(check_graphs(device), flush=True)
    except Exception as error:  # whatever a capture may raise: what needs no graphs is timed all the same
        no_graphs = " ".join(f"graphs are not timed: {error}".split())
        print(f"error: {no_graphs}", file=sys.stderr, flush=True)
    names = ["06b", "3b"] if options.size == "all" else [options.size]
    rows, notes = run_cases(names, device, options.runs, options.seconds, no_graphs)
    print_rows(rows, notes)
    if options.json:
        write_json(rows, options.json)
    return 1 if no_graphs or any(row.ours_s is None for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main(None))
