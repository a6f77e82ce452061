"""The rollout of bench.gpu: against `generate` and the bandwidth, and whether graphs write what plain decoding writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.gpu_bench import Bench
from bench.gpu_models import SIZES, decoding_arguments, make_inputs, make_model, with_errors
from bench.tables import Row
from opd.rollout.decode import decode
from opd.rollout.forced import forced
from opd.rollout.graphs import GraphSteps
from opd.rollout.speculative import RolloutCounts, forward_cost, speculate
from opd.rollout.steps import DecoderSteps
from opd.types import Rollout

HF, READ = "hf_generate", "read_weights"
DRAFT_ERRORS = 0.10
TIE = 5e-3  # nats between two tokens of which rounding may choose either
MAX_LOSS = (
    0.2  # of teacher-forced agreement by graphs: near ties cost as much with and without, wrong graphs nearly all
)
# Rollouts one after the other on the same memory: rows, share of wrong draft tokens (None: no drafts), factor of a weight.
CHECKED = ((4, None, 1.0), (4, None, 1.0), (4, 0.3, 1.0), (3, None, 1.0), (4, 0.1, 1.5), (2, None, 0.5), (4, None, 1.0))


# -- whether graphs may be timed --


def check_graphs(device: torch.device) -> str:
    """Rollouts of a small float32 model on fixed memory, on CUDA as graphs, against plain decoding.

    Between some of them a weight changes in place, as in training. Returns what was found in words; raises ValueError
    where other tokens were written, or where nothing was captured on CUDA.
    """
    size = SIZES["tiny"]
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        model = make_model(size.decoder, size.whisper, device, torch.float32)
        inputs = make_inputs(size, device, torch.float32, size.whisper["num_mel_bins"])
        arguments, steps, tokens = decoding_arguments(size, device), GraphSteps(model), 0
        for number, (rows, rate, factor) in enumerate(CHECKED, 1):
            with torch.no_grad():
                model.model.layers[0].mlp.up_proj.weight.mul_(factor)
            part = {name: tensor[:rows] for name, tensor in inputs.items()}
            plain = decode(model, part, **arguments)
            drafts = None if rate is None else with_errors(written(plain), rate, size.decoder["vocab_size"])
            fixed, _ = speculate(model, part, steps=steps.bind(model), drafts=drafts, forward_cost=30.0, **arguments)
            if difference := different(fixed, plain):
                raise ValueError(f"rollout {number} of {len(CHECKED)} is not that of plain decoding: {difference}")
            tokens += int(plain.response_mask_BT.sum())
    finally:
        torch.set_float32_matmul_precision(precision)
    if device.type == "cuda" and not steps.num_graphs:
        raise ValueError("no CUDA graph was captured")
    how = f"{steps.num_graphs} CUDA graphs" if device.type == "cuda" else "fixed memory (no CUDA, no graphs)"
    return f"{len(CHECKED)} float32 rollouts, {tokens} tokens: {how} write what plain decoding writes"


def different(rollout: Rollout, plain: Rollout) -> str:
    """The first row in which two rollouts differ by more than rounding can do, in words; nothing where there is none."""
    own_ids, plain_ids = written(rollout), written(plain)
    for row, (own, other) in enumerate(zip(own_ids, plain_ids, strict=True)):
        pairs = zip(own, other, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(own), len(other)))
        end = min(same + 1, len(own), len(other))  # the first other token has to be as likely
        gap = (rollout.logprobs_BT[row, :end] - plain.logprobs_BT[row, :end]).abs().max() if end else 0.0
        is_cut = same == min(len(own), len(other)) and len(own) != len(other)
        if is_cut or not float(gap) < TIE:
            return f"row {row} agrees for {same} of {len(other)} tokens, log-probabilities differ by {float(gap):.1e}"
    return ""


def written(rollout: Rollout) -> list[list[int]]:
    """The ids of each row, EOS included."""
    rows = zip(rollout.response_ids_BT, rollout.response_mask_BT, strict=True)
    return [ids[mask].tolist() for ids, mask in rows]


def agreement(model: Any, inputs: dict[str, torch.Tensor], rollout: Rollout, arguments: dict[str, Any]) -> float:
    """Share of the written tokens that the model finds the likeliest when it is given all before them in one forward."""
    keys = {name: arguments[name] for name in ("eos_id", "pad_id", "blocked_V", "top_k")}
    mask_BT = rollout.response_mask_BT
    given = forced(model, inputs, written(rollout), **keys)
    return float((given.topk_ids_BTK[..., 0] == rollout.response_ids_BT)[mask_BT].double().mean())


# -- timing --


@torch.inference_mode()
def rollout_cases(bench: Bench) -> list[tuple[Row, str]]:
    model, inputs, arguments = bench.model(), bench.inputs(), bench.arguments
    decoder_size = sum(p.numel() for p in model.model.parameters())
    cost = forward_cost(decoder_size, model.config.num_hidden_layers, bench.device.type, torch.get_num_threads())
    graphs = GraphSteps(model)
    kept: Callable[[], Any] = (lambda: DecoderSteps(model)) if bench.no_graphs else (lambda: graphs)

    def write(steps: Any, drafts: Any) -> tuple[Rollout, RolloutCounts]:
        return speculate(model, inputs, steps=steps, drafts=drafts, forward_cost=cost, **arguments)

    def generate() -> torch.Tensor:
        return model.generate(
            **inputs, max_new_tokens=bench.size.tokens, do_sample=False,
            eos_token_id=arguments["eos_id"], pad_token_id=arguments["pad_id"],
        )[:, inputs["input_ids"].shape[1] :]  # fmt: skip

    plain, _ = write(kept(), None)
    drafts = with_errors(written(plain), DRAFT_ERRORS, bench.size.decoder["vocab_size"])
    drafted, counts = write(kept(), drafts)
    same = same_share(plain.response_ids_BT, generate().cpu())
    same_drafted = same_share(drafted.response_ids_BT, plain.response_ids_BT)
    if bench.dtype == torch.float32 and (same < 1 or same_drafted < 1):
        raise ValueError(f"other tokens: {same:.2%} of generate's are ours, {same_drafted:.2%} with drafts")
    eager, _ = write(DecoderSteps(model), None)
    agreed = [agreement(model, inputs, rollout, arguments) for rollout in (plain, drafted, eager)]
    if min(agreed) < agreed[2] - MAX_LOSS:
        raise ValueError("teacher-forced agreement {:.1%}, {:.1%} with drafts, {:.1%} without graphs".format(*agreed))

    prefill_s = bench.seconds(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
    other_s = bench.seconds(generate)
    sides: dict[str, Callable[[], Any]] = {"no_graphs": lambda: write(DecoderSteps(model), None)}
    if not bench.no_graphs:
        sides["plain"] = lambda: write(graphs, None)
        sides["fresh_graphs"] = lambda: write(GraphSteps(model), None)
        sides["wer10"] = lambda: write(graphs, drafts)
    taken = {case: bench.seconds(side) for case, side in sides.items()}
    forwards = int(counts.forwards_B.sum()) / len(inputs["input_ids"])
    on_cuda = bench.device.type == "cuda"
    notes = {
        "plain": f"{same:.1%} of the tokens are generate's; teacher-forced {agreed[0]:.1%}",
        "fresh_graphs": "captured anew in each rollout" if on_cuda else "fixed memory made anew in each rollout",
        "no_graphs": f"{'no CUDA graphs' if on_cuda else 'plain memory'}; teacher-forced {agreed[2]:.1%}",
        "wer10": f"{forwards:.1f} forwards a row; {same_drafted:.1%} of the tokens as without drafts; teacher-forced "
        f"{agreed[1]:.1%}",
    }
    tokens, cases = int(plain.response_mask_BT.sum()), []
    for case, note in notes.items():
        name, seconds = f"rollout_{bench.name}/{case}", taken.get(case)
        if seconds is None:
            cases.append((Row(name, None, HF, other_s, None), bench.no_graphs))
            continue
        rates = f"{tokens / seconds:,.0f} tokens/s against {tokens / other_s:,.0f}; {note}"
        cases.append((Row(name, seconds, HF, other_s, other_s / seconds), rates))
    num_steps = max(1, plain.response_ids_BT.shape[1] - 1)
    num_bytes = decoder_size * bench.dtype.itemsize  # the output matrix is the embedding
    rollout_s = taken.get("plain", taken["no_graphs"])
    return [*cases, read_weights_case(bench.name, rollout_s, prefill_s, num_steps, num_bytes, bench.bytes_per_s)]


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
