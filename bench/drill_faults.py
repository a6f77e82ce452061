"""Drills in which a node, Ray's object store or the teacher's memory gives out; the others are in bench/drills.py."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import soundfile

from bench.drill_lab import (
    Lab,
    Node,
    Outcome,
    fill_object_store,
    ray_nodes,
    small_disk,
    wait_for_restart,
    wait_for_step,
)
from data.audio import load_audio
from data.manifest import read_manifest, write_manifest
from opd.types import Utterance


def killed_node(lab: Lab, kill: Callable[[Node], None]) -> Outcome:
    """One of three nodes is lost, or its raylet alone; the ranks that were there come back on the third."""
    (lab.folder / lab.name).mkdir()
    with ray_nodes(lab.folder / lab.name, num_nodes=3, num_cpus=1) as cluster:
        spread = ["cluster.num_nodes=2", "cluster.ranks_per_node=1", "cluster.network_interface=lo"]
        spread += ["cluster.cpus_per_rank=1", "cluster.cpus_per_teacher=0"]
        process = lab.start(*spread, env=cluster.env)
        wait_for_step(process, lab.run_dir, 6)
        last_rank = psutil.Process(lab.pids("student")[-1])
        kill(next(n for n in cluster.nodes if n.raylet_pid == last_rank.ppid()))
        broke, before = time.monotonic(), lab.last_step()
        wait_for_restart(lab, process)
        went_on, sees = time.monotonic() - broke, lab.told()
        status, said = lab.end(process)
        assert status == 0, said
    return Outcome(sees, went_on, max(0, before - lab.went_on_after()), lab.is_reference())


# -- Ray's object store ----------------------------------------------------------------------------------------------


def full_store(lab: Lab) -> Outcome:
    """Another job of the cluster takes all of the store from step 5 on; what Ray spills to is a disk of 30 MB."""
    with small_disk(lab.folder / lab.name / "spill", 30):
        return _without_store(lab, lambda: None)


def stuck_store(lab: Lab) -> Outcome:
    """As before, but what Ray spills to has become a file. Ray would wait for ever."""
    spill = lab.folder / lab.name / "spill"
    spill.mkdir(parents=True)

    def spoil() -> None:
        spill.rmdir()
        spill.write_text("")

    return _without_store(lab, spoil)


def _without_store(lab: Lab, spoil: Callable[[], None]) -> Outcome:
    place = lab.folder / lab.name
    with ray_nodes(place, 1, 8, RAY_object_spilling_directory=str(place / "spill")) as cluster:
        process = lab.start("cluster.call_timeout_s=30", env=cluster.env)
        wait_for_step(process, lab.run_dir, 5)
        process.send_signal(signal.SIGSTOP)  # the run takes no step while the store is being filled
        spoil()
        with fill_object_store(cluster.env):
            process.send_signal(signal.SIGCONT)
            broke = time.monotonic()
            status, said = lab.end(process)
            ended, before = time.monotonic() - broke, lab.last_step()
            assert status == 1, (status, said)
        status, last = lab.end(lab.start(env=cluster.env))
        assert status == 0, last
    return Outcome(said, ended, before - lab.went_on_after(), lab.is_reference())


# -- the teacher's memory --------------------------------------------------------------------------------------------

LONG_S = 29.5  # eight such clips are encoded together; the memory for it is what halving halves
HUNGRY = [
    "train.num_steps=4", "train.batch_size=8", "train.micro_batch_size=8", "cluster.ranks_per_node=1",
    "teacher.attn_implementation=eager",
]  # fmt: skip


def teacher_halves(lab: Lab) -> Outcome:
    """From its first step on the teacher has four fifths of the memory that a micro-batch takes."""
    began = time.monotonic()
    status, said, halved = _limited(lab, 0.8)
    assert status == 0, said
    assert min(halved) >= 1, f"each micro-batch is halved: {halved}"
    sees = f"teacher/halved = {halved[0]:g} in metrics.jsonl"
    return Outcome(sees, time.monotonic() - began, 0, lab.is_reference("teacher-unlimited"))


def teacher_without_memory(lab: Lab) -> Outcome:
    """It has a fifth."""
    began = time.monotonic()
    status, said, _ = _limited(lab, 0.2)
    assert status == 1, (status, said)
    return Outcome(said, time.monotonic() - began, 0, None)


def _limited(lab: Lab, share: float) -> tuple[int, str, list[float]]:
    """Exit status, last line and teacher/halved of each step of a run with long audio whose teacher has this share."""
    manifest, needed = _unlimited(lab)
    process = lab.start(*HUNGRY, f"data.train_manifest={manifest}")
    teacher = _teacher(lab, process)
    limit = teacher.memory_info().vms + int(share * needed)
    teacher.rlimit(psutil.RLIMIT_AS, (limit, limit))
    status, said = lab.end(process)
    path = lab.run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return status, said, [json.loads(line)["teacher/halved"] for line in lines]


def _unlimited(lab: Lab) -> tuple[Path, int]:
    """The manifest of long audio, and the bytes that the teacher takes for a micro-batch of it, from a run without limit."""
    name, lab.name = lab.name, "teacher-unlimited"
    try:
        place = lab.folder / lab.name
        manifest, needed = place / "long.jsonl", place / "needed"
        if not needed.exists():
            place.mkdir()
            write_manifest(manifest, [_long(u, place) for u in read_manifest(lab.manifest)[:16]])
            process = lab.start(*HUNGRY, f"data.train_manifest={manifest}")
            teacher = _teacher(lab, process)
            idle = teacher.memory_info().vms
            wait_for_step(process, lab.run_dir, 3)
            fields = Path(f"/proc/{teacher.pid}/status").read_text(encoding="utf-8").split()
            needed.write_text(str(int(fields[fields.index("VmPeak:") + 1]) * 1024 - idle))
            status, said = lab.end(process)
            assert status == 0, said
        return manifest, int(needed.read_text())
    finally:
        lab.name = name


def _teacher(lab: Lab, process: subprocess.Popen[str]) -> psutil.Process:
    """The teacher's worker once it is there; before the first step it has nothing to do."""
    while not (lab.run_dir / "workers.json").exists():
        assert process.poll() is None, lab.told()
        time.sleep(0.01)
    return psutil.Process(lab.pids("teacher")[0])


def _long(utterance: Utterance, folder: Path) -> Utterance:
    wave = load_audio(utterance)
    path = folder / f"{utterance.id}.wav"
    soundfile.write(path, np.resize(wave, int(LONG_S * 16_000)), 16_000)
    return replace(utterance, audio=str(path), text=None)
