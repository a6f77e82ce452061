"""Forwards on fixed memory against plain decoding. Without CUDA nothing is captured; the memory is used as a graph uses it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from opd.arkasr import blocked_token_ids, load_model, load_processor
from opd.rollout.decode import decode, uniforms
from opd.rollout.graphs import SLOTS, GraphSteps
from opd.rollout.speculative import speculate
from opd.types import Rollout
from opd.vocab import blocked_mask

SEED_STUDENT = Path(__file__).resolve().parents[3] / "seeds" / "tiny_student"


@pytest.fixture(scope="module", params=["random", "trained"])
def setup(request: pytest.FixtureRequest, tiny_dir: Path, waveforms: list[np.ndarray]) -> tuple[Any, dict, dict]:
    path = tiny_dir if request.param == "random" else SEED_STUDENT
    model, processor = load_model(path), load_processor(path)
    tokenizer = processor.tokenizer
    blocked = blocked_token_ids(tokenizer, model.config.vocab_size, tokenizer.eos_token_id)
    arguments = {
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "blocked_V": blocked_mask(blocked, model.config.vocab_size),
        "max_new_tokens": 20,
        "top_k": 5,
    }
    return model, processor.build_inputs(waveforms), arguments


def assert_same(rollout: Rollout, plain: Rollout) -> None:
    for name in ("response_ids_BT", "response_mask_BT", "finished_B"):
        assert torch.equal(getattr(rollout, name), getattr(plain, name)), name
    torch.testing.assert_close(rollout.logprobs_BT, plain.logprobs_BT, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_fixed_memory_gives_what_plain_decoding_writes(setup: tuple[Any, dict, dict], temperature: float) -> None:
    """One rollout after the other on the same memory: more rows, fewer, longer ones; with drafts and without."""
    model, inputs, arguments = setup
    steps = GraphSteps(model)
    rng = random.Random(0)
    for rows, limit in ((slice(0, 3), 12), (slice(0, 6), 20), (slice(2, 6), 20), (slice(1, 2), 5)):
        part = {name: tensor[rows] for name, tensor in inputs.items()}
        names = list("abcdef")[rows]
        options = arguments | {"max_new_tokens": limit, "temperature": temperature}
        options["uniforms_BT"] = uniforms(0, 1, names, limit) if temperature else None
        plain = decode(model, part, **options)
        own = [ids[mask].tolist() for ids, mask in zip(plain.response_ids_BT, plain.response_mask_BT, strict=True)]
        wrong = [[rng.randrange(40, 200) if rng.random() < 0.3 else i for i in ids] for ids in own]
        for drafts in (None, wrong, [*own[1:], None]):
            rollout, _ = speculate(model, part, steps=steps.bind(model), drafts=drafts, forward_cost=30.0, **options)
            assert_same(rollout, plain)


def test_buffers_stay_where_they_are(setup: tuple[Any, dict, dict]) -> None:
    """What a graph has to rely on: keys, values and inputs do not move while a store and the weights stay."""
    model, inputs, arguments = setup
    steps = GraphSteps(model)

    def places() -> list[int]:
        buckets = steps._buckets.values()
        tensors = [t for b in buckets for t in (b.ids_RW, b.positions_RW, b.places_RWH, b.mask_R1WL, b.logits_NV)]
        assert steps.store is not None
        return [t.data_ptr() for t in (*tensors, *(t for layer in steps.store.layers for t in layer))]

    speculate(model, inputs, steps=steps, drafts=None, **arguments)
    before, sizes = places(), set(steps._buckets)
    assert (6, 1) in sizes
    fewer = {name: tensor[:4] for name, tensor in inputs.items()}
    speculate(model, fewer, steps=steps.bind(model), drafts=None, **arguments)
    speculate(model, inputs, steps=steps.bind(model), drafts=None, **arguments)
    assert set(steps._buckets) >= sizes | {(4, 1)}
    assert [place for place in before if place not in places()] == []
    assert steps.store is not None and steps.store.capacity % SLOTS == 0


def test_other_weights_are_noticed(setup: tuple[Any, dict, dict]) -> None:
    model, inputs, arguments = setup
    steps = GraphSteps(model)
    before, _ = speculate(model, inputs, steps=steps, drafts=None, **arguments)
    weight = model.model.layers[0].mlp.up_proj.weight
    old, kept = weight.data, weight.detach().clone()
    try:
        weight.data.mul_(3.0)  # in place, as an optimizer does it: nothing has to be made anew
        buckets = dict(steps._buckets)
        assert_same(speculate(model, inputs, steps=steps.bind(model), drafts=None, **arguments)[0],
                    decode(model, inputs, **arguments))  # fmt: skip
        assert all(steps._buckets[size] is bucket for size, bucket in buckets.items())
        weight.data = kept.clone()
        after, _ = speculate(model, inputs, steps=steps.bind(model), drafts=None, **arguments)
        assert_same(after, before)
        assert not any(bucket in buckets.values() for bucket in steps._buckets.values())
    finally:
        weight.data = old.copy_(kept)


@torch.no_grad()
def test_grouped_heads_and_half_precision() -> None:
    """The decoder of a larger model: fewer key heads than query heads, bfloat16; the same logits as its modules give."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=90, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(0, 80, (5, 7)), "attention_mask": torch.ones(5, 7, dtype=torch.int64)}
    arguments = {"eos_id": 88, "pad_id": 89, "blocked_V": torch.zeros(90, dtype=torch.bool), "top_k": 3}

    def run(**options: Any) -> Rollout:
        return speculate(model, inputs, drafts=None, max_new_tokens=9, **arguments, **options)[0]

    assert_same(run(steps=GraphSteps(model)), decode(model, inputs, max_new_tokens=9, **arguments))
    model = model.bfloat16()
    eager, fixed = run(), run(steps=GraphSteps(model))
    # Rounding decides between near ties: the first tokens come from the same prompt forward.
    assert torch.equal(eager.response_ids_BT[:, 0], fixed.response_ids_BT[:, 0])
    torch.testing.assert_close(eager.logprobs_BT[:, :2], fixed.logprobs_BT[:, :2], atol=0.1, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need CUDA")
def test_graphs_write_the_same(setup: tuple[Any, dict, dict]) -> None:
    model, inputs, arguments = setup
    model, inputs = model.cuda(), {name: tensor.cuda() for name, tensor in inputs.items()}
    arguments = arguments | {"blocked_V": arguments["blocked_V"].cuda()}
    try:
        steps = GraphSteps(model)
        plain = decode(model, inputs, **arguments)
        for _ in range(3):
            assert_same(speculate(model, inputs, steps=steps.bind(model), drafts=None, **arguments)[0], plain)
        assert any(bucket.graph is not None for bucket in steps._buckets.values())
    finally:
        model.cpu()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a capture succeeds on CUDA")
def test_a_capture_that_fails_says_how_to_do_without(setup: tuple[Any, dict, dict]) -> None:
    """Torch without a device has no graphs."""
    model, inputs, arguments = setup
    steps = GraphSteps(model)
    assert not steps.use_graphs
    steps.use_graphs = True
    with pytest.raises(RuntimeError, match=r"of 6 rows of 1 tokens cannot .* set rollout\.cuda_graphs=false"):
        speculate(model, inputs, steps=steps, drafts=None, **arguments)
    assert steps.num_graphs == 0
