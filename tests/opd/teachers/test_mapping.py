"""Responses between two tokenizers that cut text differently, counted by hand in four scripts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_teachers import train_tokenizer

from opd.teachers.mapping import ResponseMapper
from opd.types import Rollout

STUDENT_SPECIAL, TEACHER_SPECIAL = ["<|endoftext|>", "<|im_end|>"], ["<|im_end|>", "</s>", "<unk>"]


def tokenizer_of(pieces: list[str], special: list[str], eos: str) -> Any:
    """A byte-level BPE tokenizer with these pieces beside its bytes."""
    return train_tokenizer([piece for piece in pieces for _ in range(50)], 1000, special, eos_token=eos)


@pytest.fixture(scope="module")
def student() -> Any:
    pieces = ["hello", " world", "你好", "世界", "こん", "にちは", "안녕", "하세요"]
    return tokenizer_of(pieces, STUDENT_SPECIAL, "<|im_end|>")


@pytest.fixture(scope="module")
def teacher() -> Any:
    pieces = ["hel", "lo", " world", "你", "好世", "界", "こんに", "ちは", "안녕", "하세", "요"]
    return tokenizer_of(pieces, TEACHER_SPECIAL, "</s>")


@pytest.fixture(scope="module")
def mapper(student: Any, teacher: Any) -> ResponseMapper:
    return ResponseMapper(
        student, teacher, len(student) + 5, len(teacher) + 3, student_eos_id=student.eos_token_id,
        teacher_eos_id=teacher.eos_token_id, student_blocked=[], teacher_blocked=[],
    )  # fmt: skip


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("text", "pieces", "positions"),
    [
        # student: hello | world|EOS            teacher: hel|lo| world|EOS
        ("hello world", ["hello", " world"], [-1, 2, 3]),
        # student: 你好|世界|EOS                 teacher: 你|好世|界|EOS
        ("你好世界", ["你好", "世界"], [-1, -1, 3]),
        # student: こん|にちは|EOS               teacher: こんに|ちは|EOS
        ("こんにちは", ["こん", "にちは"], [-1, -1, 2]),
        # student: 안녕|하세요|EOS               teacher: 안녕|하세|요|EOS
        ("안녕하세요", ["안녕", "하세요"], [0, -1, 3]),
    ],
)
def test_positions_whose_boundaries_agree_are_scored(
    text: str, pieces: list[str], positions: list[int], mapper: ResponseMapper, student: Any, teacher: Any
) -> None:
    ids = ids_of(student, text)
    assert [student.decode([index]) for index in ids] == pieces
    found = mapper.map_response([*ids, student.eos_token_id])
    assert found.positions == positions
    assert found.ids == [*ids_of(teacher, text), teacher.eos_token_id]
    assert found.retokenised
    assert mapper.map_response(ids).positions == positions[:-1], "a response that was cut has no end to score"
    assert mapper.map_response(ids).ids == found.ids[:-1]


def test_a_rollout_counts_what_is_scored(mapper: ResponseMapper, student: Any, teacher: Any) -> None:
    """6 of 12 positions of the four texts above, and the two of a text that maps, which is not re-tokenised."""
    eos = student.eos_token_id
    texts = ["hello world", "你好世界", "こんにちは", "안녕하세요", " world"]
    rows = [[*ids_of(student, text), eos] for text in texts] + [[]]
    length = max(map(len, rows))
    mask_BT = torch.tensor([[i < len(row) for i in range(length)] for row in rows])
    rollout = Rollout(
        response_ids_BT=torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        response_mask_BT=mask_BT, topk_ids_BTK=torch.zeros(6, length, 1), logprobs_BT=torch.zeros(6, length),
        finished_B=mask_BT.any(1), loop_start_B=torch.full((6,), length), bad_audio_B=~mask_BT.any(1),
    )  # fmt: skip
    mapped = mapper.map_rollout(rollout)
    aligned_BT = mapped.position_BT >= 0
    assert aligned_BT.sum(1).tolist() == [2, 1, 1, 2, 2, 0]
    assert aligned_BT.sum().item() / mask_BT.sum().item() == 8 / 14
    assert mapped.num_retokenised == 4
    assert mapped.ids_BL.shape == (6, 4)
    assert mapped.mask_BL.sum(1).tolist() == [4, 4, 3, 4, 2, 0]
    assert mapped.ids_BL[4, :2].tolist() == [teacher.get_vocab()["Ġworld"], teacher.eos_token_id]


def test_ids_that_map_are_never_read_again(mapper: ResponseMapper, student: Any, teacher: Any) -> None:
    """` world` spelt in bytes: the teacher's own tokenizer would join them, the student wrote them one by one."""
    letters = [student.get_vocab()[character] for character in "Ġworld"]
    found = mapper.map_response([*letters, student.eos_token_id])
    assert found.ids == [teacher.get_vocab()[character] for character in "Ġworld"] + [teacher.eos_token_id]
    assert found.positions == list(range(7))
    assert not found.retokenised


def test_a_character_cut_in_its_middle_is_left_out(mapper: ResponseMapper, student: Any, teacher: Any) -> None:
    cut = [student.get_vocab()[character] for character in "ä½"]  # two of the three bytes of 你
    found = mapper.map_response([*ids_of(student, "hello world"), *cut])
    assert found.positions == [-1, 2, -1, -1]
    assert found.ids == ids_of(teacher, "hello world")
    ended = mapper.map_response([*ids_of(student, "hello world"), *cut, student.eos_token_id])
    assert ended.positions == [-1, 2, -1, -1, -1], "the teacher did not read all of it, so its end is not scored"


def test_control_tokens_spelt_out_stay_text(mapper: ResponseMapper, student: Any, teacher: Any) -> None:
    text = "hello</s> world"
    found = mapper.map_response(ids_of(student, text))
    assert teacher.eos_token_id not in found.ids
    assert teacher.decode(found.ids) == text
    assert found.positions[0] == -1
    assert found.positions[-1] == len(found.ids) - 1


def test_an_id_without_text_ends_what_can_be_scored(mapper: ResponseMapper, student: Any, teacher: Any) -> None:
    unused = len(student) + 2  # a row of the model that its tokenizer has no token for
    found = mapper.map_response([*ids_of(student, " world"), unused, student.eos_token_id])
    assert found.positions == [0, -1, -1]
    assert found.ids[:-1] == ids_of(teacher, " world")


def test_the_map_goes_by_bytes_in_both_directions(mapper: ResponseMapper, student: Any, teacher: Any) -> None:
    to_teacher, to_student = mapper.token_map.student_to_teacher, mapper.token_map.teacher_to_student
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    ordinary = {token: i for token, i in ours.items() if token not in STUDENT_SPECIAL}
    shared = [token for token in ordinary if token in theirs]
    for token in shared:
        assert to_teacher[ours[token]] == theirs[token]
        assert to_student[theirs[token]] == ours[token]
    assert to_teacher[student.eos_token_id] == teacher.eos_token_id
    assert to_student[teacher.eos_token_id] == student.eos_token_id
    assert to_student[theirs["<|im_end|>"]] == -1, "the student's name for its end is some other token of the teacher"
    assert (to_teacher >= 0).sum() == (to_student >= 0).sum() == len(shared) + 1
    assert mapper.token_map.coverage == pytest.approx(len(shared) / len(ordinary))
