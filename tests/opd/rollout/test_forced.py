"""A rollout of given texts is what the student would have seen, had it written them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from opd.arkasr import blocked_token_ids, load_model, load_processor
from opd.rollout.decode import decode
from opd.rollout.forced import forced
from opd.vocab import blocked_mask


def test_forced_on_its_own_words_equals_the_rollout(tiny_dir: Path, waveforms: list[np.ndarray]) -> None:
    model, processor = load_model(tiny_dir), load_processor(tiny_dir)
    tokenizer, size = processor.tokenizer, model.config.vocab_size
    arguments = {
        "eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id, "top_k": 5, "max_repeats": 3,
        "blocked_V": blocked_mask(blocked_token_ids(tokenizer, size, tokenizer.eos_token_id), size),
    }  # fmt: skip
    inputs = processor.build_inputs(waveforms)
    rollout = decode(model, inputs, max_new_tokens=8, **arguments)
    rollout.response_mask_BT[1, 5:] = False  # rows of unequal lengths
    rows = [ids[mask].tolist() for ids, mask in zip(rollout.response_ids_BT, rollout.response_mask_BT, strict=True)]
    rows[2] = []
    given = forced(model, inputs, rows, **arguments)
    lengths = [len(row) for row in rows]
    assert given.response_mask_BT.sum(1).tolist() == lengths
    assert given.bad_audio_B.tolist() == [not row for row in rows]
    for row, length in enumerate(lengths):
        assert given.response_ids_BT[row, :length].tolist() == rows[row]
        assert torch.equal(given.topk_ids_BTK[row, :length], rollout.topk_ids_BTK[row, :length])
        torch.testing.assert_close(given.logprobs_BT[row, :length], rollout.logprobs_BT[row, :length])
    assert (given.logprobs_BT[~given.response_mask_BT] == 0).all()
    looping = forced(model, inputs, [[7] * 6, *[[7, tokenizer.eos_token_id]] * 5], **arguments)
    assert looping.loop_start_B.tolist() == [1, *[6] * 5]
    assert looping.finished_B.tolist() == [False, *[True] * 5]
