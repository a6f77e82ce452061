"""What ends a run before its last step: a request to stop, answered with a checkpoint; lost workers, answered by new ones."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

NODE_LOSS_S = 20.0
STOPPED_STATUS = 128 + signal.SIGTERM


class WorkerDied(RuntimeError):
    """A worker, or the node it was on, is gone. The run can go on with new ones, from its last checkpoint."""


class WorkerHung(TimeoutError):
    """A worker did not answer within the limit. The run can go on without it, from its last checkpoint."""


LOST = (WorkerDied, WorkerHung)


class Stopped(Exception):
    """The run was asked to stop, and has saved. Starting it again goes on."""


class StopSignal:
    """SIGTERM (a preempted machine, a stopped job) as a request that the loop answers after its step.

    grace_s   when this has passed and the driver is still there, it ends as it is: whoever asked would kill it soon
    """

    def __init__(self, grace_s: float) -> None:
        self.grace_s = grace_s
        self._asked = False

    def install(self) -> None:
        """Takes the signal over. After Ray has started: it installs a handler of its own."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handle)

    @property
    def asked(self) -> bool:
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            return
        self._asked = True
        self._write(f"SIGTERM: saving after this step, at most {self.grace_s:g} s from now")
        timer = threading.Timer(self.grace_s, self._give_up)
        timer.daemon = True
        timer.start()

    def _give_up(self) -> None:
        self._write(
            f"error: the step and its checkpoint took longer than checkpoint.grace_s={self.grace_s:g}; ended without a new "
            "checkpoint; start again to go on from the newest one"
        )
        os._exit(STOPPED_STATUS)

    @staticmethod
    def _write(line: str) -> None:
        os.write(sys.stderr.fileno(), f"{line}\n".encode())  # print is not safe in a signal handler


class Restarts:
    """How often lost workers may still be replaced, and whether the same step has lost them before."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.pause_s = 0.0  # before the next attempt
        self._failed: tuple[int, int] | None = None

    def allow(self, error: Exception, step: int, progress: int = 0) -> str:
        """Counts one loss during `step`; what to say of it. Raises RuntimeError where the run is to stop.

        progress  grows with what is done within a step, the transcripts of stage td: the same step may be lost again then
        """
        if self.limit == 0:
            raise RuntimeError(f"{error}; start again with resume=auto to go on, or set train.max_restarts") from error
        if self._failed == (step, progress):
            raise RuntimeError(f"{error}; step {step} has failed twice, so the run stops here") from error
        if self.used >= self.limit:
            raise RuntimeError(
                f"{error}; train.max_restarts={self.limit} are used up; start again with resume=auto to go on"
            ) from error
        # A cluster takes a while to notice that a node is gone, and may place workers there again until then.
        self.pause_s = NODE_LOSS_S if self.used else 0.0
        self.used += 1
        self._failed = (step, progress)
        return f"step {step}: {error}; restart {self.used} of {self.limit} from the newest checkpoint"
