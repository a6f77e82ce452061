"""What happens when something breaks? python -m bench.drills [--only NAME ...] [--folder DIR]

Small real runs of recipe=tiny, each of which meets one fault: a killed process, a full disk, a damaged file. A table says
what the user sees, how long it takes until the run goes on or stops, how many steps are done twice, and whether the weights
at the end are those of a run that nothing happened to. Each run's output is kept as <folder>/<drill>.log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from safetensors.torch import load_file

from data.manifest import read_manifest, write_manifest
from data.synthetic import make_set

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
from main_job import ray_head, wait_for_step  # noqa: E402
from two_nodes import ray_nodes  # noqa: E402

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

    def is_reference(self) -> bool:
        ours = load_file(self.run_dir / "export" / "model.safetensors")
        expected = load_file(self.folder / "unbroken" / "run" / "export" / "model.safetensors")
        return ours.keys() == expected.keys() and all(ours[name].equal(expected[name]) for name in ours)

    def again(self, *overrides: str) -> None:
        """Starts the run again, to its end."""
        status, said = self.end(self.start(*overrides))
        assert status == 0, said


def unbroken(lab: Lab) -> Outcome:
    began = time.monotonic()
    lab.again()
    return Outcome("the table of the run", time.monotonic() - began, 0, True)


def lost_worker(lab: Lab, kind: str, number: signal.Signals, *overrides: str) -> Outcome:
    """A worker is killed or stopped in step 7; the run replaces it by itself."""
    process = lab.start(*overrides)
    wait_for_step(process, lab.run_dir, 6)
    os.kill(lab.pids(kind)[-1], number)
    broke, before = time.monotonic(), lab.last_step()
    wait_for_restart(lab, process)
    went_on = time.monotonic() - broke
    sees = lab.told()
    status, said = lab.end(process)
    assert status == 0, said
    return Outcome(sees, went_on, max(0, before - lab.went_on_after()), lab.is_reference())


def wait_for_restart(lab: Lab, process: subprocess.Popen[str]) -> None:
    """Returns when a run that lost a worker has done a step again."""
    deadline = time.monotonic() + LIMIT_S
    restarts = lab.run_dir / "restarts.jsonl"
    while not restarts.exists() or not lab.went_on_after() or lab.last_step() <= lab.went_on_after():
        assert process.poll() is None, lab.told()
        assert time.monotonic() < deadline, "no restart"
        time.sleep(0.1)


def killed_driver(lab: Lab) -> Outcome:
    process = lab.start()
    wait_for_step(process, lab.run_dir, 6)
    process.kill()
    process.wait()
    broke, before = time.monotonic(), lab.last_step()
    lab.again()
    return Outcome(
        "the shell's message; the next start goes on",
        time.monotonic() - broke,
        before - lab.went_on_after(),
        lab.is_reference(),
    )


def asked_to_stop(lab: Lab) -> Outcome:
    process = lab.start()
    wait_for_step(process, lab.run_dir, 5)
    process.terminate()
    asked = time.monotonic()
    status, said = lab.end(process)
    ended, before = time.monotonic() - asked, lab.last_step()
    assert status == 128 + signal.SIGTERM, said
    lab.again()
    return Outcome(said, ended, before - lab.went_on_after(), lab.is_reference())


def killed_while_saving(lab: Lab) -> Outcome:
    """With a checkpoint after every step the driver is killed at ten random moments, and started again each time."""
    moments, lost = random.Random(0), 0
    seconds = []
    for _ in range(10):
        began, newest = time.monotonic(), lab.newest_checkpoint()
        process = lab.start("checkpoint.checkpoint_every=1")
        while process.poll() is None and lab.newest_checkpoint() <= newest and time.monotonic() < began + LIMIT_S:
            time.sleep(0.02)
        seconds.append(time.monotonic() - began)
        time.sleep(moments.uniform(0.0, 0.6))
        process.kill()
        process.wait()
        lost = max(lost, lab.last_step() - lab.newest_checkpoint())
        if (lab.run_dir / "summary.json").exists():
            break
    lab.again("checkpoint.checkpoint_every=1")
    return Outcome("the next start goes on from a complete checkpoint", max(seconds), lost, lab.is_reference())


def damaged(lab: Lab, damage: Callable[[Path], None]) -> Outcome:
    """The newest checkpoint's largest file is damaged between two starts."""
    process = lab.start()
    wait_for_step(process, lab.run_dir, 10)
    process.kill()
    process.wait()
    newest = max((lab.run_dir / "checkpoints").glob("step-*"))
    damage(max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size))
    broke, before = time.monotonic(), lab.last_step()
    lab.again()
    sees = next(line for line in reversed(lab_lines(lab)) if "checkpoint skipped" in line)
    return Outcome(
        re.sub(r"/\S*/", "", sees), time.monotonic() - broke, before - lab.went_on_after(), lab.is_reference()
    )


def lab_lines(lab: Lab) -> list[str]:
    return (lab.folder / f"{lab.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[None]:
    """A file system in memory; needs root."""
    path.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False)


def full_disk(lab: Lab) -> Outcome:
    """The disk has room for one checkpoint (about 5 MB) and not for the second; then room is made."""
    place = lab.folder / lab.name
    with small_disk(place, 40):
        filler = place / "filler"
        process = lab.start()
        wait_for_step(process, lab.run_dir, 5)
        free = os.statvfs(place)
        filler.write_bytes(b"\0" * max(0, free.f_bavail * free.f_frsize - 1_000_000))
        broke = time.monotonic()
        status, said = lab.end(process)
        ended, before = time.monotonic() - broke, lab.last_step()
        assert status == 1, (status, said)
        filler.unlink()
        lab.again()
        return Outcome(said, ended, before - lab.went_on_after(), lab.is_reference())


