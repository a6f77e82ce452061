"""Supports as tensors against Python sets, tails against explicit sums."""

from __future__ import annotations

import math

import pytest
import torch

from opd.support import TAIL_FLOOR, candidate_ids, check_top_k, log_tail, narrow_support, score_support, union_support
from opd.vocab import TokenMap


def test_candidates_are_top_k_then_written_id_then_eos() -> None:
    topk_BTK = torch.tensor([[[4, 5, 6], [7, 8, 9]]])
    candidates_BTC = candidate_ids(topk_BTK, torch.tensor([[5, 2]]), eos_id=2)
    assert candidates_BTC.tolist() == [[[4, 5, 6, 5, 2], [7, 8, 9, 2, 2]]]


def test_a_top_k_beyond_the_ids_that_may_be_written_is_refused() -> None:
    blocked_V = torch.tensor([True, False, False, True, False])
    check_top_k(3, blocked_V)
    with pytest.raises(ValueError, match="loss.top_k=4: the student's vocabulary has 5 ids, of which 3 may be written"):
        check_top_k(4, blocked_V)


def test_union_marks_the_first_occurrence_of_ids_that_map() -> None:
    candidates_NC = torch.tensor([[4, 5, 6, 5, 2], [9, 8, 0, 8, 2]])
    topk_NK = torch.tensor([[6, 7, -1], [0, 2, 11]])
    mapped_NC = torch.tensor([[True, True, False, True, True], [False, True, True, True, True]])
    ids_NU, valid_NU = union_support(candidates_NC, topk_NK, mapped_NC)
    assert valid_NU.tolist() == [
        [True, True, False, False, True, True, True, False],  # 6 counts where the teacher brings it
        [False, True, True, False, True, False, False, True],
    ]
    assert [ids[valid].tolist() for ids, valid in zip(ids_NU, valid_NU, strict=True)] == [
        [4, 5, 2, 6, 7],
        [8, 0, 2, 11],
    ]
    assert (ids_NU >= 0).all()  # so that they can be gathered


def test_union_equals_python_sets_on_random_ids() -> None:
    generator = torch.Generator().manual_seed(0)
    candidates_NC = torch.randint(0, 20, (200, 9), generator=generator)
    topk_NK = torch.randint(-1, 20, (200, 6), generator=generator)
    mapped_NC = candidates_NC % 7 != 0
    ids_NU, valid_NU = union_support(candidates_NC, topk_NK, mapped_NC)
    for n in range(200):
        expected = {i for i in candidates_NC[n].tolist() if i % 7} | {i for i in topk_NK[n].tolist() if i >= 0}
        found = ids_NU[n][valid_NU[n]].tolist()
        assert len(found) == len(set(found))
        assert set(found) == expected


def test_every_kind_of_support_keeps_the_written_id_and_eos() -> None:
    candidates_NC, topk_NK = torch.tensor([[4, 5, 6, 2]]), torch.tensor([[7, 8, 9]])
    columns = {kind: torch.cat(narrow_support(kind, candidates_NC, topk_NK), -1).tolist()[0] for kind in
               ("union", "student", "teacher")}  # fmt: skip
    assert columns == {"union": [4, 5, 6, 2, 7, 8, 9], "student": [4, 5, 6, 2], "teacher": [6, 2, 7, 8, 9]}
    with pytest.raises(ValueError, match="loss.support=both"):
        narrow_support("both", candidates_NC, topk_NK)


def test_log_tail_is_the_mass_outside() -> None:
    logits_NV = torch.randn(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits_NV[:, 30:] = float("-inf")
    logprobs_NV = logits_NV.log_softmax(-1)
    ids_NU = torch.tensor([[3, 0, 9, 3, 0]]).expand(5, -1)
    valid_NU = torch.tensor([[True, False, True, False, True]]).expand(5, -1)  # 0 stands there valid and not valid
    outside = [i for i in range(30) if i not in (3, 9, 0)]
    expected_N = logprobs_NV[:, outside].exp().sum(-1).log()
    torch.testing.assert_close(log_tail(logprobs_NV.exp(), ids_NU, valid_NU), expected_N)


def test_a_small_tail_is_exact_in_float32() -> None:
    """1 - (mass inside) is 0 or rounding noise here."""
    logits_NV = torch.tensor([[0.0, -40.0, -41.0, -42.0]])
    tail_N = log_tail(logits_NV.softmax(-1), torch.tensor([[0]]), torch.tensor([[True]]))
    assert tail_N.item() == pytest.approx(math.log(math.exp(-40) + math.exp(-41) + math.exp(-42)), abs=1e-5)


@pytest.mark.parametrize("outside", [float("-inf"), 3 * TAIL_FLOOR])
def test_an_empty_tail_is_the_floor(outside: float) -> None:
    probs_NV = torch.tensor([[1.0, 2.0, outside, outside]]).softmax(-1)
    tail_N = log_tail(probs_NV, torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))
    assert tail_N.item() == TAIL_FLOOR


