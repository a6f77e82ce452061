"""Qwen3-ASR in its native class, by the trained tiny one. Runs in the teacher's environment (make test-teachers)."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_teachers import QWEN3_ASR, STUDENT, texts_of

from data.audio import load_audio
from data.manifest import read_manifest
from opd.teachers import make_teacher
from opd.teachers.languages import QWEN3_ASR_LANGUAGES
from opd.types import Batch

pytestmark = pytest.mark.teacher_env


@pytest.fixture(scope="module")
def utterances(speech: dict[str, Path]) -> Batch:
    return read_manifest(speech["eval"])


def test_the_languages_are_those_of_the_processor() -> None:
    from transformers.models.qwen3_asr.processing_qwen3_asr import LANGUAGE_CODE_TO_NAME

    assert QWEN3_ASR_LANGUAGES == LANGUAGE_CODE_TO_NAME


def test_the_prompt_has_the_language_and_one_placeholder_per_audio_token(
    make_config: Callable, utterances: Batch
) -> None:
    teacher = make_teacher(make_config("qwen3_asr"), str(STUDENT))
    batch = [
        dataclasses.replace(u, language=name) for u, name in zip(utterances, ["en", "Chinese", "de-AT"], strict=False)
    ]
    ((rows, inputs),) = teacher.prompts(batch)
    assert rows == [0, 1, 2]
    for row, name in enumerate(["English", "Chinese", "German"]):
        frames = max(len(load_audio(batch[row])), 8000) // 160
        length = frames % 100
        for _ in range(3):
            length = (length - 1) // 2 + 1
        num_tokens = frames // 100 * 13 + length
        text = teacher.tokenizer.decode(inputs["input_ids"][row][inputs["attention_mask"][row].bool()])
        assert text == (
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|>" + "<|audio_pad|>" * num_tokens
            + f"<|audio_end|><|im_end|>\n<|im_start|>assistant\nlanguage {name}<asr_text>"
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"'Slovak' is not one that this teacher knows; it knows Arabic \(ar\)"):
        teacher.prompts([dataclasses.replace(utterances[0], language="Slovak")])


def test_auto_asks_the_teacher_itself(make_config: Callable, utterances: Batch) -> None:
    """It has heard English only, so what it detects is what it would be told."""
    told = make_teacher(make_config("qwen3_asr"), str(STUDENT))
    asked = make_teacher(make_config("qwen3_asr", language="auto"), str(STUDENT))
    unknown = [dataclasses.replace(u, language=None) for u in utterances[:5]]
    (_, expected), (_, found) = told.prompts(utterances[:5])[0], asked.prompts(unknown)[0]
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert texts_of(asked, unknown) == texts_of(told, utterances[:5])
    fixed = make_teacher(make_config("qwen3_asr", language="en"), str(STUDENT))
    assert texts_of(fixed, unknown) == texts_of(told, utterances[:5])


def test_without_a_tag_of_its_own_it_is_told_that_nobody_speaks(
    make_config: Callable, utterances: Batch, tmp_path: Path
) -> None:
    """A model of random weights does not come to `<asr_text>`."""
    path = shutil.copytree(QWEN3_ASR, tmp_path / "random")
    generator = torch.Generator().manual_seed(0)
    weights = load_file(path / "model.safetensors")
    weights = {name: torch.randn(value.shape, generator=generator) * 0.1 for name, value in weights.items()}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    teacher = make_teacher(make_config("qwen3_asr", language="auto", path=str(path)), str(STUDENT))
    ((_, inputs),) = teacher.prompts(utterances[:2])
    for ids in inputs["input_ids"]:
        assert teacher.tokenizer.decode(ids).endswith("assistant\nlanguage None<asr_text>")


def test_the_seed_writes_what_is_said(make_config: Callable, utterances: Batch) -> None:
    teacher = make_teacher(make_config("qwen3_asr"), str(STUDENT))
    texts = texts_of(teacher, utterances)
    right = sum(text == utterance.text for text, utterance in zip(texts, utterances, strict=True))
    assert right >= 9, list(zip(texts, [u.text for u in utterances], strict=True))
    assert teacher.facts()["vocab_coverage"] > 0.85
    half = make_teacher(make_config("qwen3_asr", dtype="bfloat16"), str(STUDENT))
    assert sum(a == b for a, b in zip(texts_of(half, utterances), texts, strict=True)) >= 10


def test_what_ends_a_response_is_one_token(make_config: Callable) -> None:
    teacher = make_teacher(make_config("qwen3_asr"), str(STUDENT))
    assert teacher.tokenizer.convert_ids_to_tokens(teacher.ends) == ["<|im_end|>", "<|endoftext|>"]
    logits_1V = torch.zeros(1, len(teacher.blocked_V))
    allowed_1V = teacher._allowed(logits_1V)
    assert allowed_1V[0, teacher.eos_id].exp().item() == pytest.approx(2.0), "either of them"
    assert allowed_1V[0, teacher.tokenizer.convert_tokens_to_ids("<|endoftext|>")] == float("-inf")
    assert allowed_1V[0, teacher.tokenizer.convert_tokens_to_ids("<asr_text>")] == float("-inf")
