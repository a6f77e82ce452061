"""Fresh seeds: deterministic, loadable, with a tokenizer that fits its corpus."""

from __future__ import annotations

import pytest
import torch

from opd.arkasr import load_model, load_processor
from opd.seed import ADDED_TOKENS, create_seed, train_tokenizer

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96,
    "initializer_range": 0.05,
    "whisper": {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 128,
                "num_mel_bins": 80, "max_source_positions": 100},
}  # fmt: skip


def corpus() -> list[str]:
    return [" ".join(DIGITS[(i * 7 + j * 3) % 10] for j in range(1 + i % 5)) for i in range(200)]


def test_the_same_arguments_give_the_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        state = torch.get_rng_state()
        create_seed(tmp_path / name, sizes=SIZES, corpus=corpus(), vocab_size=400, seed=seed)
        assert torch.equal(torch.get_rng_state(), state), "the caller's random state must not move"
    files = {name: {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc"}
    assert files["a"] == files["b"]
    differing = {name for name, content in files["a"].items() if files["c"][name] != content}
    assert differing == {"model.safetensors"}


def test_the_seed_is_what_was_asked_for(tmp_path):
    path = create_seed(tmp_path / "seed", sizes=SIZES, corpus=corpus(), vocab_size=400, seed=0)
    model, processor = load_model(path), load_processor(path)
    tokenizer, config = processor.tokenizer, model.config
    assert config.vocab_size == 400
    assert (config.hidden_size, config.num_key_value_heads, config.whisper_config.encoder_ffn_dim) == (64, 1, 128)
    assert model.audio_encoder.whisper.embed_positions.weight.shape == (100, 64)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.05, rel=0.1)
    ids = tokenizer.convert_tokens_to_ids(ADDED_TOKENS)
    assert ids == list(range(len(tokenizer) - 9, len(tokenizer)))
    assert config.audio_token_id == tokenizer.convert_tokens_to_ids("<|audio|>")
    assert config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert config.pad_token_id == tokenizer.pad_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert not list(path.glob("*.py"))


@pytest.mark.parametrize("vocab_size", [384, 1000])
def test_words_are_single_tokens_at_the_start_and_after_a_space(vocab_size):
    tokenizer = train_tokenizer(corpus(), vocab_size)
    for word in DIGITS:
        assert len(tokenizer(word)["input_ids"]) == 1, word
        assert len(tokenizer(" " + word)["input_ids"]) == 1, word
    text = "three nine zero"
    assert len(tokenizer(text)["input_ids"]) == 3
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_any_text_survives_the_tokenizer():
    tokenizer = train_tokenizer(corpus(), 384)
    text = "Ünïcode, 数字 and\ttabs – 😀"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert set(tokenizer("one")) == {"input_ids", "attention_mask"}


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="at least 265"):
        train_tokenizer(corpus(), 264)
    sizes = {k: v for k, v in SIZES.items() if k not in ("whisper", "hidden_size")}
    with pytest.raises(ValueError, match="hidden_size, whisper missing"):
        create_seed(tmp_path / "seed", sizes=sizes, corpus=corpus(), vocab_size=400, seed=0)
