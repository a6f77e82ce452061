"""The workers of one run as the driver holds them: Ray, the student's ranks, the teacher's workers, their clocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opd.checkpoint import atomic_write_text
from opd.metrics import PhaseTimer
from opd.schema import Config
from opd.survival import STOP
from opd.teachers.actor import TeacherGroup
from opd.types import Batch
from trainers.env import set_verl_env


class Workers:
    """Starts and ends the workers. `student` and `teacher` are None where they do not run.

    cpu_seconds   the workers' processor time in training, added to by `stop_clocks`
    """

    def __init__(self, config: Config, run_dir: Path, timer: PhaseTimer, cpu_seconds: dict[str, float]) -> None:
        self.config = config
        self.run_dir = run_dir
        self.timer = timer
        self.cpu_seconds = cpu_seconds
        self.student: Any = None
        self.teacher: Any = None
        self.wait_for_room_s = 0.0
        self._clocks: dict[str, float] | None = None

    def start_teacher(self, student_path: str) -> None:
        """The teacher alone (stage td)."""
        self._connect(with_student=False, with_teacher=True)
        self.teacher = TeacherGroup(self.config, student_path)
        self._wait_for_teacher()

    def start(self, student_path: str, *, with_teacher: bool) -> None:
        """The student's ranks and, for on-policy distillation, the teacher; both load at the same time."""
        self._connect(with_student=True, with_teacher=with_teacher)
        from trainers.cluster import StudentPool
        from trainers.student import Student

        with self.timer("start_student"):
            # Room for the student first: teachers may fill a GPU in twos, and leave no share of it for a rank.
            pool = StudentPool(self.config.cluster)
            pool.get_placement_groups()
            if with_teacher:
                self.teacher = TeacherGroup(self.config, student_path)
            self.student = Student(self.config, student_path, pool)
            facts = self.student.wait_ready()
        teacher_facts = self._wait_for_teacher() if with_teacher else []
        print(f"student: {student_path}, {facts[0]['num_parameters']:,} parameters on {len(facts)} ranks")
        pids = {"student": [f["pid"] for f in facts], "teacher": [f["pid"] for f in teacher_facts]}
        # For py-spy, and for whoever watches.
        atomic_write_text(self.run_dir / "workers.json", json.dumps(pids) + "\n")

    def close(self) -> None:
        """Makes room for the next stage of a ladder."""
        for group in (self.student, self.teacher):
            if group is not None:
                group.close()
        self.student = self.teacher = None

    def _connect(self, *, with_student: bool, with_teacher: bool) -> None:
        cluster = self.config.cluster
        set_verl_env(cluster.use_gpu)
        from trainers.cluster import check_resources, connect

        with self.timer("start_ray"):
            connect(cluster)
            STOP.install(self.config.checkpoint.grace_s)
            ranks = self.config.num_ranks if with_student else 0
            check_resources(cluster, ranks, self.config.num_teachers if with_teacher else 0, self.wait_for_room_s)

    def _wait_for_teacher(self) -> list[dict[str, Any]]:
        with self.timer("start_teacher"):
            facts = self.teacher.wait_ready()
        coverage = facts[0]["vocab_coverage"]
        print(f"teacher: {self.config.teacher.path}, {coverage:.1%} of the student's vocabulary maps into its own")
        return facts

    def teacher_texts(self, utterances: Batch) -> list[str | None]:
        """The teacher's transcripts in order; None for bad audio."""
        transcripts = self.teacher.transcribe(utterances)
        return [None if transcript.error is not None else transcript.text for transcript in transcripts]

    def take_busy_s(self) -> list[float]:
        """Seconds that student and teacher, as far as they run, worked on steps since this was last asked."""
        return [group.take_busy_s() for group in (self.student, self.teacher) if group is not None]

    # -- clocks ------------------------------------------------------------------------------------------------------

    def start_clocks(self) -> None:
        """From here on the workers' processor time is training."""
        self._clocks = self._read_clocks()

    def stop_clocks(self) -> None:
        """Adds the processor time since `start_clocks`: evaluation and saving are not training."""
        if self._clocks is not None:
            for name, seconds in self._read_clocks().items():
                self.cpu_seconds[name] += seconds - self._clocks[name]
            self._clocks = None

    def _read_clocks(self) -> dict[str, float]:
        groups = {"student": self.student, "teacher": self.teacher}
        return {name: 0.0 if group is None else group.cpu_seconds() for name, group in groups.items()}
