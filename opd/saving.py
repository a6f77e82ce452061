"""Saving beside training: the ranks copy their state, go on, and write the copy meanwhile; the driver commits it."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opd.checkpoint import RunDir


class Saver:
    """One checkpoint at a time. What fails is raised by the next call, with the earlier checkpoints untouched.

    student   has start_save(folder) and is_saved(wait), as trainers.student.Student
    """

    def __init__(self, run_dir: RunDir) -> None:
        self.dir = run_dir
        self._step: int | None = None
        self._loop_state: dict[str, Any] = {}
        self._commit: Future[Path] | None = None
        self._thread = ThreadPoolExecutor(1, "commit")  # checksums of large files take a while

    def begin(self, student: Any, step: int, loop_state: dict[str, Any]) -> None:
        """Begins checkpoint `step`, once the one before it is committed; returns when the state is copied.

        loop_state is JSON-able, and copied too.
        """
        self.finish(student)
        try:
            student.start_save(self.dir.begin_save(step))
        except BaseException:
            self.dir.abandon_save(step)
            raise
        self._step, self._loop_state = step, json.loads(json.dumps(loop_state))

    def poll(self, student: Any) -> None:
        """Commits what has been written. Costs nothing where nothing is being saved."""
        self._advance(student, wait=False)

    def finish(self, student: Any) -> None:
        """Waits until nothing is being saved any more."""
        self._advance(student, wait=True)

    def close(self) -> None:
        """Lets a commit that has begun come to its end; what is only half written is not waited for."""
        self._thread.shutdown(wait=True)

    def _advance(self, student: Any, *, wait: bool) -> None:
        step = self._step
        if step is None:
            return
        try:
            if self._commit is None and student.is_saved(wait):
                self._commit = self._thread.submit(self.dir.commit_save, step, self._loop_state)
            if self._commit is not None and (wait or self._commit.done()):
                self._commit.result()
                self._step = self._commit = None
        except BaseException:
            self._step = self._commit = None
            self.dir.abandon_save(step)  # gives a full disk its bytes back
            raise
