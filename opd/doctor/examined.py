"""What the checks look at, and what they leave for those that come after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opd.config import parts_of
from opd.doctor.report import Finding
from opd.model_sizes import StudentSizes
from opd.schema import Config
from opd.training_data import TrainingData
from opd.types import Batch, Utterance

GB = 1e9


class Examined:
    """One run.

    config    of the run; the first one where it stands for several (a ladder, a comparison)
    good      utterances of the training set that were decoded
    """

    def __init__(self, config: Config, scratch: Path) -> None:
        self.whole = config
        self.scratch = scratch
        self.parts = [config] if not (config.stages or config.compare) else parts_of(config)
        self.config = self.parts[0]
        self.with_teacher = self.config.stage != "sft"
        self.data: TrainingData | None = None
        self.eval_sets: dict[str, Batch] = {}
        self.good: list[Utterance] = []
        self.seconds: list[float] = []
        self.student_path = ""
        self.teacher_paths: dict[str, str] = {}
        self.sizes: StudentSizes | None = None
        self.live: Any = None  # what opd.doctor.live has started
        self.findings: dict[str, Finding] = {}

    def passed(self, name: str) -> bool:
        """Whether a check has neither failed nor been skipped."""
        return name not in self.findings or self.findings[name].status not in ("fail", "skipped")

    def close(self) -> None:
        if self.live is not None:
            self.live.close()
