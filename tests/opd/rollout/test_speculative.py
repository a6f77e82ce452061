"""Speculative decoding against plain decoding: the same tokens whatever the draft, and the model's own distribution."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import SIZES
from transformers import Qwen2Config, Qwen2ForCausalLM

from opd.arkasr import ArkasrForConditionalGeneration, blocked_token_ids, load_model, load_processor
from opd.rollout.decode import decode, uniforms
from opd.rollout.speculative import RolloutCounts, forward_cost, speculate, topk_ids
from opd.rollout.steps import DecoderSteps, can_step
from opd.types import Rollout
from opd.vocab import blocked_mask

SEED_STUDENT = Path(__file__).resolve().parents[3] / "seeds" / "tiny_student"
MAX_NEW_TOKENS = 20
COSTS = [4.0, 100.0, 2000.0]  # drafts of one or two tokens, of several, and whole ones


def arguments_of(model: Any, processor: Any) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    blocked = blocked_token_ids(tokenizer, model.config.vocab_size, tokenizer.eos_token_id)
    return {
        "eos_id": tokenizer.eos_token_id,
        "pad_id": tokenizer.pad_token_id,
        "blocked_V": blocked_mask(blocked, model.config.vocab_size),
        "max_new_tokens": MAX_NEW_TOKENS,
        "top_k": 5,
    }


@pytest.fixture(scope="module", params=["random", "trained"])
def setup(request: pytest.FixtureRequest, tiny_dir: Path, waveforms: list[np.ndarray]):
    """A random model, which rarely ends a response, and the shipped student, which ends each after some digits."""
    path = tiny_dir if request.param == "random" else SEED_STUDENT
    model, processor = load_model(path), load_processor(path)
    return model.eval(), processor.build_inputs(waveforms), arguments_of(model, processor)


def written(rollout: Rollout) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(rollout.response_ids_BT, rollout.response_mask_BT, strict=True)]


def corrupted(ids: list[int], rate: float, rng: random.Random) -> list[int]:
    """Ids with substitutions, deletions and insertions at a rate."""
    out: list[int] = []
    for token in ids:
        kind = rng.choice("sdi") if rng.random() < rate else ""
        out += [] if kind == "d" else [rng.randrange(40, 200)] if kind == "s" else [token]
        out += [rng.randrange(40, 200)] if kind == "i" else []
    return out


def drafts_for(responses: list[list[int]], eos_id: int) -> dict[str, list[list[int] | None] | None]:
    rng = random.Random(3)
    own = [[i for i in ids if i != eos_id] for ids in responses]
    return {
        "none": None,
        "own": list(own),
        "wer25": [corrupted(ids, 0.25, rng) for ids in own],
        "of another": [*own[1:], own[0]],
        "useless": [[rng.randrange(40, 200) for _ in range(30)] for _ in own],
        "some": [own[0], None, [], corrupted(own[3], 0.5, rng), None, own[5]],
        "too long": [ids + ids + ids for ids in own],
    }


def assert_same(rollout: Rollout, plain: Rollout) -> None:
    mask = plain.response_mask_BT
    for name in ("response_ids_BT", "response_mask_BT", "finished_B", "loop_start_B", "bad_audio_B"):
        assert torch.equal(getattr(rollout, name), getattr(plain, name)), name
    # Rounding may exchange two ids that are equally likely.
    assert (rollout.topk_ids_BTK[mask] == plain.topk_ids_BTK[mask]).float().mean() > 0.99 or not mask.any()
    torch.testing.assert_close(rollout.logprobs_BT, plain.logprobs_BT, atol=1e-4, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_any_draft_gives_what_plain_decoding_writes(setup, temperature: float) -> None:
    model, inputs, arguments = setup
    u_BT = uniforms(0, 1, list("abcdef"), MAX_NEW_TOKENS) if temperature else None
    arguments = arguments | {"temperature": temperature, "uniforms_BT": u_BT}
    plain = decode(model, inputs, **arguments)
    for drafts in drafts_for(written(plain), arguments["eos_id"]).values():
        for cost in COSTS:
            assert_same(speculate(model, inputs, drafts=drafts, forward_cost=cost, **arguments)[0], plain)
    assert_same(speculate(model, inputs, steps=DecoderSteps(model), drafts=drafts, **arguments)[0], plain)


def test_batch_mates_and_their_drafts_change_nothing(setup) -> None:
    model, inputs, arguments = setup
    u_BT = uniforms(0, 1, list("abcdef"), MAX_NEW_TOKENS)
    together, _ = speculate(model, inputs, drafts=None, temperature=0.7, uniforms_BT=u_BT, **arguments)
    drafts = drafts_for(written(together), arguments["eos_id"])["some"]
    assert drafts is not None
    for row in range(6):
        one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        alone, _ = speculate(
            model, one, drafts=[drafts[row]], temperature=0.7, uniforms_BT=u_BT[row : row + 1], **arguments
        )
        assert written(alone) == written(together)[row : row + 1]


def test_one_forward_for_a_draft_that_is_right(setup) -> None:
    model, inputs, arguments = setup
    plain = decode(model, inputs, **arguments)
    drafts = drafts_for(written(plain), arguments["eos_id"])["own"]
    rollout, counts = speculate(model, inputs, drafts=drafts, forward_cost=1e6, **arguments)
    assert counts.rounds == 1
    assert counts.forwards_B.tolist() == [1] * 6
    # A response cut by the limit ends in a token of the student's own, any other in the draft's EOS.
    own = (~rollout.finished_B).long()
    assert torch.equal(counts.accepted_B, rollout.response_mask_BT.sum(1) - own)


def test_a_useless_draft_is_given_up(setup) -> None:
    model, inputs, arguments = setup
    plain = decode(model, inputs, **arguments)
    drafts = drafts_for(written(plain), arguments["eos_id"])["useless"]
    _, counts = speculate(model, inputs, drafts=drafts, forward_cost=60.0, **arguments)
    assert counts.rounds <= plain.response_ids_BT.shape[1]
    # Two tries or so, not one in each of the rounds.
    assert counts.drafted_B.float().mean() < 20


def test_rows_may_be_bad_short_or_all_bad(setup) -> None:
    model, inputs, arguments = setup
    for limit, bad in product((1, 2, 5), ([0] * 6, [0, 1, 0, 1, 1, 0], [1] * 6)):
        options = arguments | {"max_new_tokens": limit, "bad_audio_B": torch.tensor(bad, dtype=torch.bool)}
        plain = decode(model, inputs, **options)
        for drafts in drafts_for(written(plain), arguments["eos_id"]).values():
            rollout, counts = speculate(model, inputs, drafts=drafts, forward_cost=500.0, **options)
            assert_same(rollout, plain)
            assert counts.forwards_B[options["bad_audio_B"]].sum() == 0


def test_grouped_keys_eager_attention_and_bfloat16(waveforms: list[np.ndarray], tmp_path: Path) -> None:
    from opd.seed import create_seed

    sizes = SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 128}
    path = create_seed(tmp_path, sizes=sizes, corpus=["one two three"], vocab_size=300, seed=4)
    processor = load_processor(path)
    inputs = processor.build_inputs(waveforms)
    for options in ({}, {"attn_implementation": "eager"}):
        model = load_model(path, **options).eval()
        arguments = arguments_of(model, processor)
        plain = decode(model, inputs, **arguments)
        drafts = drafts_for(written(plain), arguments["eos_id"])["wer25"]
        for steps in (None, DecoderSteps(model)):
            assert_same(speculate(model, inputs, steps=steps, drafts=drafts, **arguments)[0], plain)
    # Other shapes round differently there, so only what a row was given to read is the same.
    half = load_model(path, dtype=torch.bfloat16).eval()
    for steps in (None, DecoderSteps(half)):
        rollout, counts = speculate(half, inputs, steps=steps, drafts=drafts, **arguments)
        assert torch.isfinite(rollout.logprobs_BT).all()
        assert counts.accepted_B.sum() > 0


# -- the distribution --------------------------------------------------------------------------------------------------

EOS, VOCAB, LENGTH = 5, 7, 3
CHI2_P001 = {3: 16.27, 4: 18.47, 5: 20.52}


@pytest.fixture(scope="module")
def small_model() -> Qwen2ForCausalLM:
    torch.manual_seed(2)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, initializer_range=0.6, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def sequence_probabilities(model: Qwen2ForCausalLM, prompt: list[int], temperature: float) -> dict[tuple, float]:
    """Probability of every response of up to LENGTH tokens, from full forwards in float64; id 6 is blocked."""
    model = model.double()
    found: dict[tuple, float] = {}

    def extend(ids: tuple, probability: float) -> None:
        if ids and (ids[-1] == EOS or len(ids) == LENGTH):
            found[ids] = probability
            return
        logits_V = model(torch.tensor([[*prompt, *ids]])).logits[0, -1]
        logits_V[6] = float("-inf")
        for token, p in enumerate((logits_V / temperature).softmax(-1).tolist()):
            if token != 6:
                extend((*ids, token), probability * p)

    with torch.no_grad():
        extend((), 1.0)
    model.float()
    return found


@pytest.mark.parametrize("steps", [lambda model: None, DecoderSteps], ids=["forward", "steps"])
def test_the_responses_follow_the_models_distribution(small_model, steps: Callable) -> None:
    """Chi-square over all whole responses, for drafts that are likely, unlikely, cut short, and none."""
    num, temperature, prompt = 4_000, 0.8, [1, 2, 3]
    expected = sequence_probabilities(small_model, prompt, temperature)
    assert sum(expected.values()) == pytest.approx(1.0)
    likely = max(expected, key=lambda ids: expected[ids])
    unlikely = min(expected, key=lambda ids: expected[ids])
    inputs = {
        "input_ids": torch.tensor([prompt] * num),
        "attention_mask": torch.ones(num, len(prompt), dtype=torch.int64),
    }
    blocked_V = torch.arange(VOCAB) == 6
    for seed, draft in enumerate([list(likely), list(unlikely), list(likely[:1]), None]):
        u_BT = torch.rand(num, LENGTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rollout, counts = speculate(
            small_model, inputs, steps=steps(small_model), drafts=[draft] * num, eos_id=EOS, pad_id=0,
            blocked_V=blocked_V, max_new_tokens=LENGTH, top_k=3, temperature=temperature, uniforms_BT=u_BT,
            forward_cost=1e9,
        )  # fmt: skip
        seen: dict[tuple, int] = {}
        for ids in map(tuple, written(rollout)):
            seen[ids] = seen.get(ids, 0) + 1
        assert seen.keys() <= expected.keys()
        assert chi2_z(seen, expected, num) < 3.1, "one in a thousand"
        if draft:
            first = sum(p for ids, p in expected.items() if ids[0] == draft[0])
            share = float((rollout.response_ids_BT[:, 0] == draft[0]).float().mean())
            assert abs(share - first) < 3.3 * (first * (1 - first) / num) ** 0.5, "accepted as often as it is likely"
            assert counts.accepted_B.sum() > 0


def chi2_z(seen: dict[tuple, int], expected: dict[tuple, float], num: int) -> float:
    """Chi-square of counts, responses expected fewer than five times taken together, as a standard normal deviate."""
    rare = [ids for ids, p in expected.items() if num * p < 5]
    cells = [(seen.get(ids, 0), num * p) for ids, p in expected.items() if num * p >= 5]
    cells.append((sum(seen.get(ids, 0) for ids in rare), num * sum(expected[ids] for ids in rare)))
    cells = [cell for cell in cells if cell[1] > 0]
    assert len(cells) > 30
    chi2, degrees = sum((n - e) ** 2 / e for n, e in cells), len(cells) - 1
    # Wilson and Hilferty's approximation.
    return ((chi2 / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / (2 / (9 * degrees)) ** 0.5


def test_steps_know_which_models_they_compute(small_model) -> None:
    assert can_step(small_model)
    assert not can_step(torch.nn.Linear(2, 2))
    windowed = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=9,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            use_sliding_window=True,
            sliding_window=4,
            max_window_layers=0,
        )  # fmt: skip
    )
    assert not can_step(windowed)
    changed = Qwen2ForCausalLM(small_model.config)
    changed.model.layers[1].self_attn.q_proj = torch.nn.Sequential(changed.model.layers[1].self_attn.q_proj)
    assert not can_step(changed)


def test_a_forward_costs_more_tokens_where_reading_weights_is_slow() -> None:
    tiny, large = forward_cost(150_000, 2, "cpu"), forward_cost(25_000_000, 8, "cpu")
    assert tiny > 5 * large
    assert forward_cost(3_000_000_000, 36, "cuda") > tiny


@pytest.mark.parametrize(("vocab_size", "k"), [(7, 3), (384, 32), (1001, 32), (5001, 32), (12_345, 5)])
def test_topk_ids_are_those_of_topk(vocab_size: int, k: int) -> None:
    logits_NV = torch.randn(50, vocab_size, generator=torch.Generator().manual_seed(k))
    logits_NV[:, torch.arange(vocab_size) % 3 == 1] = float("-inf")
    logits_NV[:20, k + 1 :] = float("-inf")  # hardly more than k are allowed, all in few groups
    k = min(k, int((logits_NV > float("-inf")).sum(1).min()))
    assert torch.equal(topk_ids(logits_NV, k), logits_NV.topk(k, dim=-1).indices)


def test_counts_are_plain_numbers(setup) -> None:
    model, inputs, arguments = setup
    _, counts = speculate(model, inputs, drafts=None, **arguments)
    assert isinstance(counts, RolloutCounts)
    assert counts.drafted_B.tolist() == counts.accepted_B.tolist() == [0] * 6
    assert counts.forwards_B.max() == counts.rounds
    assert isinstance(model, ArkasrForConditionalGeneration)
