"""Student responses -> teacher ids: one for one where every id maps, else through the text and its byte offsets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from opd.align import align_response, response_text, token_bytes
from opd.arkasr import blocked_token_ids
from opd.types import Rollout
from opd.vocab import TokenMap


class ByteVocabulary:
    """A tokenizer as `TokenMap.build` reads it, each token named by the bytes that it writes.

    For byte-level BPE that is the same as by its string; `Ġthe` of one family and `▁the` of another become one token too.
    """

    all_special_ids: tuple[int, ...] = ()  # they write nothing, so they are not among the tokens
    added_tokens_decoder: Mapping[int, Any] = MappingProxyType({})

    def __init__(self, tokens: list[bytes | None]) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[bytes, int]:
        """Bytes -> the lowest id that writes them."""
        return {token: i for i, token in reversed(list(enumerate(self.tokens))) if token}


def text_tokens(tokenizer: Any, vocab_size: int) -> list[bytes | None]:
    """`token_bytes`; for Mistral's own tokenizers (Voxtral), which have no tokenizer.json, from their table of bytes."""
    table = tekken_of(tokenizer)
    if table is None:
        return token_bytes(tokenizer, vocab_size)
    tokens = [table.id_to_byte_piece(index) or None for index in range(min(vocab_size, table.n_words))]
    return tokens + [None] * (vocab_size - len(tokens))


def tekken_of(tokenizer: Any) -> Any | None:
    """The table inside a tokenizer of mistral_common; None for others."""
    table = getattr(getattr(getattr(tokenizer, "tokenizer", None), "instruct_tokenizer", None), "tokenizer", None)
    return table if hasattr(table, "id_to_byte_piece") else None


def control_ids(tokenizer: Any, vocab_size: int, eos_id: int) -> list[int]:
    """Ids that a response may not have: control tokens but EOS, and rows without a token."""
    if tekken_of(tokenizer) is None:
        return blocked_token_ids(tokenizer, vocab_size, eos_id)
    return [
        index for index, token in enumerate(text_tokens(tokenizer, vocab_size)) if token is None and index != eos_id
    ]


class MappedResponse(NamedTuple):
    """Teacher ids; for each student position the teacher position that predicts the same token, -1 for none."""

    ids: list[int]
    positions: list[int]
    retokenised: bool


@dataclass
class MappedRollout:
    """The responses of B utterances in the teacher's ids, L being the longest.

    ids_BL, mask_BL   teacher ids (0 where the mask is False)
    position_BT       teacher position of each student position, -1 where it cannot be scored
    num_retokenised   responses that did not map id for id
    """

    ids_BL: torch.Tensor
    mask_BL: torch.Tensor
    position_BT: torch.Tensor
    num_retokenised: int


class ResponseMapper:
    """Maps responses between two tokenizers, given the two as transformers tokenizers and the ids that end a response."""

    def __init__(
        self, student_tokenizer: Any, teacher_tokenizer: Any, student_vocab_size: int, teacher_vocab_size: int, *,
        student_eos_id: int, teacher_eos_id: int, student_blocked: list[int], teacher_blocked: list[int],
    ) -> None:  # fmt: skip
        self.student_tokens = text_tokens(student_tokenizer, student_vocab_size)
        self.teacher_tokens = text_tokens(teacher_tokenizer, teacher_vocab_size)
        self.teacher_tokenizer = teacher_tokenizer
        # Unless special tokens are split, `<|im_end|>` that the student spelt out in a transcript would end the turn.
        # Mistral's tokenizers never read control tokens from text.
        self._reading = {} if tekken_of(teacher_tokenizer) else {"split_special_tokens": True}
        self.student_eos_id, self.teacher_eos_id = student_eos_id, teacher_eos_id
        self.token_map = TokenMap.build(
            ByteVocabulary(self.student_tokens),
            ByteVocabulary(self.teacher_tokens),
            student_vocab_size,
            teacher_vocab_size,
            student_eos_id=student_eos_id,
            teacher_eos_id=teacher_eos_id,
            student_blocked=student_blocked,
            teacher_blocked=teacher_blocked,
        )

    def map_rollout(self, rollout: Rollout) -> MappedRollout:
        """All responses of a rollout."""
        rows = zip(rollout.response_ids_BT.tolist(), rollout.response_mask_BT.tolist(), strict=True)
        responses = [self.map_response(ids[: sum(mask)]) for ids, mask in rows]
        num_rows, length = rollout.response_ids_BT.shape
        longest = max(1, max(len(response.ids) for response in responses))
        ids_BL = torch.zeros(num_rows, longest, dtype=torch.int64)
        mask_BL = torch.zeros(num_rows, longest, dtype=torch.bool)
        position_BT = torch.full((num_rows, length), -1)
        for row, response in enumerate(responses):
            ids_BL[row, : len(response.ids)] = torch.tensor(response.ids, dtype=torch.int64)
            mask_BL[row, : len(response.ids)] = True
            position_BT[row, : len(response.positions)] = torch.tensor(response.positions, dtype=torch.int64)
        return MappedRollout(ids_BL, mask_BL, position_BT, sum(response.retokenised for response in responses))

    def map_response(self, ids: list[int]) -> MappedResponse:
        """The written ids of one response (EOS included where it was written)."""
        mapped = self.token_map.map_response(ids)
        if all(index >= 0 for index in mapped):
            return MappedResponse(mapped, list(range(len(ids))), False)
        finished = ids[-1] == self.student_eos_id
        teacher_ids, positions, whole = self._retokenise(ids[: len(ids) - finished])
        if finished:
            # After a text that the teacher read in part, its end would be the end of something else.
            positions.append(len(teacher_ids) if whole else -1)
            teacher_ids = [*teacher_ids, self.teacher_eos_id]
        return MappedResponse(teacher_ids, positions, True)

    def _retokenise(self, ids: list[int]) -> tuple[list[int], list[int], bool]:
        """(teacher ids of the text, teacher position of each id or -1, whether they spell the whole text)."""
        tokens = [self.student_tokens[index] for index in ids]
        spelled = [token or b"" for token in tokens]
        text = response_text(spelled)
        teacher_ids = self.teacher_tokenizer(text, add_special_tokens=False, **self._reading)["input_ids"]
        teacher_tokens = [self.teacher_tokens[index] or b"" for index in teacher_ids]
        whole = b"".join(teacher_tokens) in (b"".join(spelled), b" " + b"".join(spelled))
        return teacher_ids, align_response(spelled, teacher_tokens), whole and None not in tokens
