"""Token maps between real byte-level BPE tokenizers that were trained on different text."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from opd.losses import position_loss
from opd.support import candidate_ids, score_support
from opd.vocab import TokenMap, blocked_mask

SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|audio|>"]


def train_tokenizer(corpus: list[str], vocab_size: int, special: list[str], eos: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)


@pytest.fixture(scope="module")
def student() -> PreTrainedTokenizerFast:
    return train_tokenizer(["one two three four five", "the cat sat on the mat"] * 20, 290, SPECIAL, "<|im_end|>")


@pytest.fixture(scope="module")
def teacher() -> PreTrainedTokenizerFast:
    """Other merges, other order of the ids, EOS of another name, and the student's EOS string as some other token."""
    special = ["<|im_end|>", "</s>", "<|audio|>", "<|user|>"]
    return train_tokenizer(["three cats on two mats", "five of the best"] * 20, 310, special, "</s>")


@pytest.fixture(scope="module")
def token_map(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> TokenMap:
    return TokenMap.build(
        student, teacher, 300, 320, student_eos_id=student.eos_token_id, teacher_eos_id=teacher.eos_token_id
    )


def test_ordinary_tokens_map_by_their_string(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, token_map: TokenMap
) -> None:
    teacher_vocab, to_teacher = teacher.get_vocab(), token_map.student_to_teacher
    ordinary = {token: i for token, i in student.get_vocab().items() if token not in SPECIAL}
    for token, index in ordinary.items():
        assert to_teacher[index] == teacher_vocab.get(token, -1)
    mapped = sum(token in teacher_vocab for token in ordinary)
    assert 256 < mapped < len(ordinary)  # bytes and some merges, not all
    assert token_map.coverage == pytest.approx(mapped / len(ordinary))
    assert (to_teacher[len(student) :] == -1).all()  # rows of the model that the tokenizer does not use


def test_the_tables_are_inverse(token_map: TokenMap) -> None:
    for student_id, teacher_id in enumerate(token_map.student_to_teacher.tolist()):
        assert teacher_id == -1 or token_map.teacher_to_student[teacher_id] == student_id
    assert (token_map.student_to_teacher >= 0).sum() == (token_map.teacher_to_student >= 0).sum()
    with pytest.raises(AssertionError, match="inverse"):
        TokenMap(torch.tensor([1, 0]), torch.tensor([0, 1]))


def test_eos_maps_to_eos_and_other_control_tokens_to_nothing(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, token_map: TokenMap
) -> None:
    assert token_map.student_to_teacher[student.eos_token_id] == teacher.eos_token_id
    assert token_map.teacher_to_student[teacher.eos_token_id] == student.eos_token_id
    assert token_map.teacher_to_student[teacher.convert_tokens_to_ids("<|im_end|>")] == -1  # its string is not its role
    assert token_map.student_to_teacher[student.convert_tokens_to_ids("<|audio|>")] == -1  # both have the string


def test_eos_is_a_role_also_where_the_tokenizer_calls_it_ordinary(
    student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast
) -> None:
    q, z = student.convert_tokens_to_ids("q"), teacher.convert_tokens_to_ids("z")
    token_map = TokenMap.build(student, teacher, 300, 320, student_eos_id=q, teacher_eos_id=z)
    assert token_map.student_to_teacher[q] == z
    assert token_map.teacher_to_student[teacher.convert_tokens_to_ids("q")] == -1


def test_blocked_ids_do_not_map(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> None:
    a, b = student.convert_tokens_to_ids("a"), teacher.convert_tokens_to_ids("b")
    token_map = TokenMap.build(
        student, teacher, 300, 320, student_eos_id=student.eos_token_id, teacher_eos_id=teacher.eos_token_id,
        student_blocked=[a], teacher_blocked=[b],
    )  # fmt: skip
    assert token_map.student_to_teacher[a] == -1
    assert token_map.teacher_to_student[b] == -1
    assert token_map.student_to_teacher[student.convert_tokens_to_ids("c")] >= 0


def test_map_response(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, token_map: TokenMap) -> None:
    ids = [student.convert_tokens_to_ids(token) for token in ("t", "e", "n")] + [student.eos_token_id]
    mapped = token_map.map_response(ids)
    assert teacher.convert_ids_to_tokens(mapped) == ["t", "e", "n", "</s>"]
    unmapped = student.convert_tokens_to_ids("<|audio|>")
    assert token_map.map_response([ids[0], unmapped, ids[1]]) == [mapped[0], -1, mapped[1]]
    assert token_map.map_response([]) == []


def test_tokenizers_without_a_shared_token_are_refused(student: PreTrainedTokenizerFast) -> None:
    other = Tokenizer(models.WordLevel({"<unk>": 0, "wordone": 1, "wordtwo": 2}, unk_token="<unk>"))
    words = PreTrainedTokenizerFast(tokenizer_object=other, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(ValueError, match="share none of their") as error:
        TokenMap.build(student, words, 300, 4, student_eos_id=1, teacher_eos_id=words.eos_token_id)
    assert "\n" not in str(error.value)


def test_identity_maps_everything() -> None:
    token_map = TokenMap.identity(5)
    assert token_map.map_response([4, 0, 2]) == [4, 0, 2]
    assert token_map.coverage == 1.0


def test_blocked_mask() -> None:
    assert blocked_mask({1, 3}, 5).tolist() == [False, True, False, True, False]
    assert blocked_mask([], 2).tolist() == [False, False]
    with pytest.raises(ValueError, match="outside a vocabulary of 5"):
        blocked_mask([1, 5], 5)


def test_a_permuted_teacher_vocabulary_changes_nothing(student: PreTrainedTokenizerFast) -> None:
    """The same teacher with its ids shuffled, mapped through tokenizers: the same loss and gradient."""
    size, eos_id = len(student), student.eos_token_id
    generator = torch.Generator().manual_seed(0)
    order_V = torch.randperm(size, generator=generator)  # new teacher id of each student id
    shuffled = SimpleNamespace(
        get_vocab=lambda: {token: int(order_V[i]) for token, i in student.get_vocab().items()},
        all_special_ids=order_V[torch.tensor(student.all_special_ids)].tolist(),
        added_tokens_decoder={int(order_V[i]): token for i, token in student.added_tokens_decoder.items()},
    )
    blocked = [student.convert_tokens_to_ids(token) for token in SPECIAL if token != "<|im_end|>"]
    token_map = TokenMap.build(
        student, shuffled, size, size, student_eos_id=eos_id, teacher_eos_id=int(order_V[eos_id]),
        student_blocked=blocked, teacher_blocked=order_V[torch.tensor(blocked)].tolist(),
    )  # fmt: skip
    assert token_map.coverage == 1.0
    student_NV, teacher_NV = torch.randn(2, 6, size, generator=generator, dtype=torch.float64).unbind()
    teacher_NV[:, blocked] = float("-inf")
    shuffled_NV = torch.empty_like(teacher_NV)
    shuffled_NV[:, order_V] = teacher_NV
    keys = SimpleNamespace(
        kind="forward_kl", support="union", temperature=1.5, beta=0.5, renormalize=False, max_importance=5, chunk_size=4
    )

    def loss(logits_NV: torch.Tensor, table: TokenMap) -> tuple[torch.Tensor, torch.Tensor]:
        blocked_V = blocked_mask(blocked, size)
        topk_NK = student_NV.masked_fill(blocked_V, float("-inf")).topk(8).indices
        written_N = topk_NK[:, 3]
        candidates_NC = candidate_ids(topk_NK, written_N, eos_id)
        leaf_NV = student_NV.clone().requires_grad_()
        loss_N, _ = position_loss(
            leaf_NV, response_ids_N=written_N, rollout_logprobs_N=torch.zeros(6), candidate_ids_NC=candidates_NC,
            teacher=score_support(logits_NV, candidates_NC, table, top_k=5, temperature=1.5), eos_id=eos_id,
            config=keys, blocked_V=blocked_V,
        )  # fmt: skip
        return loss_N.detach(), torch.autograd.grad(loss_N.sum(), leaf_NV)[0]

    same, permuted = loss(teacher_NV, TokenMap.identity(size)), loss(shuffled_NV, token_map)
    unmapped = loss(shuffled_NV, TokenMap.identity(size))  # ids used as indices without a map
    for a, b, c in zip(same, permuted, unmapped, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert (a - c).abs().max() > 0.01
