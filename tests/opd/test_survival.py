"""Restarts that are used up, a request to stop, and a teacher without memory."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opd.survival import Restarts, WorkerDied
from opd.teachers.worker import halved_once, is_out_of_memory

ROOT = Path(__file__).resolve().parents[2]
ASKED = """
import os, signal, sys, time
from opd.survival import STOP as stop
stop.check("nothing")
stop.install(float(sys.argv[1]))
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.2)
assert stop.asked
time.sleep(float(sys.argv[2]))
print("the loop has ended by itself")
"""


def test_the_same_step_is_not_tried_for_ever() -> None:
    restarts = Restarts(2)
    assert restarts.allow(WorkerDied("rank 1 died"), 5) == (
        "step 5: rank 1 died; restart 1 of 2 from the newest checkpoint"
    )
    with pytest.raises(RuntimeError, match="rank 1 died; step 5 has failed twice"):
        restarts.allow(WorkerDied("rank 1 died"), 5)
    assert "restart 2 of 2" in restarts.allow(WorkerDied("rank 0 died"), 5, progress=20), "within it something was done"
    with pytest.raises(RuntimeError, match=r"train\.max_restarts=2 are used up"):
        restarts.allow(WorkerDied("rank 0 died"), 9)
    with pytest.raises(RuntimeError, match="start again with resume=auto"):
        Restarts(0).allow(WorkerDied("rank 0 died"), 1)


@pytest.mark.parametrize(("grace_s", "needs_s", "status"), [(30.0, 0.1, 0), (0.5, 600.0, 128 + signal.SIGTERM)])
def test_a_request_to_stop_is_kept_until_grace_is_over(grace_s: float, needs_s: float, status: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", ASKED, str(grace_s), str(needs_s)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == status
    assert result.stderr.startswith(f"SIGTERM: stopping once what is done is saved, at most {grace_s:g} s from now")
    assert ("checkpoint.grace_s=0.5; ended without a new checkpoint" in result.stderr) == (status != 0)
    assert ("ended by itself" in result.stdout) == (status == 0)


INTERRUPTED = """
import os, signal, threading
from opd.survival import STOP, Restarts, Stopped, WorkerDied
STOP.install(600.0)
STOP.install(600.0)  # as by the next stage, or a restart: it is the same request
restarts = Restarts(3)
for _ in range(2):
    restarts.allow(WorkerDied("rank 0 died"), 5 + restarts.used)
assert restarts.pause_s > 0
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
try:
    STOP.pause(600.0, "before lost workers were replaced")
except Stopped as stopped:
    print(stopped)
STOP.install(600.0)
try:
    STOP.check("before the first step")
except Stopped as stopped:
    print(stopped)
"""


def test_a_request_to_stop_ends_the_pause_before_a_restart_and_outlives_it() -> None:
    result = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    go_on = "start again with the same command and run_dir to go on"
    assert result.stdout.splitlines() == [
        f"stopped before lost workers were replaced; {go_on}", f"stopped before the first step; {go_on}",
    ], result.stderr  # fmt: skip


def score_within(limit_bytes: int, rows: int) -> tuple[dict, dict]:
    """Scores rows that each really take 64 MB, with an address space of `limit_bytes` more than there is now."""

    def score(utterances: list, rollout: dict) -> tuple[dict, dict]:
        sizes.append(len(utterances))
        memory = torch.ones(len(utterances), 16_000_000)
        return {"entropy_BT": rollout["x"] + memory[:, :1] - 1}, {"positions": len(utterances)}

    sizes: list[int] = []
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + limit_bytes, before[1]))
    try:
        found = halved_once(score, list(range(rows)), {"x": torch.arange(rows, dtype=torch.float32)[:, None]})
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return found[0], {**found[1], "sizes": sizes}


def test_a_teacher_out_of_memory_scores_half_at_a_time() -> None:
    tensors, counts = score_within(700_000_000, 8)  # 512 MB fit
    assert (counts["sizes"], counts["halved"]) == ([8], 0)
    halved, counts = score_within(400_000_000, 8)
    assert (counts["sizes"], counts["halved"]) == ([8, 4, 4], 1)
    assert counts["positions"] == 8
    assert halved["entropy_BT"].equal(tensors["entropy_BT"])
    with pytest.raises(MemoryError, match=r"out of memory with 4 utterances.*lower train\.micro_batch_size"):
        score_within(120_000_000, 8)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
