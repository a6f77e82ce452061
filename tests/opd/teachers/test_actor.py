"""The driver's handle on the teachers, with a Ray head of its own: room for them, and audio that only they lack."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from main_job import ROOT
from tiny_teachers import ARKASR, STUDENT

PROGRAM = """
import dataclasses, sys, time
import ray, torch
from opd.config import load_config
from opd.schema import ClusterConfig
from opd.types import Rollout
from trainers.env import set_verl_env
set_verl_env(use_gpu=False)
from data.manifest import read_manifest
from opd.teachers.actor import TeacherGroup
from trainers.cluster import connect

connect(ClusterConfig())
student = sys.argv[2]

def group(**changes):
    config = load_config(["recipe=tiny", "data.on_bad_audio=skip", "cluster.num_teachers=2", f"teacher.path={sys.argv[3]}"])
    return TeacherGroup(dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, **changes)), student)

def free():
    return ray.available_resources().get("CPU", 0.0)

try:
    group(cpus_per_teacher=5, placement_timeout_s=2)
except TimeoutError as error:
    print("ERROR", type(error).__name__, error)

began = free()
teachers = group(cpus_per_teacher=3)
print("FACTS", len(teachers.wait_ready()))
utterances = read_manifest(sys.argv[1])[:2]
utterances[1] = dataclasses.replace(utterances[1], audio="/only/the/student/has/it.wav")
rollout = Rollout(
    torch.tensor([[5, 6], [7, 8]]), torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2, 8, dtype=torch.int64),
    torch.zeros(2, 2), torch.zeros(2, dtype=torch.bool), torch.full((2,), 2), torch.zeros(2, dtype=torch.bool),
)
pending = teachers.start_score([[utterances]], [[ray.put(rollout.to_dict())]], 1)
((score,),), coverage = pending.wait()
print("SCORED", ray.get(score)["aligned_mask_BT"].tolist(), coverage, teachers.counts["positions"])
print("BAD", teachers.bad_audio[0][0] == utterances[1].id, teachers.bad_audio[0][1], len(teachers.bad_audio))
teachers.close()
deadline = time.monotonic() + 20
while free() < began and time.monotonic() < deadline:
    time.sleep(0.2)
print("FREE", free() == began)
"""


def test_room_and_bad_audio(cluster: dict[str, str], speech: dict[str, Path]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(speech["eval"]), str(STUDENT), str(ARKASR)],
        env=cluster, cwd=ROOT, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    said = [line for line in result.stdout.splitlines() if line.split(" ")[0].isupper()]
    assert len(said) == 5, result.stdout
    assert said[0].startswith(
        "ERROR TimeoutError waited 2 s for Ray to place 2 teacher workers ({'CPU': 5} each); free now: "
    )
    assert said[0].endswith("raise cluster.placement_timeout_s or free resources")
    assert said[1:] == [
        "FACTS 2",
        "SCORED [[True, True], [False, False]] 1.0 2",
        "BAD True /only/the/student/has/it.wav 1",
        "FREE True",
    ]
