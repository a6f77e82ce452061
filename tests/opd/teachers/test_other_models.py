"""Kind hf with other native models than GLM-ASR: each form of the prompt, against a direct forward of the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_teachers import STUDENT, make_qwen2_audio, make_voxtral, texts_of, train_tokenizer
from transformers import AutoProcessor

from data.audio import load_audio
from data.manifest import read_manifest
from opd.arkasr import load_processor
from opd.teachers import make_teacher
from opd.teachers.hf import check_placeholder
from opd.types import Rollout

QWEN2_AUDIO_TEXT = (
    "<|im_start|>user\n<|audio_bos|>{audio}<|audio_eos|>\nSpeech in {language}<|im_end|>\n<|im_start|>assistant\n"
)
VOXTRAL = {"model_id": "voxtral", "language": "{iso}", "sampling_rate": 16000, "format": ["wav"]}


def direct_prompt(teacher: Any, clip: Any) -> dict[str, torch.Tensor]:
    if "transcription" in teacher.section["prompt"]:
        arguments = VOXTRAL | {"language": "en"}
        return dict(teacher.processor.apply_transcription_request(audio=[clip], **arguments))
    text = QWEN2_AUDIO_TEXT.replace("{audio}", "<|AUDIO|>").replace("{language}", "English")
    return dict(teacher.processor(text=[text], audio=[clip], sampling_rate=16000, return_tensors="pt"))


@pytest.mark.parametrize(
    ("make", "prompt"),
    [
        (make_qwen2_audio, {"text": QWEN2_AUDIO_TEXT}),
        # mistral_common, which reads Voxtral's tokenizer, is in no environment of a run unless somebody wants Voxtral.
        pytest.param(make_voxtral, {"transcription": VOXTRAL}, marks=pytest.mark.teacher_env),
    ],
)
def test_a_score_equals_a_direct_forward(
    make: Callable, prompt: dict, make_config: Callable, speech: dict[str, Path], tmp_path: Path
) -> None:
    path = make(tmp_path / "model")
    teacher = make_teacher(make_config("hf", {"kind": "full_kl"}, path=str(path), prompt=prompt), str(STUDENT))
    student = load_processor(STUDENT).tokenizer
    utterances = read_manifest(speech["eval"])[:2]
    ours = student.get_vocab()
    # Single letters, which both have, under other ids.
    rows = [[ours[c] for c in "one"] + [student.eos_token_id], [ours[c] for c in "six"] + [ours["Ġ"], ours["a"]]]
    mask_BT = torch.tensor([[i < len(row) for i in range(5)] for row in rows])
    rollout = Rollout(
        response_ids_BT=torch.tensor([row + [0] * (5 - len(row)) for row in rows]), response_mask_BT=mask_BT,
        topk_ids_BTK=torch.zeros(2, 5, 2, dtype=torch.int64), logprobs_BT=torch.zeros(2, 5),
        finished_B=torch.tensor([True, False]), loop_start_B=torch.full((2,), 5), bad_audio_B=torch.zeros(2).bool(),
    )  # fmt: skip
    score, counts = teacher.score_and_count(utterances, rollout.to_dict())
    assert counts == {"positions": 9, "aligned": 9, "responses": 2, "retokenised": 0, "bad_audio": []}
    for row, ids in enumerate(rows):
        mapped = teacher.token_map.student_to_teacher[ids]
        assert [teacher.tokenizer.decode([i]) for i in mapped.tolist()[:3]] == list("one" if row == 0 else "six")
        inputs = direct_prompt(teacher, load_audio(utterances[row]))
        start = inputs["input_ids"].shape[1] - 1
        inputs["input_ids"] = torch.cat([inputs["input_ids"], mapped[None]], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits_TV = teacher.model(**inputs).logits[0, start : start + len(ids)]
        for position, index in enumerate(ids[:3]):
            # Differences of two ids need no normalising: the byte `z` and the written one.
            pair = [index, ours["z"]]
            found = score["full_logprobs_BTV"][row, position, pair]
            expected = logits_TV[position, teacher.token_map.student_to_teacher[pair]]
            assert (found[0] - found[1]).item() == pytest.approx((expected[0] - expected[1]).item(), abs=1e-4)
    assert texts_of(teacher, utterances) == [texts_of(teacher, [u])[0] for u in utterances]


def make_ctc(path: Path) -> Path:
    """A Wav2Vec2 with a CTC head: it hears audio and has a tokenizer, but no decoder."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
    )

    path.mkdir()
    (path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "a": 3}))
    config = Wav2Vec2Config(
        vocab_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=[8],
        conv_stride=[5], conv_kernel=[10], num_conv_pos_embedding_groups=2, num_conv_pos_embeddings=4,
    )  # fmt: skip
    Wav2Vec2ForCTC(config).save_pretrained(path)
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), Wav2Vec2CTCTokenizer(str(path / "vocab.json"))).save_pretrained(path)
    return path


def make_text_model(path: Path) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=304, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(path)
    train_tokenizer(["one two"], 300, ["<end>"], eos_token="<end>", pad_token="<end>").save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_ctc, r"teacher.path=.*: Wav2Vec2ForCTC does not write text token by token; .* causal decoder"),
        (make_text_model, r"teacher.path=.*: its processor is a \w*Tokenizer\w*, .* choose a speech-to-text model"),
    ],
)
def test_what_is_no_speech_to_text_model_with_a_decoder_is_refused(
    make: Callable, message: str, make_config: Callable, tmp_path: Path
) -> None:
    path = make(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        make_teacher(make_config("hf", path=str(path)), str(STUDENT))


def test_a_placeholder_that_the_processor_does_not_know_is_refused(glm_dir: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(make_ctc(tmp_path / "model"))
    with pytest.raises(
        ValueError, match=r"teacher.prompt: has \{audio\}, but .*Wav2Vec2Processor\) names no audio_token"
    ):
        check_placeholder(processor, "p", {"chat": [{"role": "user", "content": "{audio} Write"}]})
    check_placeholder(processor, "p", {"chat": [{"role": "user", "content": [{"type": "audio"}]}]})
    check_placeholder(AutoProcessor.from_pretrained(glm_dir), "p", {"text": "{audio}"})
