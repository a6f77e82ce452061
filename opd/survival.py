"""What ends a run before its last step: a request to stop, answered with a checkpoint; lost workers, answered by new ones."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
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
    """SIGTERM (a preempted machine, a stopped job) as a request that is answered where nothing is lost by it.

    Such places are after a step, which is saved then, before and after evaluations, between batches of teacher data, and
    before lost workers are replaced. There is one for the process, STOP: a request outlives a restart and a stage.
    """

    def __init__(self) -> None:
        self.grace_s = 0.0
        self._asked = False

    def install(self, grace_s: float) -> None:
        """Takes the signal over. After Ray has started: it installs a handler of its own.

        grace_s   when this has passed and the driver is still there, it ends as it is: whoever asked would kill it soon
        """
        self.grace_s = grace_s
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handle)

    @property
    def asked(self) -> bool:
        return self._asked

    def check(self, done: str) -> None:
        """Raises Stopped where the run was asked to stop; `done` says what it has kept."""
        if self._asked:
            raise Stopped(f"stopped {done}; start again with the same command and run_dir to go on")

    def pause(self, seconds: float, done: str) -> None:
        """Sleeps, and checks meanwhile."""
        deadline = time.monotonic() + seconds
        self.check(done)
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
            self.check(done)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            return
        self._asked = True
        self._write(f"SIGTERM: stopping once what is done is saved, at most {self.grace_s:g} s from now")
        timer = threading.Timer(self.grace_s, self._give_up)
        timer.daemon = True
        timer.start()

    def _give_up(self) -> None:
        self._write(
            f"error: what was being done, and saving it, took longer than checkpoint.grace_s={self.grace_s:g}; ended without a "
            "new checkpoint; start again to go on from the newest one"
        )
        os._exit(STOPPED_STATUS)

    @staticmethod
    def _write(line: str) -> None:
        os.write(sys.stderr.fileno(), f"{line}\n".encode())  # print is not safe in a signal handler


STOP = StopSignal()


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
