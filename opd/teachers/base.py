"""What a teacher is: two verbs on dictionaries of tensors, so that it may live in another Python environment."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from opd.types import Batch, TeacherTranscript

KINDS = ("arkasr", "qwen3_asr", "hf")


class Teacher(Protocol):
    """Scores a student's rollout, and transcribes."""

    def score(self, utterances: Batch, rollout: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A `TeacherScore` as a dictionary, for a `Rollout` given as one; the same B and T."""
        ...

    def score_and_count(
        self, utterances: Batch, rollout: dict[str, torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """`score`, and what it says about alignment: written and aligned positions, responses, re-tokenised ones.

        `bad_audio` lists (utterance id, path, reason) of what the teacher alone could not read.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """What the log says about this teacher: its size, the share of the student's vocabulary that maps."""
        ...

    def transcribe(self, utterances: Batch) -> list[TeacherTranscript]:
        """The teacher's own greedy transcripts, in order."""
        ...


def make_teacher(config: dict[str, Any], student_path: str) -> Teacher:
    """The teacher of a config dictionary (`Config.to_dict`); `student_path` is where the student's tokenizer is."""
    teacher = _of_kind(config["teacher"]["kind"])(config, student_path)
    if not config["teacher"]["cache_dir"]:
        return teacher
    from opd.teachers.cache import CachedTeacher

    return CachedTeacher(teacher, config, student_path)


def _of_kind(kind: str) -> Any:
    if kind == "arkasr":
        from opd.teachers.arkasr import ArkasrTeacher

        return ArkasrTeacher
    if kind == "qwen3_asr":
        from opd.teachers.qwen3_asr import Qwen3AsrTeacher

        return Qwen3AsrTeacher
    if kind == "hf":
        from opd.teachers.hf import HfTeacher

        return HfTeacher
    raise ValueError(f"teacher.kind={kind}: unknown; there are {', '.join(KINDS)}")
