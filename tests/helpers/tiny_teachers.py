"""Teachers for tests: where the trained tiny ones are, a randomly initialised native GLM-ASR, permuted vocabularies."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
STUDENT, ARKASR, QWEN3_ASR = (ROOT / "seeds" / name for name in ("tiny_student", "tiny_teacher", "tiny_qwen3_asr"))
GLM_SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|begin_of_audio|>", "<|end_of_audio|>", "<|pad|>"]
GLM_PROMPT = "<|user|>\n<|begin_of_audio|>{audio}<|end_of_audio|><|user|>\nTranscribe this {language}<|assistant|>\n"


def texts_of(teacher: Any, utterances: list[Any]) -> list[str]:
    """What a teacher transcribes, without the numbers beside it."""
    return [transcript.text for transcript in teacher.transcribe(utterances)]


def train_tokenizer(corpus: list[str], vocab_size: int, special: list[str], **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with its special tokens first, so that its bytes have other ids than the student's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **options)


def make_glm(path: Path) -> Path:
    """A native GLM-ASR whose ids are not the student's; two of its control tokens end a response."""
    from transformers import GlmAsrConfig, GlmAsrForConditionalGeneration, GlmAsrProcessor, WhisperFeatureExtractor

    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    corpus = [" ".join(words[(i * 3 + j) % 10] for j in range(5)) for i in range(40)] + words
    tokenizer = train_tokenizer(corpus, 330, GLM_SPECIAL, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    ids = tokenizer.get_vocab()
    config = GlmAsrConfig(
        audio_config={
            "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_mel_bins": 80, "initializer_range": 0.1,
        },
        text_config={
            "vocab_size": 336, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.1,
            "eos_token_id": [ids["<|endoftext|>"], ids["<|user|>"]], "pad_token_id": ids["<|endoftext|>"],
        },
        audio_token_id=ids["<|pad|>"], initializer_range=0.1,
    )  # fmt: skip
    model = _random(GlmAsrForConditionalGeneration, config)
    model.generation_config.eos_token_id = [ids["<|endoftext|>"], ids["<|user|>"]]
    model.save_pretrained(path)
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{% for part in m.content %}{% if part.type == 'audio' %}"
        "<|begin_of_audio|><|pad|><|end_of_audio|><|user|>\n{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    extractor = WhisperFeatureExtractor(feature_size=80, chunk_length=4)
    GlmAsrProcessor(extractor, tokenizer, chat_template=template).save_pretrained(path)
    return path


def make_qwen2_audio(path: Path) -> Path:
    """A native Qwen2-Audio. Its forward knows no logits_to_keep."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"]
    tokenizer = train_tokenizer(["one two three"] * 20, 300, special, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    ids = tokenizer.get_vocab()
    config = Qwen2AudioConfig(
        audio_config={
            "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "num_mel_bins": 80,
            "max_source_positions": 200, "init_std": 0.1,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": 304, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.1, "pad_token_id": 0,
        },
        audio_token_index=ids["<|AUDIO|>"],
    )  # fmt: skip
    model = _random(Qwen2AudioForConditionalGeneration, config)
    model.generation_config.eos_token_id = [ids["<|im_end|>"], ids["<|endoftext|>"]]
    model.save_pretrained(path)
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=80, chunk_length=4), tokenizer).save_pretrained(path)
    return path


def make_voxtral(path: Path) -> Path:
    """A native Voxtral with the first 600 tokens of a tokenizer that mistral_common ships, and its control tokens."""
    import mistral_common
    from transformers import VoxtralConfig, VoxtralForConditionalGeneration, VoxtralProcessor, WhisperFeatureExtractor
    from transformers.tokenization_mistral_common import MistralCommonBackend

    shipped = json.loads((Path(mistral_common.__file__).parent / "data" / "tekken_240911.json").read_text())
    names = {0: "<unk>", 1: "<s>", 2: "</s>", 3: "[INST]", 4: "[/INST]", 5: "[AVAILABLE_TOOLS]", 6: "[/AVAILABLE_TOOLS]",
             7: "[TOOL_RESULTS]", 8: "[/TOOL_RESULTS]", 9: "[TOOL_CALLS]", 10: "[IMG]", 11: "<pad>", 12: "[IMG_BREAK]",
             13: "[IMG_END]", 14: "[PREFIX]", 15: "[MIDDLE]", 16: "[SUFFIX]", 17: "[SYSTEM_PROMPT]",
             18: "[/SYSTEM_PROMPT]", 19: "[TOOL_CONTENT]", 24: "[AUDIO]", 25: "[BEGIN_AUDIO]", 34: "[TRANSCRIBE]"}  # fmt: skip
    special = [{"rank": i, "token_str": names.get(i, f"<SPECIAL_{i}>"), "is_control": True} for i in range(40)]
    sizes = {"default_vocab_size": 640, "default_num_special_tokens": 40, "version": "v7"}
    encoding = {"num_mel_bins": 80, "hop_length": 160, "window_size": 400}
    audio = {
        "sampling_rate": 16000, "frame_rate": 12.5, "audio_encoding_config": encoding, "chunk_length_s": 30.0,
    }  # fmt: skip
    content = {
        "config": shipped["config"] | sizes, "vocab": shipped["vocab"][:600], "special_tokens": special, "audio": audio,
    }  # fmt: skip
    source = path.parent / "tekken.json"
    source.write_text(json.dumps(content))
    config = VoxtralConfig(
        audio_config={
            "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_mel_bins": 80, "vocab_size": 640,
        },
        text_config={
            "model_type": "llama", "vocab_size": 640, "hidden_size": 32, "intermediate_size": 64, "head_dim": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.1,
        },
        audio_token_id=24,
    )  # fmt: skip
    model = _random(VoxtralForConditionalGeneration, config)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(path)
    extractor = WhisperFeatureExtractor(feature_size=80)
    VoxtralProcessor(extractor, MistralCommonBackend(str(source))).save_pretrained(path)
    return path


def _random(model_class: Any, config: Any) -> Any:
    """The same weights each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return model_class(config)


EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")


def permute_vocabulary(source: str | Path, target: Path) -> Path:
    """Copies a folder, giving every token (control tokens too) another id: tokenizer, embedding rows and configs."""
    shutil.copytree(source, target)
    tokenizer = json.loads((target / "tokenizer.json").read_text())
    weights = load_file(target / "model.safetensors")
    size = next(value.shape[0] for name, value in weights.items() if name.endswith(EMBEDDINGS))
    order = list(range(size))  # new id of each old one
    random.Random(1).shuffle(order)
    tokenizer["model"]["vocab"] = {token: order[i] for token, i in tokenizer["model"]["vocab"].items()}
    for token in tokenizer["added_tokens"]:
        token["id"] = order[token["id"]]
        tokenizer["model"]["vocab"][token["content"]] = token["id"]  # else it is numbered after the others when read
    (target / "tokenizer.json").write_text(json.dumps(tokenizer))
    inverse = sorted(range(size), key=lambda i: order[i])
    for name in [name for name in weights if name.endswith(EMBEDDINGS)]:
        weights[name] = weights[name][inverse].contiguous()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    for file in ("config.json", "generation_config.json"):
        content = json.loads((target / file).read_text())
        (target / file).write_text(json.dumps(_renumbered(content, order)))
    return target


def _renumbered(content: Any, order: list[int]) -> Any:
    """Values of keys that end in `token_id`, at any depth, as new ids."""
    if not isinstance(content, dict):
        return content
    changed = {}
    for key, value in content.items():
        if key.endswith("token_id") and value is not None:
            ids = value if isinstance(value, list) else [value]
            # A default of the class that this vocabulary does not have stays as it is.
            ids = [order[i] if i < len(order) else i for i in ids]
            changed[key] = ids if isinstance(value, list) else ids[0]
        else:
            changed[key] = _renumbered(value, order)
    return changed
