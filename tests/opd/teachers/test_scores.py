"""Each kind of teacher against a direct forward of its own model: ids, positions, batches, every log-probability."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_teachers import STUDENT, permute_vocabulary, texts_of

from data.audio import load_audio
from data.manifest import read_manifest
from opd.arkasr import load_processor
from opd.losses import position_loss
from opd.support import candidate_ids
from opd.teachers import make_teacher
from opd.types import Batch, Rollout

KINDS = ["arkasr", "hf", pytest.param("qwen3_asr", marks=pytest.mark.teacher_env)]
QWEN3_PROMPT = (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
    "<|im_start|>assistant\nlanguage English<asr_text>"
)
GLM_PROMPT = "<|user|>\n<|begin_of_audio|><|pad|><|end_of_audio|><|user|>\nTranscribe this English<|assistant|>\n"
TEXTS = ["one two", "seven", "", "nine nine nine zero four", "five"]


@pytest.fixture(scope="module")
def student() -> Any:
    return load_processor(STUDENT).tokenizer


@pytest.fixture(scope="module")
def utterances(speech: dict[str, Path]) -> Batch:
    """Of different lengths, so that prompts are padded."""
    return read_manifest(speech["eval"])[: len(TEXTS)]


def make_rollout(student: Any, rows: list[list[int]], num_topk: int = 6) -> Rollout:
    """A rollout with these responses; its top-k are arbitrary ids of the student."""
    length = max(len(row) for row in rows)
    ids_BT = torch.tensor([row + [student.pad_token_id] * (length - len(row)) for row in rows])
    mask_BT = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    generator = torch.Generator().manual_seed(7)
    ordinary = student.convert_tokens_to_ids("zero") + 1
    return Rollout(
        response_ids_BT=ids_BT,
        response_mask_BT=mask_BT,
        topk_ids_BTK=torch.randint(0, ordinary, (*ids_BT.shape, num_topk), generator=generator),
        logprobs_BT=torch.zeros(ids_BT.shape),
        finished_B=torch.tensor([bool(row) and row[-1] == student.eos_token_id for row in rows]),
        loop_start_B=torch.full((len(rows),), length),
        bad_audio_B=torch.tensor([not row for row in rows]),
    )


def responses(student: Any) -> list[list[int]]:
    """The texts, each ended but the last, which its length limit cut."""
    rows = [student(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    return [row + [student.eos_token_id] for row in rows[:-1]] + rows[-1:]


def direct_prompt(teacher: Any, utterance: Any) -> dict[str, torch.Tensor]:
    """The prompt of one utterance by itself, made without the teacher's code."""
    clip, kind = load_audio(utterance), teacher.section["kind"]
    if kind == "arkasr":
        return teacher.processor.build_inputs([clip])
    text = {"hf": GLM_PROMPT, "qwen3_asr": QWEN3_PROMPT}[kind]
    return dict(teacher.processor(text=[text], audio=[clip]))


def direct_logprobs(teacher: Any, utterance: Any, ids: list[int]) -> torch.Tensor:
    """Log-probabilities before each of the teacher's ids, over what may be written: (len(ids), V), from all logits."""
    inputs = direct_prompt(teacher, utterance)
    start = inputs["input_ids"].shape[1] - 1
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([ids], dtype=torch.int64)], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        logits_TV = teacher.model(**inputs).logits[0, start : start + len(ids)].double()
    tokenizer = teacher.tokenizer
    known = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    control = special | {i for token, i in known.items() if re.fullmatch(r"<[|\w].*>", token)}
    allowed = sorted(set(known.values()) - control)
    ends = {"arkasr": ["<|im_end|>"], "hf": ["<|endoftext|>", "<|user|>"], "qwen3_asr": ["<|im_end|>", "<|endoftext|>"]}
    end_ids = tokenizer.convert_tokens_to_ids(ends[teacher.section["kind"]])
    masked_TV = torch.full_like(logits_TV, float("-inf"))
    masked_TV[:, allowed] = logits_TV[:, allowed]
    masked_TV[:, end_ids[0]] = logits_TV[:, end_ids].logsumexp(-1)
    return masked_TV.log_softmax(-1)


