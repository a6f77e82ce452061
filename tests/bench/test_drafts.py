"""What bench.rollout is made of: drafts at a stated error rate, and a larger model that computes a small one's function."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from kaldialign import edit_distance

from bench.drafts import widen, with_errors
from opd.arkasr import load_model, load_processor
from opd.rollout.steps import can_step


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25])
def test_drafts_have_the_stated_error_rate_and_all_three_kinds(rate: float) -> None:
    rng = random.Random(0)
    words = [f"w{i}" for i in range(100)]
    texts = [" ".join(rng.choice(words) for _ in range(20)) for _ in range(200)]
    found = [edit_distance(t.split(), with_errors(t, rate, words, rng).split()) for t in texts]
    total = sum(f["total"] for f in found) / (20 * len(texts))
    assert total == pytest.approx(rate, abs=0.015)
    if rate:
        for kind in ("ins", "del", "sub"):
            assert sum(f[kind] for f in found) / sum(f["total"] for f in found) > 0.25


@torch.no_grad()
def test_the_larger_model_computes_the_small_ones_function(tiny_dir: Path, waveforms: list[np.ndarray]) -> None:
    small = load_model(tiny_dir)
    inputs = load_processor(tiny_dir).build_inputs(waveforms)
    large = widen(small, 128, 4)
    decoders = [sum(p.numel() for p in model.model.layers.parameters()) for model in (small, large)]
    assert decoders[1] > 5 * decoders[0]
    assert can_step(large)
    torch.testing.assert_close(large(**inputs).logits, small(**inputs).logits, atol=1e-4, rtol=0)
    # Not by leaving the new part empty: all of it is computed, and only its way back is closed.
    assert (large.model.layers[3].self_attn.q_proj.weight != 0).all()
    assert (large.model.layers[0].mlp.up_proj.weight != 0).all()
