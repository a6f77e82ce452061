"""Makes seeds/tiny_qwen3_asr: a tiny Qwen3-ASR of transformers' own class, trained on the synthetic spoken digits.

    .venv-teacher/bin/python scripts/make_qwen3_seed.py [--steps N] [--out DIR]

It stands where a team's Qwen3-ASR teacher would stand: the same classes, prompt, control tokens and files. Runs in the
teacher's environment (make teacher-env); the speech must be there (`make env`, then `.venv/bin/python -m data.synthetic`).
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the tiny trained Qwen3-ASR, in the teacher's environment.")
    parser.add_argument("--out", type=Path, default=ROOT / "seeds" / "tiny_qwen3_asr")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


try:
    from transformers import PreTrainedTokenizerFast, Qwen3ASRConfig
    from transformers.models.qwen3_asr.feature_extraction_qwen3_asr import Qwen3ASRFeatureExtractor
    from transformers.models.qwen3_asr.modeling_qwen3_asr import Qwen3ASRForConditionalGeneration
    from transformers.models.qwen3_asr.processing_qwen3_asr import Qwen3ASRProcessor
except ImportError as error:  # another environment: --help is answered there too
    read_arguments()
    sys.exit(
        f"error: the transformers of {sys.executable} has no Qwen3-ASR: run .venv-teacher/bin/python "
        f"scripts/make_qwen3_seed.py; `make teacher-env` makes that environment ({error})"
    )

from data.audio import SAMPLING_RATE, load_audio  # noqa: E402
from data.manifest import read_manifest  # noqa: E402
from data.synthetic import ensure_digits  # noqa: E402
from opd.types import Utterance  # noqa: E402

END, ENDOFTEXT, ASR_TEXT = "<|im_end|>", "<|endoftext|>", "<asr_text>"
# In the order of their ids in Qwen3-ASR; `<asr_text>` and `<timestamp>` are added tokens that are not special there either.
SPECIAL = [ENDOFTEXT, "<|im_start|>", END, "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"]
MARKERS = [ASR_TEXT, "<timestamp>"]
PROMPT = (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
    "<|im_start|>assistant\nlanguage English<asr_text>"
)
# Other texts than the student's tokenizer saw, so that the two differ as those of real models do: the words are shared,
# their ids and some of their pieces are not.
OTHER_WORDS = "ten eleven twelve thirteen fourteen fifteen twenty thirty forty fifty hundred thousand language English"
VOCAB_SIZE = 448
MEL_BINS = 80
INITIALIZER_RANGE = 0.08  # about 1 / sqrt(width): with 0.02 attention takes thousands of steps to align
CTC_WEIGHT = 0.5  # without this aid the decoder is slow to find the audio


# -- tokenizer, processor, model ---------------------------------------------------------------------------------------


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen3-ASR's control tokens at its end."""
    words = sorted({word for text in texts for word in text.split()} | set(OTHER_WORDS.split()), reverse=True)
    corpus = [*texts[:500], *[OTHER_WORDS] * 20]
    corpus += [form for word in words for form in (word, " " + word)] * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    room = VOCAB_SIZE - len(SPECIAL) - len(MARKERS)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=room, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = shuffle_ids(tokenizer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=token in SPECIAL) for token in SPECIAL + MARKERS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=ENDOFTEXT,
        extra_special_tokens={
            "audio_token": "<|audio_pad|>",
            "audio_bos_token": "<|audio_start|>",
            "audio_eos_token": "<|audio_end|>",
        },
        padding_side="left",
    )


