"""Nothing is waited for without a limit, and what was waited for is said."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine_steps import make_config, start
from main_job import ROOT
from ranks import run_ranks

from opd.schema import Config
from trainers.fsdp2 import FSDP2Engine
from trainers.zero import ZeroEngine

LIMIT_S = 10.0
PROGRAM = """
import os, time
import ray
from opd.remote import wait
from opd.schema import ClusterConfig
from trainers.env import set_verl_env
set_verl_env(use_gpu=False)
from trainers.cluster import StudentPool, connect

cluster = ClusterConfig(ranks_per_node=2, cpus_per_rank=5, placement_timeout_s=1)
connect(cluster)

@ray.remote(num_cpus=0)
def sleep():
    time.sleep(600)

@ray.remote(num_cpus=0)
def answer():
    return 1

@ray.remote(num_cpus=0)
def cut_off():
    raise RuntimeError("timed out")

@ray.remote(num_cpus=0)
class Dying:
    def die(self):
        time.sleep(1)
        os._exit(1)

    def pid(self):
        return os.getpid()

    def write(self):
        return [ray.put(bytes(2_000_000))]

@ray.remote(num_cpus=0)
class Reader:
    def read(self, rollout):
        return len(rollout)

    def read_inside(self, rollouts):
        return ray.get(rollouts, timeout=2)

def read_of_the_dead():
    # A teacher scores what a rank wrote that is killed then.
    rank, teacher = Dying.remote(), Reader.remote()
    (rollout,), pid = ray.get([rank.write.remote(), rank.pid.remote()])
    assert ray.get(teacher.read.remote(rollout)) == 2_000_000
    os.kill(pid, 9)
    time.sleep(1)
    wait([teacher.read.remote(rollout)], "the teacher's scores of step 3", 60, ["teacher worker 0"])

def wait_for_an_object():
    wait([Reader.remote().read_inside.remote([sleep.remote()])], "the update of step 3", 60, ["rank 0"])

def refuse():
    raise ValueError("nothing to mend")

for call in (
    lambda: StudentPool(cluster).get_placement_groups(),
    lambda: wait([answer.remote(), sleep.remote()], "the rollout of step 3", 10, ["rank 0", "rank 1"]),
    lambda: wait([sleep.remote(), Dying.remote().die.remote()], "the update of step 3", 60, ["rank 0", "rank 1"]),
    lambda: wait([cut_off.remote(), Dying.remote().die.remote()], "the update of step 3", 60, ["rank 0", "rank 1"]),
    lambda: wait([cut_off.remote(), sleep.remote()], "the update of step 3", 60, ["rank 0", "rank 1"]),
    lambda: wait(ray.remote(num_cpus=0)(refuse).remote(), "the teacher to load", 60),
    read_of_the_dead,
    wait_for_an_object,
):
    try:
        call()
    except Exception as error:
        print("ERROR", type(error).__name__, " ".join(str(error).split()))
"""


def test_placement_calls_and_dead_workers(cluster: dict[str, str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=cluster, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    said = [line.removeprefix("ERROR ") for line in result.stdout.splitlines() if line.startswith("ERROR ")]
    assert len(said) == 8, result.stdout
    placement, call, dead, collective, silent, mendable, lost, late = said
    assert placement.startswith(
        "TimeoutError waited 1 s for Ray to place 2 student ranks ({'CPU': 5} each); free now: "
    )
    assert placement.endswith("raise cluster.placement_timeout_s or free resources")
    expected = (
        "WorkerHung waited 10 s for the rollout of step 3; no answer from rank 1; the limits are cluster.*_timeout_s"
    )
    assert call == expected
    assert dead.startswith("WorkerDied rank 1 died during the update of step 3: ")
    assert collective == "WorkerDied rank 1 died during the update of step 3", "the other's error is only what followed"
    assert silent == "WorkerHung rank 1 hung during the update of step 3 (RuntimeError: timed out)"
    assert mendable == "ValueError nothing to mend"
    told = "WorkerDied a worker that held what others need was lost during "
    assert re.match(rf"{told}the teacher's scores of step 3: (OwnerDied|ObjectLost)Error: ", lost)
    assert late.startswith(f"{told}the update of step 3: GetTimeoutError: ")


def wait_for_the_other_rank(given_up: Path, group: dist.ProcessGroup | None = None) -> float:
    """Rank 1 never comes to the reduction; rank 0 says how long it waited for it."""
    dist.barrier()
    began = time.monotonic()
    if dist.get_rank() == 1:
        while not given_up.exists() and time.monotonic() < began + 6 * LIMIT_S:
            time.sleep(0.1)
        return 0.0
    with pytest.raises(RuntimeError, match="(?i)timed out"):
        dist.all_reduce(torch.ones(1), group=group)
    given_up.touch()
    return time.monotonic() - began


def test_a_collective_ends_after_its_limit(tmp_path: Path) -> None:
    waited = run_ranks(2, wait_for_the_other_rank, tmp_path / "given_up", limit_s=LIMIT_S)[0]
    assert LIMIT_S - 0.5 < waited < 3 * LIMIT_S, "the other rank was there for twice as long"


def wait_in_the_engine(config: Config, folder: Path) -> float:
    """The same within the group that the engine has made for itself."""
    engine = start(config, ZeroEngine if config.engine == "deepspeed" else FSDP2Engine)
    engine.save_checkpoint(str(folder))
    group = engine.zero.data_parallel_group if config.engine == "deepspeed" else engine._save_group
    assert group is not None
    assert group is not dist.group.WORLD
    return wait_for_the_other_rank(folder / "given_up", group)


@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed"])
def test_a_collective_of_an_engine_ends_after_the_limit_of_the_config(
    tiny_dir: Path, tmp_path: Path, engine: str
) -> None:
    config = make_config(tiny_dir, engine=engine, cluster={"collective_timeout_s": LIMIT_S})
    waited = run_ranks(2, wait_in_the_engine, config, tmp_path)[0]
    assert LIMIT_S - 0.5 < waited < 3 * LIMIT_S, "the other rank was there for twice as long"
