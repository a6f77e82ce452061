"""A fresh, randomly initialised small ARK-ASR folder, with a tokenizer trained on the texts it is meant for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from opd.arkasr import ArkasrConfig, ArkasrForConditionalGeneration, ArkasrProcessor
from opd.arkasr.processing_arkasr import DEFAULT_INSTRUCTION, END_TURN, EXTRA_SPECIAL_TOKENS
from opd.export import save_arkasr

PAD_TOKEN, AUDIO_TOKEN = "<|endoftext|>", "<|audio|>"
NUM_BYTES = 256
# In the order of their ids in ARK-ASR. `<|audio|>` is an added token that is not special there either.
ADDED_TOKENS = [PAD_TOKEN, "<|im_start|>", END_TURN, AUDIO_TOKEN, *EXTRA_SPECIAL_TOKENS]
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def create_seed(
    out_dir: str | os.PathLike, *, sizes: Mapping[str, Any], corpus: Sequence[str], vocab_size: int, seed: int
) -> Path:
    """Writes the folder (float32, no remote code) and returns its path. The same arguments give the same bytes.

    sizes       hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, intermediate_size, whisper
                (fields of WhisperConfig: d_model, encoder_layers, num_mel_bins, ...); other fields of ArkasrConfig too
    corpus      texts that the tokenizer is trained on
    vocab_size  rows of the embedding; where the corpus has fewer tokens, the last rows are unused
    """
    fields = dict(sizes)
    if missing := [name for name in (*SIZES, "whisper") if name not in fields]:
        raise ValueError(f"sizes: {', '.join(missing)} missing; a seed needs {', '.join(SIZES)} and whisper")
    whisper = dict(fields.pop("whisper"))
    tokenizer = train_tokenizer(corpus, vocab_size)
    ids = tokenizer.get_vocab()
    config = ArkasrConfig(
        whisper_config=whisper,
        vocab_size=vocab_size,
        audio_token_id=ids[AUDIO_TOKEN],
        bos_token_id=ids[PAD_TOKEN],
        eos_token_id=ids[END_TURN],
        pad_token_id=ids[PAD_TOKEN],
        **fields,
    )
    extractor = WhisperFeatureExtractor(feature_size=config.whisper_config.num_mel_bins)
    processor = ArkasrProcessor(extractor, tokenizer, merge_factor=config.merge_factor)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ArkasrForConditionalGeneration(config)
    return save_arkasr(model.state_dict(), config, processor, out_dir, dtype=torch.float32, with_code=False)


def fresh_student(folder: Path, init: Mapping[str, Any], texts: Iterable[str], seed: int) -> str:
    """The folder of `create_seed` for `student.init`, made where it is missing; the tokenizer is trained on the texts."""
    if not (folder / "config.json").is_file():
        sizes = dict(init)
        vocab_size = int(sizes.pop("vocab_size"))
        create_seed(folder, sizes=sizes, corpus=list(texts), vocab_size=vocab_size, seed=seed)
    return str(folder)


def train_tokenizer(corpus: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most vocab_size tokens, ARK-ASR's control tokens last.

    Each word is also trained on by itself, with and without a space before it, so that it becomes one token wherever in
    a text it stands.
    """
    room = vocab_size - len(ADDED_TOKENS)
    if room < NUM_BYTES:
        raise ValueError(
            f"vocab_size={vocab_size}: needs at least {NUM_BYTES + len(ADDED_TOKENS)}, for all bytes and control tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [*corpus, DEFAULT_INSTRUCTION]
    trainer = trainers.BpeTrainer(
        vocab_size=room, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    tokenizer.train_from_iterator(_with_words(texts), trainer)
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=t != AUDIO_TOKEN) for t in ADDED_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_TURN,
        pad_token=PAD_TOKEN,
        additional_special_tokens=list(EXTRA_SPECIAL_TOKENS),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _with_words(texts: Sequence[str]) -> Iterator[str]:
    for text in texts:
        yield text
        for word in text.split():
            yield word
            yield " " + word