def shuffle_ids(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with its ids in another order: bytes would have the student's ids."""
    content = json.loads(tokenizer.to_str())
    tokens = sorted(content["model"]["vocab"])
    random.Random(0).shuffle(tokens)
    content["model"]["vocab"] = {token: index for index, token in enumerate(tokens)}
    return Tokenizer.from_str(json.dumps(content))


def build_processor(tokenizer: PreTrainedTokenizerFast) -> Qwen3ASRProcessor:
    return Qwen3ASRProcessor(Qwen3ASRFeatureExtractor(feature_size=MEL_BINS), tokenizer)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ASRForConditionalGeneration:
    """About a million parameters, randomly initialised."""
    ids = tokenizer.get_vocab()
    audio = {
        "num_mel_bins": MEL_BINS,
        "encoder_layers": 3,
        "encoder_attention_heads": 4,
        "encoder_ffn_dim": 384,
        "d_model": 128,
        "downsample_hidden_size": 32,
        "output_dim": 128,
        "initializer_range": INITIALIZER_RANGE,
    }
    text = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 256,
        "initializer_range": INITIALIZER_RANGE,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    }
    config = Qwen3ASRConfig(
        audio_config=audio,
        text_config=text,
        audio_token_id=ids["<|audio_pad|>"],
        timestamp_token_id=ids["<timestamp>"],
        pad_token_id=ids[ENDOFTEXT],
        eos_token_id=[ids[ENDOFTEXT], ids[END]],
        initializer_range=INITIALIZER_RANGE,
    )
    model = Qwen3ASRForConditionalGeneration(config)
    # With initializer_range the convolutions' output would be a twentieth of the positions that are added to it.
    encoder = model.model.audio_tower
    for layer in (encoder.conv2d1, encoder.conv2d2, encoder.conv2d3, encoder.conv_out):
        torch.nn.init.normal_(layer.weight, std=2.0 / math.sqrt(layer.weight[0].numel()))
    return model


# -- data --------------------------------------------------------------------------------------------------------------


@dataclass
class Example:
    """One utterance. ids: the prompt, then (for training) transcript and end; features (M, F), mask (F)."""

    ids: torch.Tensor
    features: torch.Tensor
    mask: torch.Tensor
    num_audio: int
    transcript: list[int]
    words: list[str]


def load(utterances: list[Utterance], processor: Qwen3ASRProcessor) -> list[Example]:
    """Prompt and features of each clip by itself."""
    tokenizer = processor.tokenizer
    examples = []
    for utterance in utterances:
        inputs = processor(text=[PROMPT], audio=[load_audio(utterance)], sampling_rate=SAMPLING_RATE)
        ids = inputs["input_ids"][0]
        examples.append(
            Example(
                ids=ids,
                features=inputs["input_features"][0],
                mask=inputs["input_features_mask"][0],
                num_audio=int((ids == processor.audio_token_id).sum()),
                transcript=tokenizer(str(utterance.text), add_special_tokens=False)["input_ids"],
                words=str(utterance.text).split(),
            )
        )
    return examples


