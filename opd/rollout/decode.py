"""Plain decoding with a KV cache: greedy, or sampled at a temperature. One forward per token.

Sampling draws from uniforms handed in per utterance, so a rollout depends on the seed, the step and the utterance,
and on neither the number of ranks nor the batch it stands in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from opd.rollout.loops import find_loop
from opd.types import Rollout


def uniforms(seed: int, step: int, utterance_ids: list[str], length: int) -> torch.Tensor:
    """Uniform numbers in [0, 1), one row per utterance: (B, length) float64, the same wherever they are drawn."""
    rows = []
    for utterance_id in utterance_ids:
        digest = hashlib.sha256(f"{seed}/{step}/{utterance_id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        rows.append(torch.rand(length, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


@torch.no_grad()
def decode(
    forward: Callable[..., Any],
    inputs: Mapping[str, torch.Tensor],
    *,
    eos_id: int,
    pad_id: int,
    blocked_V: torch.Tensor,
    max_new_tokens: int,
    top_k: int,
    temperature: float = 0.0,
    uniforms_BT: torch.Tensor | None = None,
    max_repeats: int = 8,
    bad_audio_B: torch.Tensor | None = None,
) -> Rollout:
    """Writes a response to each prompt.

    forward   a causal language model: takes input_ids, attention_mask, audios, past_key_values, ... and returns an
              object with `logits` and `past_key_values`
    inputs    left-padded input_ids and attention_mask (B, P), audios (B, M, F), audio_mask (B, F)
    blocked_V bool, ids that may not be written (control tokens; EOS is not among them)
    temperature  0 is greedy; above 0 samples, and then `uniforms_BT` (B, max_new_tokens) is needed

    Rows that are marked bad (unreadable audio) come back with an empty mask.
    """
    assert temperature == 0 or uniforms_BT is not None, "sampling needs the uniforms of each utterance"
    input_ids = inputs["input_ids"]
    num_rows, device = input_ids.shape[0], input_ids.device
    bad_B = torch.zeros(num_rows, dtype=torch.bool) if bad_audio_B is None else bad_audio_B
    done_B = bad_B.to(device).clone()
    top_k = min(top_k, int((~blocked_V).sum()))
    mask_BL = inputs["attention_mask"]
    step_inputs = dict(inputs) | {"logits_to_keep": 1}
    cache = None
    ids, masks, topks, logprobs = [], [], [], []
    for position in range(max_new_tokens):
        if position == 0 or not bool(done_B.all()):
            out = forward(**step_inputs, past_key_values=cache, use_cache=True)
        else:
            break
        cache = out.past_key_values
        logits_BV = out.logits[:, -1].float().masked_fill(blocked_V, float("-inf"))
        u_B = uniforms_BT[:, position].to(device) if uniforms_BT is not None else None
        token_B, logprob_B = pick(logits_BV, temperature, u_B)
        alive_B = ~done_B
        ids.append(torch.where(alive_B, token_B, pad_id))
        masks.append(alive_B)
        topks.append(logits_BV.topk(top_k, dim=-1).indices)
        logprobs.append(logprob_B.masked_fill(done_B, 0.0))
        done_B = done_B | (token_B == eos_id)
        mask_BL = torch.cat([mask_BL, alive_B[:, None].to(mask_BL.dtype)], dim=1)
        step_inputs = {"input_ids": ids[-1][:, None], "attention_mask": mask_BL, "logits_to_keep": 1}
    return _to_rollout(ids, masks, topks, logprobs, eos_id, max_repeats, bad_B)


def pick(
    logits_BV: torch.Tensor, temperature: float, uniform_B: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The next token of each row and its log-probability under the distribution it was drawn from: (B,), (B,)."""
    if temperature == 0:
        logprobs_BV = logits_BV.log_softmax(-1)
        token_B = logits_BV.argmax(-1)
    else:
        logprobs_BV = (logits_BV / temperature).log_softmax(-1)
        assert uniform_B is not None, "sampling needs one uniform per row"
        cdf_BV = logprobs_BV.double().exp().cumsum(-1)
        # The sum ends a rounding error away from 1: scaling keeps the draw inside, right=True skips ids of probability 0.
        token_B = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)[:, 0]
        last_allowed_B = (logits_BV > float("-inf")).double().cumsum(-1).argmax(-1)
        token_B = torch.minimum(token_B, last_allowed_B)
    return token_B, logprobs_BV.gather(-1, token_B[:, None])[:, 0]


def _to_rollout(ids, masks, topks, logprobs, eos_id: int, max_repeats: int, bad_B: torch.Tensor) -> Rollout:
    ids_BT = torch.stack(ids, 1).cpu()
    mask_BT = torch.stack(masks, 1).cpu()
    return Rollout(
        response_ids_BT=ids_BT,
        response_mask_BT=mask_BT,
        topk_ids_BTK=torch.stack(topks, 1).cpu(),
        logprobs_BT=torch.stack(logprobs, 1).cpu(),
        finished_B=((ids_BT == eos_id) & mask_BT).any(1),
        loop_start_B=loop_starts(ids_BT, mask_BT, max_repeats),
        bad_audio_B=bad_B.cpu(),
    )


def loop_starts(ids_BT: torch.Tensor, mask_BT: torch.Tensor, max_repeats: int) -> torch.Tensor:
    """Where a repetition loop begins in each row, T where there is none: (B,) int64."""
    starts = []
    for ids, mask in zip(ids_BT.tolist(), mask_BT.tolist(), strict=True):
        start = find_loop(ids[: sum(mask)], max_repeats)
        starts.append(ids_BT.shape[1] if start is None else start)
    return torch.tensor(starts, dtype=torch.int64)


def split(rollout: Rollout, micro_rows: Sequence[Sequence[int]]) -> list[Rollout]:
    """Micro-batches of these rows, each cut to its own longest response (at least one position)."""
    parts = []
    for members in micro_rows:
        rows = torch.tensor(members)
        length = max(1, int(rollout.response_mask_BT[rows].sum(1).max()))
        tensors = {
            name: (value[rows, :length] if value.dim() > 1 else value[rows]).clone()
            for name, value in rollout.to_dict().items()
        }
        tensors["loop_start_B"] = tensors["loop_start_B"].clamp(max=length)
        parts.append(Rollout.from_dict(tensors))
    return parts