def test_a_support_of_everything_has_an_empty_tail() -> None:
    probs_NV = torch.randn(2, 6).softmax(-1)
    tail_N = log_tail(probs_NV, torch.arange(6).expand(2, -1), torch.ones(2, 6, dtype=torch.bool))
    assert (tail_N == TAIL_FLOOR).all()


# Student ids 0..5, teacher ids 0..7: student 4 and teacher 1, 6, 7 have no counterpart.
MAP = TokenMap(torch.tensor([3, 0, 5, 2, -1, 4]), torch.tensor([1, -1, 3, 0, 5, 2, -1, -1]))


def score(full: bool = False, support: str = "union", **options: float) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A score of two positions and the teacher's probabilities; teacher id 2 (student 3) is blocked."""
    logits_NV = torch.tensor(
        [[1.0, 4.0, float("-inf"), 0.5, 2.0, 0.0, 3.0, -1.0], [3.0, -2.0, float("-inf"), 2.0, 1.0, 0.0, -1.0, 0.4]]
    ).double()
    candidates_NC = torch.tensor([[4, 3, 0, 2], [1, 0, 4, 2]])  # top-k of two, written id, EOS = 2
    fields = score_support(logits_NV, candidates_NC, MAP, top_k=3, full=full, support=support, **options)  # type: ignore[arg-type]
    return fields, (logits_NV / options.get("temperature", 1.0)).softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_score_is_in_student_ids_over_the_whole_teacher_vocabulary(temperature: float) -> None:
    fields, probs_NV = score(temperature=temperature)
    assert fields["topk_ids_BTK"].tolist() == [[-1, -1, 5], [1, 0, 5]]  # teacher ids 1, 6, 4 and 0, 3, 4
    torch.testing.assert_close(fields["topk_logprobs_BTK"], probs_NV.topk(3).values.log())
    candidates = fields["candidate_logprobs_BTC"].exp()
    p = probs_NV.tolist()
    expected = [[0.0, 0.0, p[0][3], p[0][5]], [p[1][0], p[1][3], 0.0, p[1][5]]]
    torch.testing.assert_close(candidates, torch.tensor(expected).double())
    # Supports in teacher ids: {3, 5, 4} and {0, 3, 5, 4}.
    tails = [p[0][0] + p[0][1] + p[0][6] + p[0][7], p[1][1] + p[1][6] + p[1][7]]
    torch.testing.assert_close(fields["tail_logprob_BT"].exp(), torch.tensor(tails).double())
    torch.testing.assert_close(fields["unmapped_mass_BT"], probs_NV[:, [1, 6, 7]].sum(-1))
    torch.testing.assert_close(fields["entropy_BT"], torch.distributions.Categorical(probs_NV).entropy())


@pytest.mark.parametrize(
    ("support", "inside"), [("student", ([3, 5], [0, 3, 5])), ("teacher", ([3, 5, 4], [0, 3, 4, 5]))]
)
def test_the_tail_follows_the_kind_of_support(support: str, inside: tuple[list[int], list[int]]) -> None:
    fields, probs_NV = score(support=support)
    for n in range(2):
        assert fields["tail_logprob_BT"][n].exp().item() == pytest.approx(1 - probs_NV[n, inside[n]].sum().item())


def test_the_full_score_leaves_unmapped_ids_to_the_tail() -> None:
    fields, probs_NV = score(full=True)
    expected_NV = probs_NV[:, [3, 0, 5, 2, 0, 4]]
    expected_NV[:, 4] = 0
    torch.testing.assert_close(fields["full_logprobs_BTV"].exp(), expected_NV)
    torch.testing.assert_close(fields["tail_logprob_BT"].exp(), probs_NV[:, [1, 6, 7]].sum(-1))


def test_top_k_that_reaches_into_blocked_ids_names_none_of_them() -> None:
    logits_NV = torch.full((1, 8), float("-inf"))
    logits_NV[0, [3, 5]] = torch.tensor([1.0, 0.0])
    fields = score_support(logits_NV, torch.tensor([[0, 2, 0, 2]]), MAP, top_k=20)
    assert sorted(fields["topk_ids_BTK"][0].tolist()) == [-1] * 6 + [0, 2]
    assert fields["tail_logprob_BT"].item() == TAIL_FLOOR
    assert fields["entropy_BT"].isfinite().all()


def test_score_of_no_positions_and_chunks() -> None:
    logits_NV, candidates_NC = torch.randn(7, 8), torch.randint(0, 6, (7, 4))
    whole = score_support(logits_NV, candidates_NC, MAP, top_k=3, full=True)
    parts = score_support(logits_NV, candidates_NC, MAP, top_k=3, full=True, chunk_size=2)
    none = score_support(logits_NV[:0], candidates_NC[:0], MAP, top_k=3, full=True)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value)
        assert none[name].shape == (0, *value.shape[1:])
        assert value.dtype in (torch.float32, torch.int64)