def collate(examples: list[Example], tails: list[list[int]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Model inputs of prompt + tail, left-padded, and which positions belong to the language tag or the tail: (B, L)."""
    rows = [torch.cat([e.ids, torch.tensor(tail, dtype=torch.long)]) for e, tail in zip(examples, tails, strict=True)]
    length = max(len(row) for row in rows)
    frames = max(e.features.shape[1] for e in examples)
    tag = 3  # tokens of `language English<asr_text>`, which a teacher that is asked for the language writes itself
    ids_BL = torch.stack([functional.pad(row, (length - len(row), 0)) for row in rows])
    mask_BL = torch.stack([functional.pad(torch.ones_like(row), (length - len(row), 0)) for row in rows])
    written_BL = torch.stack([torch.arange(length) >= length - len(tail) - tag for tail in tails])
    inputs = {
        "input_ids": ids_BL,
        "attention_mask": mask_BL,
        "input_features": torch.stack(
            [functional.pad(e.features, (0, frames - e.features.shape[1])) for e in examples]
        ),
        "input_features_mask": torch.stack([functional.pad(e.mask, (0, frames - len(e.mask))) for e in examples]),
    }
    return inputs, written_BL


# -- training ----------------------------------------------------------------------------------------------------------


def batches(examples: list[Example], batch_size: int, num_steps: int, seed: int):
    """num_steps batches: the first epoch from short to long, then shuffled ones."""
    generator = random.Random(seed)
    order = sorted(range(len(examples)), key=lambda i: examples[i].num_audio)
    position = 0
    for _ in range(num_steps):
        if position + batch_size > len(order):
            order, position = generator.sample(range(len(examples)), len(examples)), 0
        yield [examples[i] for i in order[position : position + batch_size]]
        position += batch_size


def loss_of(model, ctc_head, batch: list[Example], end_id: int, blank_id: int) -> tuple[torch.Tensor, float, float]:
    """(loss, cross-entropy and CTC per token) of transcripts by teacher forcing."""
    inputs, written_BL = collate(batch, [[*e.transcript, end_id] for e in batch])
    out = model(**inputs, use_cache=False)
    targets_BL = inputs["input_ids"].masked_fill(~written_BL, -100)
    num_tokens = sum(len(e.transcript) + 1 for e in batch)
    cross_entropy = functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), targets_BL[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    rows = out.audio_hidden_states.split([e.num_audio for e in batch])  # the encoder's rows of all clips come joined
    padded = torch.nn.utils.rnn.pad_sequence(list(rows))
    ctc = functional.ctc_loss(
        ctc_head(padded).log_softmax(-1),
        torch.tensor([i for e in batch for i in e.transcript]),
        torch.tensor([e.num_audio for e in batch]),
        torch.tensor([len(e.transcript) for e in batch]),
        blank=blank_id, reduction="sum", zero_infinity=True,
    )  # fmt: skip
    loss = (cross_entropy + CTC_WEIGHT * ctc) / num_tokens
    return loss, cross_entropy.item() / num_tokens, ctc.item() / num_tokens


def train(model, processor, examples: list[Example], dev: list[Example], arguments: argparse.Namespace) -> None:
    ids = processor.tokenizer.get_vocab()
    ctc_head = torch.nn.Linear(model.config.text_config.hidden_size, VOCAB_SIZE)
    named = [*model.named_parameters(), *ctc_head.named_parameters()]
    groups = [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=arguments.lr, betas=(0.9, 0.98))
    warmup, total = 100, arguments.steps

    def schedule(step: int) -> float:
        progress = max(0.0, (step - warmup) / max(1, total - warmup))
        return min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    began = time.monotonic()
    model.train()
    for step, batch in enumerate(batches(examples, arguments.batch_size, total, arguments.seed), start=1):
        loss, cross_entropy, ctc = loss_of(model, ctc_head, batch, ids[END], ids[ENDOFTEXT])
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(
                f"step {step}: ce {cross_entropy:.3f}, ctc {ctc:.3f}, {time.monotonic() - began:.0f} s"
                + (f", WER {word_error_rate(model, processor, dev):.1%} on seen voices" if step % 500 == 0 else ""),
                flush=True,
            )


@torch.no_grad()
def word_error_rate(model, processor, examples: list[Example]) -> float:
    """WER of greedy transcripts."""
    model.eval()
    errors = words = 0
    for start in range(0, len(examples), 50):
        batch = examples[start : start + 50]
        inputs, _ = collate(batch, [[] for _ in batch])
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for example, text in zip(batch, processor.tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            errors += edit_distance(example.words, text.split())
            words += len(example.words)
    model.train()
    return errors / words


def edit_distance(reference: list[str], hypothesis: list[str]) -> int:
    """Substitutions, deletions and insertions of the cheapest alignment."""
    costs = np.arange(len(hypothesis) + 1)
    for i, word in enumerate(reference, start=1):
        previous, costs[0] = costs.copy(), i
        for j, other in enumerate(hypothesis, start=1):
            costs[j] = min(previous[j - 1] + (word != other), previous[j] + 1, costs[j - 1] + 1)
    return int(costs[-1])


def main() -> int:
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    try:
        manifests = ensure_digits()
    except ValueError as error:
        sys.exit(f"error: {error}")
    labelled = read_manifest(manifests["labelled"], require_text=True)
    tokenizer = build_tokenizer([str(u.text) for u in labelled])
    processor = build_processor(tokenizer)
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    dev = load(read_manifest(manifests["seen_voices"]), processor)
    train(model, processor, load(labelled, processor), dev[:200], arguments)
    model.half().save_pretrained(arguments.out)
    processor.save_pretrained(arguments.out)
    model = Qwen3ASRForConditionalGeneration.from_pretrained(arguments.out, dtype=torch.float32)
    unseen = load(read_manifest(manifests["unseen_voices"]), processor)
    for name, examples in (("unseen voices", unseen), ("seen voices", dev)):
        print(f"{name}: WER {word_error_rate(model, processor, examples):.2%}, as saved in float16")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
