"""Speculative decoding: a draft of each response is checked many tokens at a time, and what is written stays the same.

One forward over prompt and draft tells what the student would write at every position of the draft. The draft is taken
as far as it agrees, followed by the student's own token; then the rest of it is aligned anew (drafts.py) and the next
forward goes on from there, each row at its own place (cache.py). A row without a useful draft is decoded plainly.

The token of a position is a function of the student's distribution and the uniform of that position (`decode.pick`), so
a draft token is accepted with the student's probability of it, and the response is the one that plain decoding writes:
a draft changes how long it takes and nothing else. Forwards of other shapes round differently in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from opd.rollout.cache import RowCache
from opd.rollout.decode import loop_starts, pick
from opd.rollout.drafts import MAX_WIDTH, Drafts
from opd.rollout.graphs import GraphSteps
from opd.types import Rollout

PICK_CHUNK = 128  # positions sampled at a time: each takes a float64 row over the vocabulary
PARTITIONED = 4096  # ids of a vocabulary, up to which a partition of all of them finds the largest ones fastest
TOPK_CHUNK = 256  # written positions whose top-k and log-probability are computed together


@dataclass
class RolloutCounts:
    """What a speculative rollout took. A plain one takes as many forwards of a row as it has tokens.

    rounds       forwards of the whole batch
    forwards_B   rounds that the row took part in
    drafted_B    draft tokens that were checked
    accepted_B   draft tokens that became part of the response
    """

    rounds: int
    forwards_B: torch.Tensor
    drafted_B: torch.Tensor
    accepted_B: torch.Tensor


def forward_cost(num_parameters: int, num_layers: int, device: str, num_threads: int = 1) -> float:
    """About how many tokens could be computed in the time that a forward of the decoder takes however short it is.

    That time goes into reading the weights and into starting each layer's operations. The figures are those of common
    CPU cores, of which `num_threads` compute, and of a large GPU. It decides how many draft tokens are worth checking;
    a factor of two in it costs a few per cent of speed.
    """
    if device == "cpu":
        return 6.0 * num_threads + num_layers * 8e-4 / (2 * num_parameters / (5e10 * num_threads))
    return 150.0 + num_layers * 3e-4 / (2 * num_parameters / 3e14)


@torch.no_grad()
def speculate(
    forward: Callable[..., Any],
    inputs: Mapping[str, torch.Tensor],
    *,
    steps: Callable[..., Any] | None = None,
    drafts: Sequence[Sequence[int] | None] | None,
    eos_id: int,
    pad_id: int,
    blocked_V: torch.Tensor,
    max_new_tokens: int,
    top_k: int,
    temperature: float = 0.0,
    uniforms_BT: torch.Tensor | None = None,
    max_repeats: int = 8,
    bad_audio_B: torch.Tensor | None = None,
    forward_cost: float = 100.0,
    any_left: Callable[[bool], bool] | None = None,
) -> tuple[Rollout, RolloutCounts]:
    """Writes a response to each prompt: the same as `decode.decode`, whose arguments it shares, in fewer forwards.

    steps         computes what `forward` does after the prompt, in less time (see `steps.DecoderSteps`, and for CUDA
                  `graphs.GraphSteps`); None: `forward`
    drafts        what each response may look like, ids without EOS; None where there is nothing to go by
    forward_cost  fixed cost of a forward in tokens (see `forward_cost`); a large one asks for longer drafts
    any_left      for forwards that are collectives: called before each round with whether this rank has rows left, it
                  returns whether any rank has; ranks that are done then run along. All ranks take the same number of
                  rounds
    """
    assert temperature == 0 or uniforms_BT is not None, "sampling needs the uniforms of each utterance"
    num_rows = inputs["input_ids"].shape[0]
    drafts = [None] * num_rows if drafts is None else drafts
    assert len(drafts) == num_rows, "one draft, or None, for each row"
    bad_B = torch.zeros(num_rows, dtype=torch.bool) if bad_audio_B is None else bad_audio_B.cpu()
    picker = _Picker(blocked_V, top_k, temperature, uniforms_BT, (num_rows, max_new_tokens))
    calls = (forward, forward if steps is None else steps)
    writing = _Writing(calls, inputs, drafts, picker, eos_id, pad_id, max_new_tokens, bad_B.numpy(), forward_cost)
    writing.first_round()
    while any_left(writing.has_rows) if any_left is not None else writing.has_rows:
        writing.round()
    return writing.rollout(bad_B, max_repeats), writing.counts()


def topk_ids(logits_NV: torch.Tensor, k: int) -> torch.Tensor:
    """The ids of the k largest in each row, the largest first: (N, k). Twice as fast as topk over a vocabulary.

    Of a small vocabulary numpy's partition finds them. Of a large one the k groups with the largest maxima hold them.
    """
    num_rows, vocab_size = logits_NV.shape
    if logits_NV.device.type == "cpu" and k < vocab_size <= PARTITIONED:
        parts_NV = np.argpartition(logits_NV.numpy(), vocab_size - k, axis=1)
        ids_NK = torch.from_numpy(parts_NV[:, -k:].copy())
        return ids_NK.gather(-1, logits_NV.gather(-1, ids_NK).argsort(-1, descending=True))
    size = 4 if vocab_size < 10_000 else 16  # of a group
    num_groups = -(-vocab_size // size)
    if num_groups <= 2 * k:
        return logits_NV.topk(k, dim=-1).indices
    missing = num_groups * size - vocab_size
    padded = functional.pad(logits_NV, (0, missing), value=float("-inf")) if missing else logits_NV
    groups_NK = padded.view(num_rows, size, num_groups).amax(1).topk(k, dim=-1, sorted=False).indices
    ids_NC = (groups_NK[:, None] + num_groups * torch.arange(size, device=logits_NV.device)[:, None]).flatten(1)
    return ids_NC.gather(-1, padded.gather(-1, ids_NC).topk(k, dim=-1).indices)


class _Picker:
    """Chooses tokens from logits, and keeps the top-k and the log-probability of those that are written."""

    def __init__(
        self,
        blocked_V: torch.Tensor,
        top_k: int,
        temperature: float,
        uniforms_BT: torch.Tensor | None,
        shape: tuple[int, int],
    ) -> None:
        self.temperature, self.uniforms_BT = temperature, uniforms_BT
        self.blocked_V = torch.zeros(blocked_V.shape, device=blocked_V.device).masked_fill(blocked_V, float("-inf"))
        self.top_k = min(top_k, int((~blocked_V).sum()))
        self.topk_ids_BTK = torch.zeros(*shape, self.top_k, dtype=torch.int64)
        self.logprobs_BT = torch.zeros(shape)
        self._waiting: list[tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]] = []

    def pick(self, logits_RWV: torch.Tensor, rows: np.ndarray, written_R: np.ndarray) -> torch.Tensor:
        """What the student writes at each position of the forward, if it comes to that: (R, W). Blocks ids in place."""
        logits_RWV += self.blocked_V.to(logits_RWV.dtype)
        if self.temperature == 0:
            return logits_RWV.argmax(-1)
        assert self.uniforms_BT is not None, "sampling needs the uniforms of each utterance"
        last = self.uniforms_BT.shape[1] - 1
        position_RW = np.minimum(written_R[:, None] + np.arange(logits_RWV.shape[1]), last)
        u_RW = self.uniforms_BT[torch.from_numpy(rows)[:, None], torch.from_numpy(position_RW)].to(logits_RWV.device)
        chunks = zip(logits_RWV.flatten(0, 1).split(PICK_CHUNK), u_RW.flatten().split(PICK_CHUNK), strict=True)
        tokens = [pick(logits_NV.float(), self.temperature, u_N)[0] for logits_NV, u_N in chunks]
        return torch.cat(tokens).view(u_RW.shape)

    def keep(self, logits_NV: torch.Tensor, ids_N: np.ndarray, rows_N: np.ndarray, positions_N: np.ndarray) -> None:
        """Notes the N written tokens whose logits these are."""
        ids = torch.from_numpy(ids_N).to(logits_NV.device)
        self._waiting.append((logits_NV, ids, rows_N, positions_N))
        if sum(len(entry[2]) for entry in self._waiting) >= TOPK_CHUNK:
            self.finish()

    def finish(self) -> None:
        """Computes what was noted and not yet computed."""
        if not self._waiting:
            return
        logits, ids, rows, positions = zip(*self._waiting, strict=True)
        self._waiting = []
        logits_NV, ids_N = torch.cat(logits).float(), torch.cat(ids)
        place = (torch.from_numpy(np.concatenate(rows)), torch.from_numpy(np.concatenate(positions)))
        self.topk_ids_BTK[place] = topk_ids(logits_NV, self.top_k).cpu()
        scaled_NV = logits_NV / self.temperature if self.temperature > 0 else logits_NV
        self.logprobs_BT[place] = scaled_NV.log_softmax(-1).gather(-1, ids_N[:, None])[:, 0].cpu()


class _Writing:
    """The state of a rollout between its rounds: of the R rows that are in the batch, some of which may be done."""

    def __init__(
        self,
        calls: tuple[Callable[..., Any], Callable[..., Any]],
        inputs: Mapping[str, torch.Tensor],
        drafts: Sequence[Sequence[int] | None],
        picker: _Picker,
        eos_id: int,
        pad_id: int,
        max_new_tokens: int,
        bad_B: np.ndarray,
        forward_cost: float,
    ) -> None:
        (self.forward, self.steps), self.inputs, self.picker = calls, inputs, picker
        self.eos_id, self.pad_id, self.max_new_tokens = eos_id, pad_id, max_new_tokens
        num_rows, self.prompt_length = inputs["input_ids"].shape
        self.device = inputs["input_ids"].device
        self.drafts = Drafts([None if bad else d for d, bad in zip(drafts, bad_B, strict=True)], eos_id, forward_cost)
        self.ids_BT = np.full((num_rows, max_new_tokens), pad_id)
        self.counts_B4 = np.zeros((num_rows, 4), dtype=np.int64)  # tokens written, forwards, drafted, accepted
        self.rows_R = np.arange(num_rows)
        self.going_R = ~bad_B
        self.counts_R4 = self.counts_B4.copy()
        self.last_R = np.full(num_rows, pad_id)  # the token that each row wrote last
        self.rounds = 0
        self.columns = np.arange(max(num_rows, MAX_WIDTH + 1))

    @property
    def has_rows(self) -> bool:
        return bool(self.going_R.any())

    def first_round(self) -> None:
        """Prompt and draft in one forward. Audio goes in here and nowhere else."""
        width, draft_RW = self._drafted()
        ids_RW = self._to_device(np.maximum(draft_RW[:, :width], 0))
        mask_BP = self.inputs["attention_mask"]
        self.cache = self._new_cache(width)
        self.cache.place(0, self.prompt_length + width)
        self.padding_R = mask_BP.argmax(1)  # slots before a row's first real token
        out = self.forward(
            **dict(self.inputs)
            | {
                "input_ids": torch.cat([self.inputs["input_ids"], ids_RW], 1),
                "attention_mask": torch.cat([mask_BP, torch.ones_like(ids_RW, dtype=mask_BP.dtype)], 1),
            },
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=width + 1,
        )
        self._set_hidden()
        self._accept(out.logits, draft_RW)

    def _new_cache(self, width: int) -> RowCache:
        if isinstance(self.steps, GraphSteps):
            # A row that is done runs along: its tokens may come to lie behind the last slot that it could write.
            most = self.prompt_length + self.max_new_tokens + MAX_WIDTH
            return self.steps.new_cache(len(self.rows_R), most)
        return RowCache(self.prompt_length + min(self.max_new_tokens, max(32, 2 * width)))

    def round(self) -> None:
        """The last token of each row and what its draft says next, in one forward."""
        width, draft_RW = self._drafted()
        first_R = np.maximum(self.counts_R4[:, 0] + (self.prompt_length - 1), self.prompt_length)
        planes_2RW = np.empty((2, len(first_R), width + 1), dtype=np.int64)  # one copy to the device for both
        planes_2RW[0, :, 0] = self.last_R
        np.copyto(planes_2RW[0, :, 1:], draft_RW[:, :width])
        np.maximum(planes_2RW[0], 0, out=planes_2RW[0])  # any token where there is no draft; it is never accepted
        np.add(first_R[:, None], self.columns[: width + 1], out=planes_2RW[1])
        ids_RW, slots_RW = self._to_device(planes_2RW)
        low, end = int(first_R.min()), int(first_R.max()) + width + 1
        self.cache.place(low, end, None if end - low == width + 1 else slots_RW)
        out = self.steps(
            input_ids=ids_RW,
            attention_mask=self._mask(slots_RW, end),
            position_ids=slots_RW - self.padding_R,
            past_key_values=self.cache,
            use_cache=True,
        )
        self._accept(out.logits, draft_RW)

    def _drafted(self) -> tuple[int, np.ndarray]:
        """How many draft tokens this round checks, and which: (R, width + 1), -1 where there are none."""
        # One token fewer than there is room for: the student's own comes behind them.
        room_R = np.where(self.going_R, self.max_new_tokens - 1 - self.counts_R4[:, 0], -1)
        width = self.drafts.width(room_R)
        return width, self.drafts.propose(width, room_R)

    def _accept(self, logits_RWV: torch.Tensor, draft_RW: np.ndarray) -> None:
        """Takes over what each row has written in this forward: the agreeing part of its draft and its own token."""
        self.rounds += 1
        written_R, row_R = self.counts_R4[:, 0], self.columns[: len(self.rows_R)]
        token_RW = self.picker.pick(logits_RWV, self.rows_R, written_R).cpu().numpy()
        accepted_R = (draft_RW != token_RW).argmax(1)  # the last column never agrees
        # A draft has EOS at its end only: where that was accepted, nothing comes behind it.
        ended_R = (accepted_R > 0) & (token_RW[row_R, accepted_R - 1] == self.eos_id)
        count_R = np.where(self.going_R, accepted_R + 1 - ended_R, 0)
        self.last_R = token_RW[row_R, count_R - 1]
        row_N, column_N = (self.columns[: token_RW.shape[1]] < count_R[:, None]).nonzero()
        rows_N, position_N, ids_N = self.rows_R[row_N], written_R[row_N] + column_N, token_RW[row_N, column_N]
        self.ids_BT[rows_N, position_N] = ids_N
        flat_N = self._to_device(row_N * token_RW.shape[1] + column_N)
        self.picker.keep(logits_RWV.flatten(0, 1).index_select(0, flat_N), ids_N, rows_N, position_N)
        self.counts_R4[:, 1] += self.going_R
        self.counts_R4[:, 2] += np.count_nonzero(draft_RW >= 0, axis=1)
        self.counts_R4[:, 3] += accepted_R
        self.counts_R4[:, 0] += count_R  # last: written_R is a view of it
        self.going_R &= (self.last_R != self.eos_id) & (self.counts_R4[:, 0] < self.max_new_tokens)
        self.drafts.advance(accepted_R, self.last_R)
        self._let_go()

    def _let_go(self) -> None:
        """Takes finished rows out of the batch, once they are a quarter of it: doing so copies the cache."""
        num_going = np.count_nonzero(self.going_R)
        if 4 * (len(self.rows_R) - num_going) < len(self.rows_R) or not num_going:
            return  # the last rows stay: a rank that is done runs along on them
        self.counts_B4[self.rows_R] = self.counts_R4
        kept_R = self.going_R.nonzero()[0]
        self.rows_R, self.counts_R4, self.last_R = self.rows_R[kept_R], self.counts_R4[kept_R], self.last_R[kept_R]
        self.going_R = self.going_R[kept_R]
        self.drafts.keep(kept_R)
        index = self._to_device(kept_R)
        self.cache.keep(index)
        self.padding_R = self.padding_R[index, 0]
        self._set_hidden()

    def _set_hidden(self) -> None:
        """What a row may never attend to, as an additive mask over all slots: its left padding."""
        self.padding_R = self.padding_R.view(-1, 1)
        dtype = self.cache.dtype
        self.far = torch.finfo(dtype).min
        self.slot_L = torch.arange(self.cache.writes.capacity, device=self.device)
        self.hidden_R11L = ((self.slot_L < self.padding_R).to(dtype) * self.far)[:, None, None]

    def _mask(self, slots_RW: torch.Tensor, end: int) -> torch.Tensor:
        """Additive mask (R, 1, W, end): a token sees its row's own slots up to its own."""
        if end > len(self.slot_L):
            self._set_hidden()
        return self.hidden_R11L[..., :end].masked_fill(self.slot_L[:end] > slots_RW[:, None, :, None], self.far)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def rollout(self, bad_B: torch.Tensor, max_repeats: int) -> Rollout:
        """The record of what was written, T being the longest response (at least 1)."""
        self.picker.finish()
        self.counts_B4[self.rows_R] = self.counts_R4
        written_B = self.counts_B4[:, 0]
        length = max(1, int(written_B.max()))
        ids_BT = torch.from_numpy(self.ids_BT[:, :length].copy())
        mask_BT = torch.from_numpy(np.arange(length) < written_B[:, None])
        return Rollout(
            response_ids_BT=ids_BT,
            response_mask_BT=mask_BT,
            topk_ids_BTK=self.picker.topk_ids_BTK[:, :length].clone(),
            logprobs_BT=self.picker.logprobs_BT[:, :length].clone(),
            finished_B=((ids_BT == self.eos_id) & mask_BT).any(1),
            loop_start_B=loop_starts(ids_BT, mask_BT, max_repeats),
            bad_audio_B=bad_B,
        )

    def counts(self) -> RolloutCounts:
        _, forwards_B, drafted_B, accepted_B = torch.from_numpy(self.counts_B4.copy()).unbind(1)
        return RolloutCounts(self.rounds, forwards_B, drafted_B, accepted_B)