def read_only(lab: Lab) -> Outcome:
    place = lab.folder / lab.name
    began = time.monotonic()
    with small_disk(place, 8):
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        status, said = lab.end(lab.start())
        assert status == 1, said
    return Outcome(said, time.monotonic() - began, 0, None)


def ends(lab: Lab, *overrides: str) -> Outcome:
    """The run is to end with one error line."""
    began = time.monotonic()
    status, said = lab.end(lab.start(*overrides))
    assert status == 1, (status, said)
    return Outcome(said, time.monotonic() - began, 0, None)


def spoilt_manifest(lab: Lab, spoil: Callable[[Path], None]) -> str:
    """A manifest one of whose recordings, in the middle of the epoch, is spoilt."""
    utterances = read_manifest(lab.manifest)
    bad = lab.folder / lab.name / "bad.wav"
    bad.parent.mkdir(parents=True, exist_ok=True)
    spoil(bad)
    utterances[40] = replace(utterances[40], audio=str(bad))
    path = bad.with_name("train.jsonl")
    write_manifest(path, utterances)
    return f"data.train_manifest={path}"


def corrupt_wav(lab: Lab, policy: str) -> Outcome:
    manifest = spoilt_manifest(lab, lambda path: path.write_bytes(b"RIFF" + b"\0" * 5_000))
    if policy == "stop":
        return ends(lab, manifest, "data.on_bad_audio=stop")
    began = time.monotonic()
    lab.again(manifest, "data.on_bad_audio=skip", "data.max_bad_share=0.2")
    bad = json.loads((lab.run_dir / "bad_audio.jsonl").read_text().splitlines()[0])
    return Outcome(f"bad_audio.jsonl: step {bad['step']}, {bad['id']}", time.monotonic() - began, 0, None)


def blocking_audio(lab: Lab) -> Outcome:
    return ends(lab, spoilt_manifest(lab, os.mkfifo), "data.read_timeout_s=5")


def killed_node(lab: Lab) -> Outcome:
    """One of three nodes loses its power; the ranks that were there come back on the third."""
    (lab.folder / lab.name).mkdir()
    with ray_nodes(lab.folder / lab.name, num_nodes=3, num_cpus=1) as cluster:
        spread = [
            "cluster.num_nodes=2",
            "cluster.ranks_per_node=1",
            "cluster.network_interface=lo",
            "cluster.cpus_per_rank=1",
        ]
        spread += ["cluster.cpus_per_teacher=0"]
        process = lab.start(*spread, env=cluster.env)
        wait_for_step(process, lab.run_dir, 6)
        last_rank = psutil.Process(lab.pids("student")[-1])
        node = next(n for n in cluster.nodes if n.raylet_pid == last_rank.ppid())
        node.kill()
        broke, before = time.monotonic(), lab.last_step()
        wait_for_restart(lab, process)
        went_on, sees = time.monotonic() - broke, lab.told()
        status, said = lab.end(process)
        assert status == 0, said
    return Outcome(sees, went_on, max(0, before - lab.went_on_after()), lab.is_reference())


SILENT = ["cluster.collective_timeout_s=10", "cluster.call_timeout_s=15"]
DRILLS: dict[str, Callable[[Lab], Outcome]] = {
    "unbroken": unbroken,
    "driver killed": killed_driver,
    "student rank killed": lambda lab: lost_worker(lab, "student", signal.SIGKILL),
    "teacher worker killed": lambda lab: lost_worker(lab, "teacher", signal.SIGKILL),
    "student rank stalled": lambda lab: lost_worker(lab, "student", signal.SIGSTOP, *SILENT),
    "teacher worker stalled": lambda lab: lost_worker(lab, "teacher", signal.SIGSTOP, *SILENT),
    "node killed": killed_node,
    "SIGTERM": asked_to_stop,
    "killed while saving, ten times": killed_while_saving,
    "checkpoint file truncated": lambda lab: damaged(lab, truncate),
    "one bit of a checkpoint flipped": lambda lab: damaged(lab, flip_a_bit),
    "disk full": full_disk,
    "read-only disk": read_only,
    "loss not finite": lambda lab: ends(lab, "optim.lr=1e30", "optim.warmup_steps=0"),
    "corrupt wav, stop": lambda lab: corrupt_wav(lab, "stop"),
    "corrupt wav, skip": lambda lab: corrupt_wav(lab, "skip"),
    "audio that blocks": blocking_audio,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.drills", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(DRILLS), help="these drills (and the unbroken run)")
    parser.add_argument("--folder", type=Path, help="where runs and logs are kept; default a new folder")
    options = parser.parse_args(argv)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="drills-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows, failed = [], []
    with ray_head(folder) as env:
        lab = Lab(folder, env)
        for title in ["unbroken", *(name for name in options.only or DRILLS if name != "unbroken")]:
            lab.name = re.sub(r"\W+", "-", title)
            try:
                one = DRILLS[title](lab)
            except Exception as error:
                failed.append(title)
                rows.append(f"| {title} | FAILED: {' '.join(str(error).split())[:300]} | | | |")
            else:
                equal = {True: "yes", False: "NO", None: "run ends"}[one.equal]
                failed += [title] if one.equal is False or one.lost > EVERY + 2 else []
                rows.append(f"| {title} | {one.sees} | {one.seconds:.0f} | {one.lost} | {equal} |")
            print(rows[-1], flush=True)
    print(
        "\n| fault | what the user sees | goes on or ends after, s | steps done again | weights equal |\n|---|---|---|---|---|"
    )
    print("\n".join(rows))
    print(f"logs: {folder}")
    print(f"failed: {', '.join(failed)}" if failed else "all drills went as documented")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
