"""What a teacher is: two verbs on dictionaries of tensors, so that it may live in another Python environment."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from opd.types import Batch


class Teacher(Protocol):
    """Scores a student's rollout, and transcribes."""

    def score(self, utterances: Batch, rollout: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A `TeacherScore` as a dictionary, for a `Rollout` given as one; the same B and T."""
        ...

    def facts(self) -> dict[str, Any]:
        """What the log says about this teacher: its size, the share of the student's vocabulary that maps."""
        ...

    def transcribe(self, utterances: Batch) -> list[str]:
        """The teacher's own greedy transcripts."""
        ...


def make_teacher(config: dict[str, Any], student_path: str) -> Teacher:
    """The teacher of a config dictionary (`Config.to_dict`); `student_path` is where the student's tokenizer is."""
    kind = config["teacher"]["kind"]
    if kind == "arkasr":
        from opd.teachers.arkasr import ArkasrTeacher

        return ArkasrTeacher(config, student_path)
    raise ValueError(f"teacher.kind={kind}: unknown; there is arkasr")
