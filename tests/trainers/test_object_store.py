"""A full object store ends what waits for it, with what to do about it; other jobs of the cluster fill it here."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from main_job import ROOT
from two_nodes import Nodes, fill_object_store, ray_nodes

PROGRAM = """
import sys, time
import numpy as np
import ray
from opd import remote
from opd.remote import wait
from opd.schema import ClusterConfig
from trainers.env import set_verl_env
set_verl_env(use_gpu=False)
from trainers.cluster import connect

connect(ClusterConfig(start_timeout_s=float(sys.argv[1])))

@ray.remote(num_cpus=0)
class Worker:
    def put(self, megabytes):
        return [ray.put(np.ones(megabytes << 20, np.uint8))]
    def give(self, megabytes):
        return np.ones(megabytes << 20, np.uint8)
    def work(self):
        time.sleep(12)
        return 2

worker = Worker.remote()
wait(worker.put.remote(1), "the first call", 60)
print("started", flush=True)
remote.PUT_S = 15.0  # a worker for it starts in less here
for line in sys.stdin:
    call, limit_s = line.split()
    ref = worker.work.remote() if call == "work" else getattr(worker, call).remote(30)
    try:
        said = f"ANSWER {wait(ref, 'the rollout of step 3', float(limit_s), ['rank 0']) is not None}"
    except Exception as error:
        said = f"ERROR {type(error).__name__} {' '.join(str(error).split())}"
    print(said, flush=True)
"""


@contextlib.contextmanager
def program(cluster: Nodes, start_timeout_s: float) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(start_timeout_s)], env=cluster.env, cwd=ROOT, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)


def said(process: subprocess.Popen[str], call: str = "") -> str:
    """What the program says next, of a call where one is named: its name and limit."""
    assert process.stdin is not None and process.stdout is not None, "pipes"
    if call:
        process.stdin.write(call + "\n")
    line = process.stdout.readline()
    assert line or process.stderr is None, process.stderr.read()[-3000:]
    return line.strip()


def test_a_store_that_cannot_be_spilled_is_named_and_nobody_waits_for_ever(tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    with ray_nodes(tmp_path, 1, RAY_object_spilling_directory=str(spill)) as cluster:
        with program(cluster, 60) as process:
            assert said(process) == "started"
            spill.rmdir()
            spill.write_text("")  # no folder, so nobody can write into it, not even root
            with fill_object_store(cluster.env, share=0.9):
                assert said(process, "work 30") == "ANSWER True", "nearly full, but it takes more"
            with fill_object_store(cluster.env):
                answer = said(process, "put 20")
                start = "ERROR StoreFull the rollout of step 3: Ray's object store takes nothing more, used is 9"
                assert answer.startswith(start)
                assert "% of 210 MB on 127.0.0.2: make room in the folder that Ray spills to" in answer
                with program(cluster, 5) as late:
                    _, errors = late.communicate(timeout=60)
                    assert late.returncode == -9
                    last = errors.splitlines()[-1]
                    assert last.startswith("error: joining Ray took more than cluster.start_timeout_s=5 s")
        with program(cluster, 60) as process:
            assert said(process) == "started"
            assert said(process, "put 20") == "ANSWER True", "there is room again"


def test_a_full_store_on_a_full_disk_is_an_error_at_once(tmp_path: Path) -> None:
    spill = tmp_path / "spill"
    spill.mkdir()
    # Ray calls a disk full from this share on; there is a byte on this one.
    env = {"RAY_object_spilling_directory": str(spill), "RAY_local_fs_capacity_threshold": "0.000001"}
    with ray_nodes(tmp_path, 1, **env) as cluster, program(cluster, 60) as process:
        assert said(process) == "started"
        spill.rmdir()
        spill.write_text("")
        with fill_object_store(cluster.env):
            for call in ("put 60", "give 60"):
                answer = said(process, call)
                place = "Ray's object store on node 127.0.0.2 is full, and so is the disk that it spills to"
                assert answer.startswith(
                    f"ERROR StoreFull the rollout of step 3 failed: {place} (OutOfDiskError): make"
                )
