"""The way from states to logits is the model's own, whatever follows on its output layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opd.teachers.output import OutputLayer

SIZES = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "keys", "is_last"),
    [
        ("qwen2", {}, True),
        ("granite", {"logits_scaling": 8.0}, False),
        ("gemma2", {"final_logit_softcapping": 30.0}, False),
        ("gemma2", {"final_logit_softcapping": None}, True),
    ],
)
@pytest.mark.parametrize("kept", [0, 3])
def test_states_lead_to_the_logits_of_the_model(kind: str, keys: dict[str, Any], is_last: bool, kept: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **keys)).eval()
    inputs = {"input_ids": torch.randint(1, 90, (2, 5)), "logits_to_keep": kept}
    output = OutputLayer(model)
    with torch.no_grad():
        expected_BLV = model(**inputs).logits
        for _ in range(2):
            states_BLD, to_logits = output.states(model, inputs)
            assert states_BLD.shape[-1] == (32 if is_last else 90)
            torch.testing.assert_close(to_logits(states_BLD), expected_BLV, rtol=0, atol=1e-6)
    assert output.is_last == is_last
