"""Token maps between the student's and the teacher's vocabulary, and the ids that may not be written.

Ids are mapped one to one by token string. A string that only one side has stays unmapped (-1); `opd.align` aligns
responses across different segmentations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class TokenMap:
    """A one-to-one map between two vocabularies.

    student_to_teacher  (student V,) int64, teacher id of each student id, -1 without a counterpart
    teacher_to_student  (teacher V,) int64, the inverse
    coverage            share of the student's ordinary ids (neither control tokens nor blocked) that map
    """

    student_to_teacher: torch.Tensor
    teacher_to_student: torch.Tensor
    coverage: float = 1.0

    def __post_init__(self) -> None:
        mapped_V = (self.student_to_teacher >= 0).nonzero()[:, 0]
        back_V = self.teacher_to_student[self.student_to_teacher[mapped_V]]
        assert torch.equal(back_V, mapped_V), "the teacher's table is not the inverse of the student's"
        assert int((self.teacher_to_student >= 0).sum()) == len(mapped_V), "an id maps one way only"

    @classmethod
    def identity(cls, vocab_size: int) -> TokenMap:
        """The map of a vocabulary to itself."""
        return cls(torch.arange(vocab_size), torch.arange(vocab_size))

    @classmethod
    def build(
        cls,
        student_tokenizer: Any,
        teacher_tokenizer: Any,
        student_vocab_size: int,
        teacher_vocab_size: int,
        *,
        student_eos_id: int,
        teacher_eos_id: int,
        student_blocked: Iterable[int] = (),
        teacher_blocked: Iterable[int] = (),
    ) -> TokenMap:
        """Maps ordinary tokens by their string and EOS to EOS; control tokens and blocked ids stay unmapped.

        The tokenizers are transformers tokenizers; the vocabulary sizes are those of the models' outputs, which may
        have more rows than the tokenizer has tokens. Raises ValueError where no ordinary token is shared.
        """
        student = ordinary_tokens(student_tokenizer, student_vocab_size, {student_eos_id, *student_blocked})
        teacher = ordinary_tokens(teacher_tokenizer, teacher_vocab_size, {teacher_eos_id, *teacher_blocked})
        pairs = [(index, teacher[token]) for token, index in student.items() if token in teacher]
        if not pairs:
            raise ValueError(
                f"student and teacher share none of their {len(student)} and {len(teacher)} tokens: "
                "choose a teacher with the student's kind of tokenizer"
            )
        pairs_R2 = torch.tensor([*pairs, (student_eos_id, teacher_eos_id)])
        student_to_teacher = torch.full((student_vocab_size,), -1)
        teacher_to_student = torch.full((teacher_vocab_size,), -1)
        student_to_teacher[pairs_R2[:, 0]] = pairs_R2[:, 1]
        teacher_to_student[pairs_R2[:, 1]] = pairs_R2[:, 0]
        return cls(student_to_teacher, teacher_to_student, len(pairs) / len(student))

    def map_response(self, ids: list[int]) -> list[int]:
        """Teacher ids of a response, one for one; -1 where an id does not map."""
        return self.student_to_teacher[torch.tensor(ids, dtype=torch.int64)].tolist()


def ordinary_tokens(tokenizer: Any, vocab_size: int, excluded: set[int]) -> dict[str, int]:
    """String -> id of the tokens that are text: those the model has, less control tokens and excluded ids."""
    added = tokenizer.added_tokens_decoder
    control = excluded | set(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}
    return {token: i for token, i in tokenizer.get_vocab().items() if i < vocab_size and i not in control}


def blocked_mask(blocked_ids: Iterable[int], vocab_size: int) -> torch.Tensor:
    """Ids as a mask over the vocabulary: (V,) bool. Raises ValueError for an id outside of it."""
    ids = torch.tensor(sorted(set(blocked_ids)), dtype=torch.int64)
    if len(ids) and not 0 <= int(ids[0]) <= int(ids[-1]) < vocab_size:
        raise ValueError(f"blocked ids run from {int(ids[0])} to {int(ids[-1])}, outside a vocabulary of {vocab_size}")
    mask_V = torch.zeros(vocab_size, dtype=torch.bool)
    mask_V[ids] = True
    return mask_V
