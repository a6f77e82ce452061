"""Decoding against transformers' own generate, sampling against the model's own distribution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from opd.arkasr import blocked_token_ids, load_model, load_processor
from opd.rollout.decode import decode, pick, split, uniforms
from opd.types import Rollout
from opd.vocab import blocked_mask


@pytest.fixture(scope="module")
def setup(tiny_dir: Path):
    model, processor = load_model(tiny_dir), load_processor(tiny_dir)
    tokenizer = processor.tokenizer
    blocked = blocked_token_ids(tokenizer, model.config.vocab_size, tokenizer.eos_token_id)
    arguments = {
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "blocked_V": blocked_mask(blocked, model.config.vocab_size),
        "max_new_tokens": 12,
        "top_k": 5,
    }
    return model, processor, arguments


def written(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids_BT, rollout.response_mask_BT, strict=True)]


def test_greedy_equals_generate_token_for_token(setup, waveforms: list[np.ndarray]) -> None:
    model, processor, arguments = setup
    inputs = processor.build_inputs(waveforms)
    blocked = arguments["blocked_V"].nonzero()[:, 0].tolist()
    reference = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, bad_words_ids=[[i] for i in blocked],
        eos_token_id=arguments["eos_id"], pad_token_id=arguments["pad_id"],
    )[:, inputs["input_ids"].shape[1] :]  # fmt: skip
    rollout = decode(model, inputs, **arguments)
    length = rollout.response_ids_BT.shape[1]
    assert torch.equal(rollout.response_ids_BT, reference[:, :length])


def test_a_row_does_not_depend_on_its_batch(setup, waveforms: list[np.ndarray]) -> None:
    model, processor, arguments = setup
    together = written(decode(model, processor.build_inputs(waveforms), **arguments))
    alone = [written(decode(model, processor.build_inputs([w]), **arguments))[0] for w in waveforms]
    assert together == alone


def test_logprobs_and_topk_are_those_of_a_full_forward(setup, waveforms: list[np.ndarray]) -> None:
    model, processor, arguments = setup
    inputs = processor.build_inputs(waveforms)
    rollout = decode(model, inputs, **arguments)
    length = rollout.response_ids_BT.shape[1]
    joined = dict(inputs)
    joined["input_ids"] = torch.cat([inputs["input_ids"], rollout.response_ids_BT], 1)
    joined["attention_mask"] = torch.cat([inputs["attention_mask"], rollout.response_mask_BT.long()], 1)
    logits_BTV = model(**joined, logits_to_keep=length + 1).logits[:, :-1]
    logprobs_BTV = logits_BTV.masked_fill(arguments["blocked_V"], float("-inf")).log_softmax(-1)
    mask = rollout.response_mask_BT
    expected = logprobs_BTV.gather(-1, rollout.response_ids_BT[..., None])[..., 0]
    torch.testing.assert_close(rollout.logprobs_BT[mask], expected[mask], atol=1e-4, rtol=0)
    assert torch.equal(rollout.topk_ids_BTK[mask][:, 0], rollout.response_ids_BT[mask])
    top = logprobs_BTV.topk(5, -1).values
    torch.testing.assert_close(logprobs_BTV.gather(-1, rollout.topk_ids_BTK)[mask], top[mask], atol=1e-4, rtol=0)


def test_control_tokens_are_never_written(setup, waveforms: list[np.ndarray]) -> None:
    model, processor, arguments = setup
    u = uniforms(0, 1, [str(i) for i in range(len(waveforms))], 12)
    rollout = decode(model, processor.build_inputs(waveforms), **arguments, temperature=3.0, uniforms_BT=u)
    ids = rollout.response_ids_BT[rollout.response_mask_BT]
    assert not arguments["blocked_V"][ids].any()
    for row in written(rollout):
        assert arguments["eos_id"] not in row[:-1], "nothing is written after EOS"


def test_sampling_follows_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, float("-inf"), 0.0, -1.0]])
    num = 40_000
    u = torch.rand(num, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tokens, logprobs = pick(logits.expand(num, -1), 0.7, u)
    expected = (logits[0] / 0.7).softmax(-1)
    counts = torch.bincount(tokens, minlength=5)
    allowed = expected > 0
    chi2 = (((counts - num * expected) ** 2)[allowed] / (num * expected)[allowed]).sum()
    assert counts[2] == 0
    assert chi2 < 16.27, "chi-square with 3 degrees of freedom, p = 0.001"
    torch.testing.assert_close(logprobs, expected.log()[tokens])
    edge = torch.tensor([0.0, 1.0 - 1e-16], dtype=torch.float64)
    assert pick(logits.expand(2, -1), 1.0, edge)[0].tolist() == [0, 4]


def test_uniforms_depend_on_seed_step_and_utterance_only() -> None:
    both = uniforms(3, 7, ["a", "b"], 5)
    assert torch.equal(uniforms(3, 7, ["b"], 5)[0], both[1])
    assert not torch.equal(uniforms(3, 8, ["b"], 5)[0], both[1])
    assert not torch.equal(uniforms(4, 7, ["b"], 5)[0], both[1])


def test_bad_audio_rows_write_nothing_and_the_limit_leaves_no_eos(setup, waveforms: list[np.ndarray]) -> None:
    model, processor, arguments = setup
    bad = torch.tensor([False, True] + [False] * (len(waveforms) - 2))
    rollout = decode(model, processor.build_inputs(waveforms), **(arguments | {"max_new_tokens": 1}), bad_audio_B=bad)
    assert rollout.response_mask_BT.sum(1).tolist() == [1, 0] + [1] * (len(waveforms) - 2)
    ended = rollout.response_ids_BT[:, 0] == arguments["eos_id"]
    assert torch.equal(rollout.finished_B, ended & ~bad)


def test_split_keeps_every_written_token(setup, waveforms: list[np.ndarray]) -> None:
    model, processor, arguments = setup
    rollout = decode(model, processor.build_inputs(waveforms), **arguments)
    parts = split(rollout, [[0, 1, 2, 3], [4, 5]])
    assert [p.response_ids_BT.shape[0] for p in parts] == [4, 2]
    assert [row for part in parts for row in written(part)] == written(rollout)
    assert all(p.response_mask_BT.any(0)[-1] or p.response_mask_BT.shape[1] == 1 for p in parts)
