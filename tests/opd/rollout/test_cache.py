"""The cache of a rollout against transformers' own: rows of their own lengths, rejected tokens, rows that leave."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from opd.rollout import steps
from opd.rollout.cache import RowCache

PROMPT = 5


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, initializer_range=0.3,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def alone(model: Qwen2ForCausalLM, ids: list[int]) -> torch.Tensor:
    """Logits at the last position of one sequence, nothing cached."""
    return model(torch.tensor([ids]), past_key_values=DynamicCache()).logits[0, -1]


@pytest.mark.parametrize("kind", ["forward", "steps", "steps_sdpa"])
@pytest.mark.parametrize("capacity", [PROMPT + 2, 64])
@torch.no_grad()
def test_rows_grow_at_their_own_pace(
    model: Qwen2ForCausalLM, kind: str, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rows take 0 to 3 of four tokens a round; the others are rejected. One row leaves half-way."""
    if kind == "steps_sdpa":
        monkeypatch.setattr(steps, "SCORES", 0)
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(1, 50, shape, generator=generator)

    step = model if kind == "forward" else steps.DecoderSteps(model)
    prompts = [draw(PROMPT - pad).tolist() for pad in (0, 2, 1)]
    padding_R = torch.tensor([0, 2, 1])
    cache = RowCache(capacity)
    cache.place(0, PROMPT)
    ids = torch.tensor([[0] * (PROMPT - len(p)) + p for p in prompts])
    model(ids, attention_mask=(torch.arange(PROMPT) >= padding_R[:, None]).long(), past_key_values=cache,
          position_ids=(torch.arange(PROMPT) - padding_R[:, None]).clamp(min=0))  # fmt: skip
    taken = [list(p) for p in prompts]
    length_R = torch.full((3,), PROMPT)
    for round_ in range(6):
        tokens_RW = draw(len(taken), 4)
        slots_RW = length_R[:, None] + torch.arange(4)
        end = int(slots_RW.max()) + 1
        cache.place(int(length_R.min()), end, slots_RW)
        slot_L = torch.arange(end)
        hidden = (slot_L > slots_RW[:, :, None]) | (slot_L < padding_R[:, None, None])
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[:, None]
        logits_RWV = step(
            input_ids=tokens_RW, attention_mask=mask, position_ids=slots_RW - padding_R[:, None],
            past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip
        for row, ids in enumerate(taken):
            for column in range(4):
                expected = alone(model, [*ids, *tokens_RW[row, : column + 1].tolist()])
                torch.testing.assert_close(logits_RWV[row, column], expected, atol=2e-5, rtol=0)
            accepted = (row + round_) % 4
            taken[row] = ids + tokens_RW[row, :accepted].tolist()
            length_R[row] += accepted
        if round_ == 2:
            kept = torch.tensor([0, 2])
            cache.keep(kept)
            taken, length_R, padding_R = [taken[0], taken[2]], length_R[kept], padding_R[kept]


@torch.no_grad()
def test_all_rows_at_one_place_are_written_as_one(model: Qwen2ForCausalLM) -> None:
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    caches = [RowCache(6), RowCache(6)]
    for cache, slots_RW in zip(caches, (None, torch.tensor([[3], [3]])), strict=True):
        cache.place(0, 3)
        model(ids[:, :3], past_key_values=cache)
        cache.place(3, 4, slots_RW)
        mask = torch.zeros(2, 1, 1, 4)
        model(ids[:, 3:], attention_mask=mask, position_ids=torch.tensor([[3], [3]]), past_key_values=cache)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.values, other.values)
    assert caches[0].get_seq_length() == 4


def test_a_layer_has_every_method_that_some_transformers_asks_for() -> None:
    cache = RowCache(4)
    states = torch.zeros(1, 2, 3, 4)
    cache.place(0, 3)
    cache.update(states, states, 0)
    assert (cache.layers[0].get_max_length(), cache.layers[0].get_max_cache_shape()) == (-1, -1)
    assert not cache.layers[0].__abstractmethods__
