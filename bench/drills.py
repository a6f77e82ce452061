"""What happens when something breaks? python -m bench.drills [--only NAME ...] [--folder DIR]

Small real runs of recipe=tiny, each of which meets one fault: a killed process, a full disk, a damaged file. A table says
what the user sees, how long it takes until the run goes on or stops, how many steps are done twice, and whether the weights
at the end are those of a run that nothing happened to. Each run's output is kept as <folder>/<drill>.log.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bench.command import Parser, command
from bench.drill_faults import full_store, killed_node, stuck_store, teacher_halves, teacher_without_memory
from bench.drill_lab import (
    EVERY,
    LIMIT_S,
    Lab,
    Outcome,
    ends,
    ray_head,
    small_disk,
    wait_for_restart,
    wait_for_step,
)
from data.manifest import read_manifest, write_manifest

KILLS, STEPS_BETWEEN_KILLS = 10, 6  # of the drill with a checkpoint after every step


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
    """With a checkpoint after every step the driver is killed ten times, and started again each time.

    Each time it is a random moment after a new checkpoint; every other time it is then waited until a checkpoint is being
    written. Compared with a run of as many steps that nothing happened to.
    """
    title, steps = lab.name, f"train.num_steps={KILLS * STEPS_BETWEEN_KILLS}"
    lab.name = f"{title}-unbroken"
    lab.again(steps)
    lab.name = title
    moments, lost, in_a_save = random.Random(0), 0, 0
    seconds = []
    for kill in range(KILLS):
        began, newest = time.monotonic(), lab.newest_checkpoint()
        process = lab.start(steps, "checkpoint.checkpoint_every=1")
        while process.poll() is None and lab.newest_checkpoint() <= newest and time.monotonic() < began + LIMIT_S:
            time.sleep(0.02)
        seconds.append(time.monotonic() - began)
        time.sleep(moments.uniform(0.0, 0.6))
        while kill % 2 and process.poll() is None and not lab.is_saving() and time.monotonic() < began + LIMIT_S:
            time.sleep(0.002)
        assert process.poll() is None, f"the run ended before it was killed {KILLS} times: give it more steps"
        process.kill()
        process.wait()
        in_a_save += lab.is_saving()  # what the killed driver left unfinished
        lost = max(lost, lab.last_step() - lab.newest_checkpoint())
    assert in_a_save, "no kill was in the middle of a save"
    lab.again(steps, "checkpoint.checkpoint_every=1")
    sees = (
        f"the next start goes on from a complete checkpoint; {in_a_save} of {KILLS} kills were in the middle of a save"
    )
    return Outcome(sees, max(seconds), lost, lab.is_reference(f"{title}-unbroken"))


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


SILENT = ["cluster.collective_timeout_s=10", "cluster.call_timeout_s=15"]
DRILLS: dict[str, Callable[[Lab], Outcome]] = {
    "unbroken": unbroken,
    "driver killed": killed_driver,
    "student rank killed": lambda lab: lost_worker(lab, "student", signal.SIGKILL),
    "teacher worker killed": lambda lab: lost_worker(lab, "teacher", signal.SIGKILL),
    "student rank stalled": lambda lab: lost_worker(lab, "student", signal.SIGSTOP, *SILENT),
    "teacher worker stalled": lambda lab: lost_worker(lab, "teacher", signal.SIGSTOP, *SILENT),
    "node killed": lambda lab: killed_node(lab, lambda node: node.kill()),
    "raylet killed": lambda lab: killed_node(lab, lambda node: os.kill(node.raylet_pid, signal.SIGKILL)),
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
    "teacher out of memory, half fits": teacher_halves,
    "teacher out of memory, half does not": teacher_without_memory,
    "object store and its disk full": full_store,
    "object store full, cannot spill": stuck_store,
}


@command
def main(argv: list[str]) -> int:
    parser = Parser("drills", __doc__)
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
    raise SystemExit(main(None))
