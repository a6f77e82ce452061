"""The records that cross module borders, and the one legend of shape suffixes.

A tensor's name ends in its shape: B utterances, P prompt positions, T response positions, N flattened
(utterance, position) pairs that are trained, K top-k support, C candidates, U union support,
V vocabulary, M mel bins, F mel frames, S samples, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

# The names that configs and checkpoints use.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Utterance:
    """One line of a manifest. Times are seconds in the file; -1 means from the start / to the end."""

    id: str
    audio: str
    text: str | None = None
    language: str | None = None
    task: str = "asr"
    begin_time: float = -1.0
    end_time: float = -1.0
    extra: Mapping[str, Any] = field(default_factory=dict)


Batch = list[Utterance]


@dataclass(frozen=True)
class TeacherTranscript:
    """What a teacher wrote for one utterance, greedy.

    avg_logprob  mean log-probability of its tokens, the one that ends it included; nats
    finished     False where the length limit cut it
    looped       True where it falls into a repetition loop (opd.rollout.loops)
    error        why the audio could not be read; the text is then empty
    """

    text: str
    avg_logprob: float
    num_tokens: int
    finished: bool
    looped: bool
    error: str | None = None


class TensorRecord:
    """A dataclass of tensors that travels between processes as a plain dictionary (no class to unpickle)."""

    def to_dict(self) -> dict[str, torch.Tensor]:
        """The tensors by field, their shapes as the names say; fields that are None are left out."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, tensors: Mapping[str, torch.Tensor]) -> Any:
        """The record of what `to_dict` gave, sharing its tensors."""
        return cls(**tensors)


@dataclass
class Rollout(TensorRecord):
    """What the student wrote for B utterances, T being the longest response.

    response_ids_BT    int64, student ids; padding id where the mask is False
    response_mask_BT   bool, the EOS position included
    topk_ids_BTK       int64, the student's own top-k at each position (support S)
    logprobs_BT        float32, log-probability of the written token under the rollout's distribution
    finished_B         bool, False where the length limit cut the response (no EOS position)
    loop_start_B       int64, position where a repetition loop begins; T where there is none
    bad_audio_B        bool, True where the audio could not be read and the row is a placeholder (mask all False)
    """

    response_ids_BT: torch.Tensor
    response_mask_BT: torch.Tensor
    topk_ids_BTK: torch.Tensor
    logprobs_BT: torch.Tensor
    finished_B: torch.Tensor
    loop_start_B: torch.Tensor
    bad_audio_B: torch.Tensor


@dataclass
class TeacherScore(TensorRecord):
    """The teacher's view of a rollout, in *student* ids and float32.

    The candidates at a position are the student's top-k ids, then the written id, then EOS: C = K + 2.

    topk_ids_BTK              int64, the teacher's own top-k as student ids; -1 where an id has no student counterpart
    topk_logprobs_BTK         log-probability of those, over the teacher's whole allowed vocabulary
    candidate_logprobs_BTC    log-probability at the candidates; -inf where an id has no teacher counterpart
    tail_logprob_BT           log of the teacher's mass outside the union support (unmapped ids included)
    unmapped_mass_BT          teacher mass on ids without a student counterpart
    entropy_BT                entropy of the teacher's distribution, nats
    aligned_mask_BT           bool, False at positions that could not be scored (ids that do not map)
    full_logprobs_BTV         only for `full_kl`: log-probability at every student id, -inf where unmapped
    """

    topk_ids_BTK: torch.Tensor
    topk_logprobs_BTK: torch.Tensor
    candidate_logprobs_BTC: torch.Tensor
    tail_logprob_BT: torch.Tensor
    unmapped_mass_BT: torch.Tensor
    entropy_BT: torch.Tensor
    aligned_mask_BT: torch.Tensor
    full_logprobs_BTV: torch.Tensor | None = None
