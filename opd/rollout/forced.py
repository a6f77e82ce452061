"""A rollout of given texts: nothing is written, the student is asked what it would have written along the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from opd.rollout.decode import loop_starts
from opd.types import Rollout


@torch.no_grad()
def forced(
    forward: Callable[..., Any],
    inputs: Mapping[str, torch.Tensor],
    response_ids: Sequence[Sequence[int]],
    *,
    eos_id: int,
    pad_id: int,
    blocked_V: torch.Tensor,
    top_k: int,
    max_repeats: int = 8,
) -> Rollout:
    """The `Rollout` of responses that are there already (references, a teacher's transcripts), by one forward.

    forward        a causal language model, as for `decode`
    inputs         left-padded prompts, as for `decode`
    response_ids   B rows of ids, EOS included; an empty row (bad audio) comes back with an empty mask

    topk_ids_BTK and logprobs_BT are the student's at each position, given the text before it. Nothing is drawn, so there
    is no temperature.
    """
    device = inputs["input_ids"].device
    length = max(1, max(len(row) for row in response_ids))
    ids_BT = torch.tensor([[*row, *[pad_id] * (length - len(row))] for row in response_ids])
    mask_BT = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in response_ids])
    joined = dict(inputs)
    joined["input_ids"] = torch.cat([inputs["input_ids"], ids_BT.to(device)], dim=1)
    attention = inputs["attention_mask"]
    joined["attention_mask"] = torch.cat([attention, mask_BT.to(device, attention.dtype)], dim=1)
    logits_BTV = forward(**joined, use_cache=False, logits_to_keep=length + 1).logits[:, :-1]
    top_k = min(top_k, int((~blocked_V).sum()))
    topk_ids, logprobs = [], []
    for logits_TV, ids_T in zip(logits_BTV, ids_BT.to(device), strict=True):  # a float32 copy of one row at a time
        allowed_TV = logits_TV.float().masked_fill(blocked_V, float("-inf"))
        topk_ids.append(allowed_TV.topk(top_k, dim=-1).indices)
        logprobs.append(allowed_TV.log_softmax(-1).gather(-1, ids_T[:, None])[:, 0])
    return Rollout(
        response_ids_BT=ids_BT,
        response_mask_BT=mask_BT,
        topk_ids_BTK=torch.stack(topk_ids).cpu(),
        logprobs_BT=torch.stack(logprobs).cpu().masked_fill(~mask_BT, 0.0),
        finished_B=((ids_BT == eos_id) & mask_BT).any(1),
        loop_start_B=loop_starts(ids_BT, mask_BT, max_repeats),
        bad_audio_B=~mask_BT.any(1),
    )