def teacher_id(teacher: Any, student: Any, index: int) -> int | None:
    """By the token's string; EOS to EOS."""
    if index == student.eos_token_id:
        return teacher.tokenizer.convert_tokens_to_ids(
            "<|endoftext|>" if teacher.section["kind"] == "hf" else "<|im_end|>"
        )
    return teacher.tokenizer.get_vocab().get(student.convert_ids_to_tokens(index))


@pytest.mark.parametrize("kind", KINDS)
def test_every_mapped_id_has_the_log_probability_of_a_direct_forward(
    kind: str, make_config: Callable, student: Any, utterances: Batch
) -> None:
    teacher = make_teacher(make_config(kind, loss={"kind": "full_kl"}), str(STUDENT))
    rows = responses(student)
    rollout = make_rollout(student, rows)
    score, counts = teacher.score_and_count(utterances, rollout.to_dict())
    written = sum(len(row) for row in rows)
    assert counts == {
        "positions": written,
        "aligned": written,
        "responses": len(rows),
        "retokenised": 0,
        "bad_audio": [],
    }
    assert torch.equal(score["aligned_mask_BT"], rollout.response_mask_BT)
    control = {*student.all_special_ids, student.convert_tokens_to_ids("<|audio|>")} - {student.eos_token_id}
    ordinary = sorted(set(student.get_vocab().values()) - control)
    pairs = [(i, teacher_id(teacher, student, i)) for i in ordinary]
    mapped = [(i, other) for i, other in pairs if other is not None]
    assert 256 < len(mapped) <= len(ordinary)
    unmapped = [i for i, other in pairs if other is None] + sorted(control)
    if kind != "arkasr":
        assert sum(i == other for i, other in mapped) < 30, "ids would be right without a map"
    for row, ids in enumerate(rows):
        expected_TV = direct_logprobs(teacher, utterances[row], [teacher_id(teacher, student, i) for i in ids])
        found_TV = score["full_logprobs_BTV"][row, : len(ids)].double()
        torch.testing.assert_close(
            found_TV[:, [i for i, _ in mapped]], expected_TV[:, [other for _, other in mapped]], rtol=0, atol=1e-4
        )
        assert (found_TV[:, unmapped] == float("-inf")).all()
        outside_T = 1 - expected_TV[:, [other for _, other in mapped]].exp().sum(-1)
        torch.testing.assert_close(score["unmapped_mass_BT"][row, : len(ids)].double(), outside_T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_what_each_row_gives_alone(
    kind: str, make_config: Callable, student: Any, utterances: Batch
) -> None:
    teacher = make_teacher(make_config(kind), str(STUDENT))
    rows = responses(student)
    together = teacher.score(utterances, make_rollout(student, rows).to_dict())
    for row, utterance in enumerate(utterances):
        part = {name: value[row : row + 1] for name, value in make_rollout(student, rows).to_dict().items()}
        alone = teacher.score([utterance], part)
        for name, value in alone.items():
            length = len(rows[row])
            torch.testing.assert_close(value[0, :length], together[name][row, :length], rtol=0, atol=1e-4)
    assert texts_of(teacher, utterances) == [texts_of(teacher, [utterance])[0] for utterance in utterances]


@pytest.mark.parametrize("kind", KINDS)
def test_response_logits_are_those_of_the_whole_sequence(
    kind: str, make_config: Callable, student: Any, utterances: Batch
) -> None:
    teacher = make_teacher(make_config(kind), str(STUDENT))
    mapped = teacher.mapper.map_rollout(make_rollout(student, responses(student)))
    for rows, inputs in teacher.prompts(utterances):
        assert (inputs["attention_mask"][:, -1] == 1).all(), "prompts are padded on the left"
        states_BLD, to_logits = teacher._response_states(inputs, mapped, rows)
        assert teacher.output.is_last and states_BLD.shape[-1] < len(teacher.blocked_V)
        kept_BLV = to_logits(states_BLD)
        teacher.taken.discard("logits_to_keep")
        teacher.output.is_last = False
        whole_BLV, _ = teacher._response_states(inputs, mapped, rows)
        teacher.output.is_last = True
        assert kept_BLV.shape == whole_BLV.shape == (len(rows), mapped.ids_BL.shape[1], len(teacher.blocked_V))
        torch.testing.assert_close(kept_BLV, whole_BLV, rtol=0, atol=1e-5)
        teacher.taken.add("logits_to_keep")


@pytest.mark.parametrize("kind", ["hf", pytest.param("qwen3_asr", marks=pytest.mark.teacher_env)])
def test_a_response_with_unmapped_ids_is_read_through_its_text(
    kind: str, make_config: Callable, student: Any, utterances: Batch
) -> None:
    """A word that the teacher has only in pieces: those around it are scored where they are in the teacher's reading."""
    teacher = make_teacher(make_config(kind), str(STUDENT))
    own = student.get_vocab()
    assert "Ġaudio" not in teacher.tokenizer.get_vocab()
    rows = [
        [own["one"], own["Ġaudio"], own["Ġfive"], student.eos_token_id],
        [own["one"], own["Ġfive"], student.eos_token_id],
    ]
    rollout = make_rollout(student, rows)
    score, counts = teacher.score_and_count(utterances[:2], rollout.to_dict())
    assert counts["retokenised"] == 1
    read = teacher.tokenizer("one audio five", add_special_tokens=False)["input_ids"]
    assert score["aligned_mask_BT"][0].tolist() == [True, False, True, True]
    expected_LV = direct_logprobs(teacher, utterances[0], [*read, teacher.eos_id])
    candidates_TC = candidate_ids(rollout.topk_ids_BTK, rollout.response_ids_BT, student.eos_token_id)[0]
    for position, teacher_position in ((0, 0), (2, len(read) - 1), (3, len(read))):
        for column, index in enumerate(candidates_TC[position].tolist()):
            there = teacher_id(teacher, student, index)
            found = score["candidate_logprobs_BTC"][0, position, column].item()
            if there is None:
                assert found == float("-inf")
            else:
                assert found == pytest.approx(expected_LV[teacher_position, there].item(), abs=1e-4)


def test_an_unreadable_clip_and_an_empty_batch_row_score_nothing(
    make_config: Callable, student: Any, utterances: Batch
) -> None:
    teacher = make_teacher(make_config("hf"), str(STUDENT))
    rollout = make_rollout(student, [[], [student.eos_token_id]])
    score, counts = teacher.score_and_count(utterances[:2], rollout.to_dict())
    assert score["aligned_mask_BT"].tolist() == [[False], [True]]
    assert counts == {"positions": 1, "aligned": 1, "responses": 1, "retokenised": 0, "bad_audio": []}


def test_audio_that_only_the_teacher_lacks_is_no_silence(
    make_config: Callable, student: Any, utterances: Batch, tmp_path: Path
) -> None:
    """It stops the run, or is masked and told; what the student lacked too is no error."""
    eos_id = student.eos_token_id
    lost = [replace(utterances[row], audio=str(tmp_path / f"{row}.wav")) for row in (0, 2)]
    batch = [lost[0], utterances[1], lost[1]]
    rollout = make_rollout(student, [[5, 6, eos_id], [5, eos_id], []])
    config = make_config("arkasr")
    stopping = make_teacher(config, str(STUDENT))
    with pytest.raises(ValueError) as raised:
        stopping.score(batch, rollout.to_dict())
    for part in (str(config["teacher"]["path"]), utterances[0].id, lost[0].audio, "No such file", "on_bad_audio=skip"):
        assert part in str(raised.value)
    alone, _ = stopping.score_and_count(batch[1:], {name: value[1:] for name, value in rollout.to_dict().items()})

    skipping = make_teacher(config | {"data": config["data"] | {"on_bad_audio": "skip"}}, str(STUDENT))
    score, counts = skipping.score_and_count(batch, rollout.to_dict())
    assert [entry[:2] for entry in counts["bad_audio"]] == [(utterances[0].id, lost[0].audio)]
    assert score["aligned_mask_BT"].tolist() == [[False] * 3, [True, True, False], [False] * 3]
    assert (counts["positions"], counts["aligned"], counts["responses"]) == (2, 2, 1)
    torch.testing.assert_close(score["entropy_BT"][1:, :2], alone["entropy_BT"][:, :2], rtol=0, atol=1e-4)


def test_audio_that_blocks_the_teacher_is_named(
    make_config: Callable, student: Any, utterances: Batch, pipe: Path
) -> None:
    config = make_config("arkasr")
    teacher = make_teacher(config | {"data": config["data"] | {"read_timeout_s": 0.5}}, str(STUDENT))
    batch = [utterances[0], replace(utterances[1], audio=str(pipe))]
    rollout = make_rollout(student, [[student.eos_token_id]] * 2).to_dict()
    for call in (lambda: teacher.transcribe(batch), lambda: teacher.score(batch, rollout)):
        with pytest.raises(ValueError, match=rf"read_timeout_s=0\.5 s: {re.escape(utterances[1].id)} \(.*pipe\.wav\)"):
            call()


@pytest.mark.parametrize("kind", ["hf", pytest.param("qwen3_asr", marks=pytest.mark.teacher_env)])
def test_a_permuted_vocabulary_gives_the_same_loss_and_gradient(
    kind: str, make_config: Callable, student: Any, utterances: Batch, tmp_path: Path
) -> None:
    """The same teacher with the rows of its vocabulary in another order, in float64."""
    config = make_config(kind)
    config["teacher"]["path"] = str(permute_vocabulary(config["teacher"]["path"], tmp_path / "permuted"))
    teachers = [make_teacher(make_config(kind), str(STUDENT)), make_teacher(config, str(STUDENT))]
    rollout = make_rollout(student, responses(student))
    results = []
    for teacher in teachers:
        teacher.model.double()
        score = teacher.score(utterances, rollout.to_dict())
        results.append(_loss_and_gradient(rollout, score, student))
    vocabularies = [teacher.tokenizer.get_vocab() for teacher in teachers]
    assert sum(vocabularies[0][token] == vocabularies[1][token] for token in vocabularies[0]) < 20
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        assert one.abs().max() > 0.01


def _loss_and_gradient(rollout: Rollout, score: dict[str, torch.Tensor], student: Any) -> tuple[torch.Tensor, ...]:
    from types import SimpleNamespace

    keep_BT = score["aligned_mask_BT"]
    logits_NV = torch.randn(int(keep_BT.sum()), 384, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits_NV.requires_grad_()
    candidates_BTC = candidate_ids(rollout.topk_ids_BTK, rollout.response_ids_BT, student.eos_token_id)
    config = SimpleNamespace(
        kind="forward_kl",
        support="union",
        temperature=1.0,
        beta=0.5,
        renormalize=False,
        max_importance=5,
        chunk_size=64,
    )
    loss_N, _ = position_loss(
        logits_NV,
        response_ids_N=rollout.response_ids_BT[keep_BT],
        rollout_logprobs_N=rollout.logprobs_BT[keep_BT],
        candidate_ids_NC=candidates_BTC[keep_BT],
        teacher={name: value[keep_BT] for name, value in score.items()},
        blocked_V=torch.zeros(384, dtype=torch.bool),
        eos_id=student.eos_token_id,
        config=config,
    )
    return loss_N.detach(), torch.autograd.grad(loss_N.sum(), logits_NV)[0]


@pytest.mark.parametrize(
    "prompt",
    [
        {
            "chat": [
                {"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": "Transcribe this {language}"}]}
            ]
        },
        {"transcription": {"prompt": "Transcribe this {language}"}},
    ],
)
def test_the_forms_of_a_prompt_agree(prompt: dict, make_config: Callable, utterances: Batch) -> None:
    texts = []
    for form in (make_config("hf"), make_config("hf", prompt=prompt)):
        inputs = make_teacher(form, str(STUDENT)).prompts(utterances[:1])[0][1]
        texts.append(inputs["input_ids"][0].tolist())
    assert texts[0] == texts[1]


def test_rows_of_other_audio_shapes_go_by_themselves(make_config: Callable, speech: dict[str, Path]) -> None:
    """A clip of two windows (over 4 s for this model) beside short ones; not every model masks what is padded."""
    import dataclasses

    import numpy as np
    import soundfile

    short = read_manifest(speech["eval"])[:3]
    path = speech["eval"].parent / "long.wav"
    soundfile.write(path, np.concatenate([load_audio(u) for u in short] * 3)[: 16000 * 6], 16000)
    long = dataclasses.replace(short[0], audio=str(path), id="long")
    batch = [short[0], long, short[1]]
    teacher = make_teacher(make_config("hf"), str(STUDENT))
    assert sorted(rows for rows, _ in teacher.prompts(batch)) == [[0, 2], [1]]
    assert texts_of(teacher, batch) == [texts_of(teacher, [u])[0] for u in batch]
