"""Where the drills happen: a folder, a Ray head, and runs of recipe=tiny that are started, looked at and ended there."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import load_file

from data.manifest import read_manifest, write_manifest
from data.synthetic import make_set

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
from main_job import ray_head, wait_for_step  # noqa: E402, F401
from two_nodes import Node, fill_object_store, ray_nodes  # noqa: E402, F401

STEPS, EVERY, LIMIT_S = 12, 4, 300.0
SMALL = [
    f"train.num_steps={STEPS}", f"checkpoint.checkpoint_every={EVERY}", "train.batch_size=8", "train.micro_batch_size=2",
    "train.log_every=1", "optim.warmup_steps=2", "data.eval_manifests={}", "wandb.mode=disabled", "cluster.num_teachers=1",
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One row. seconds: until the run went on or ended; lost: steps that were done again; equal: the weights, None where
    the run was to end for good."""

    sees: str
    seconds: float
    lost: int
    equal: bool | None


class Lab:
    """Where the runs happen. `env` has the address of a Ray head that they share."""

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder, self.env = folder, env
        self.manifest = folder / "train.jsonl"
        self.name = ""
        utterances = read_manifest(make_set(folder, "speech", 64, seed=5))
        write_manifest(self.manifest, [replace(utterance, text=None) for utterance in utterances])

    @property
    def run_dir(self) -> Path:
        return self.folder / self.name / "run"

    def start(self, *overrides: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-m", "opd.train", "recipe=tiny", *SMALL, f"data.train_manifest={self.manifest}"]
        with open(self.folder / f"{self.name}.log", "a", encoding="utf-8") as log:
            return subprocess.Popen(
                [*arguments, f"run_dir={self.run_dir}", *overrides], env=env or self.env, cwd=ROOT, text=True, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit status and the last line that begins like an answer to the fault."""
        try:
            status = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return -1, f"HUNG for {LIMIT_S:g} s"
        return status, self.told()

    def told(self) -> str:
        text = (self.folder / f"{self.name}.log").read_text(encoding="utf-8", errors="replace")
        lines = re.findall(r"^(?:error: |step \d+: |stopped after|.*checkpoint skipped).*$", text, re.MULTILINE)
        return re.sub(r"/\S*/", "", lines[-1])[:230] if lines else "nothing"

    def pids(self, kind: str) -> list[int]:
        return json.loads((self.run_dir / "workers.json").read_text())[kind]

    def last_step(self) -> int:
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def went_on_after(self) -> int:
        """The step that the run last went on from; 0 where it began anew."""
        text = (self.folder / f"{self.name}.log").read_text(encoding="utf-8", errors="replace")
        found = re.findall(r"^going on after step (\d+)", text, re.MULTILINE)
        return int(found[-1]) if found else 0

    def newest_checkpoint(self) -> int:
        return max((int(p.parent.name[5:]) for p in self.run_dir.glob("checkpoints/step-*/COMPLETE")), default=0)

    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, or was when the driver was killed."""
        return any(self.run_dir.glob("checkpoints/.tmp-step-*"))

    def is_reference(self, reference: str = "unbroken") -> bool:
        """Whether the weights are those of another drill's run."""
        ours = load_file(self.run_dir / "export" / "model.safetensors")
        expected = load_file(self.folder / reference / "run" / "export" / "model.safetensors")
        return ours.keys() == expected.keys() and all(ours[name].equal(expected[name]) for name in ours)

    def again(self, *overrides: str) -> None:
        """Starts the run again, to its end."""
        status, said = self.end(self.start(*overrides))
        assert status == 0, said


def wait_for_restart(lab: Lab, process: subprocess.Popen[str]) -> None:
    """Returns when a run that lost a worker has done a step again."""
    deadline = time.monotonic() + LIMIT_S
    restarts = lab.run_dir / "restarts.jsonl"
    while not restarts.exists() or not lab.went_on_after() or lab.last_step() <= lab.went_on_after():
        assert process.poll() is None, lab.told()
        assert time.monotonic() < deadline, "no restart"
        time.sleep(0.1)


def ends(lab: Lab, *overrides: str) -> Outcome:
    """The run is to end with one error line."""
    began = time.monotonic()
    status, said = lab.end(lab.start(*overrides))
    assert status == 1, (status, said)
    return Outcome(said, time.monotonic() - began, 0, None)


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[None]:
    """A file system in memory; needs root."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)
