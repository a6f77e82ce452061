"""Runs of the main job that something happens to on the way, and what they are given."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import datasets
import numpy as np
import soundfile
from main_job import (
    BIN,
    ONE_RANK,
    ROOT,
    command,
    run,
    start,
    wait_for_checkpoint,
    wait_for_job_server,
    wait_for_step,
    wait_until,
)

from data.manifest import read_manifest, write_manifest

Result = subprocess.CompletedProcess[str]
NO_EVAL = "data.eval_manifests={}"
PREEMPTED = [
    "train.num_steps=40", "checkpoint.checkpoint_every=100", "schedule=one_step_off", "data.log_batches=true", "eval.eval_every=1",
    "eval.max_utterances=1", *ONE_RANK,
]  # fmt: skip


def kill_twice(arguments: list[str], env: dict[str, str], run_dir: Path) -> Result:
    """A run in which a rank is killed with SIGKILL in step 4, and replaced, then the driver in step 6; the next ends it."""
    process = kill_rank(arguments, env, run_dir)
    wait_for_step(process, run_dir, 5)
    process.kill()
    process.communicate(timeout=120)
    assert not (run_dir / "summary.json").exists()
    return run(arguments, env)


def kill_rank(arguments: list[str], env: dict[str, str], run_dir: Path) -> subprocess.Popen[str]:
    """A run whose second rank is killed with SIGKILL after step 3 and the first checkpoint, once that was noticed."""
    process = start(arguments, env)
    wait_for_step(process, run_dir, 3)
    wait_for_checkpoint(process, run_dir)
    rank = json.loads((run_dir / "workers.json").read_text())["student"][1]
    os.kill(rank, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not (run_dir / "restarts.jsonl").exists():
        assert time.monotonic() < deadline, "a dead rank is noticed within a minute"
        time.sleep(0.2)
    return process


def lose_a_rank(arguments: list[str], env: dict[str, str], run_dir: Path) -> Result:
    """A run that goes on by itself after that."""
    process = kill_rank(arguments, env, run_dir)
    printed, _ = process.communicate(timeout=300)
    return Result(arguments, process.returncode, printed, "")


def preempt(arguments: list[str], env: dict[str, str], run_dir: Path) -> Result:
    """A run that is asked to stop after step 3, again while a lost rank is replaced, and then ends."""
    process = start(arguments, env)
    wait_for_step(process, run_dir, 3)
    printed = stop(process)
    step = newest_checkpoint(run_dir)
    assert 3 <= step <= 12
    assert f"stopped after step {step}, which is saved; start again with the same command and run_dir" in printed
    process = start(arguments, env)
    wait_for_step(process, run_dir, step + 1)
    (rank,) = json.loads((run_dir / "workers.json").read_text())["student"]
    os.kill(rank, signal.SIGKILL)
    wait_until((run_dir / "restarts.jsonl").exists, process, "restart")
    before_it = "stopped before lost workers were replaced"
    step = newest_checkpoint(run_dir)
    assert re.search(f"^({before_it}|stopped after step {step}, which is saved);", stop(process), re.MULTILINE)
    result = run(arguments, env)
    assert f"going on after step {step} of 40" in result.stdout
    return result


def newest_checkpoint(run_dir: Path) -> int:
    """Its step."""
    return max(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def stop(process: subprocess.Popen[str]) -> str:
    """Asks a run to stop; what it has printed."""
    process.terminate()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, printed
    return printed


def mixed_sources(speech: dict[str, Path], folder: Path) -> dict[str, dict]:
    """The training speech as rows and as a stream, each half of it, and the evaluation speech in a tar file."""
    folder.mkdir()
    train, evaluation = read_manifest(speech["train"]), read_manifest(speech["eval"])
    for name, part in (("rows", train[:24]), ("stream", train[24:])):
        sounds = [{"bytes": Path(u.audio).read_bytes(), "path": None} for u in part]
        columns = {"audio": sounds, "text": [u.text for u in part], "id": [u.id for u in part], "language": ["en"] * 24}
        datasets.Dataset.from_dict(columns).to_parquet(folder / f"{name}.parquet")
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for u in evaluation:
            tar.add(u.audio, f"clips/{u.id}.wav")
    write_manifest(
        folder / "tar.jsonl",
        [dataclasses.replace(u, audio=f"{folder / 'shard.tar'}!clips/{u.id}.wav") for u in evaluation],
    )
    return {
        "rows": {"path": f"hf:{folder / 'rows.parquet'}?split=train", "weight": 2},
        "stream": {"path": f"hf:{folder / 'stream.parquet'}?split=train&stream=true&buffer=10", "weight": 1.5},
        "tar": {"path": str(folder / "tar.jsonl")},
    }


def run_with_two_batch_sizes(speech: dict[str, Path], run_dir: Path, env: dict[str, str]) -> Result:
    """Sources of every kind, in batches of 8 on one rank up to step 4, and of 12 on two ranks for two more steps."""
    sources = mixed_sources(speech, run_dir.with_name("sources"))
    options = ["data.train_manifest=null", f"data.train_manifests={json.dumps(sources)}", "data.log_batches=true"]
    arguments = command(speech, run_dir, *options, NO_EVAL, *ONE_RANK)
    result = run(arguments, env)
    assert result.returncode == 0, result.stderr[-3000:]
    shutil.rmtree(run_dir / "checkpoints" / "step-000006")  # as if it had been stopped before
    (run_dir / "summary.json").unlink()
    return run([*arguments, "train.batch_size=12", "cluster.ranks_per_node=2"], env)


def submit(arguments: list[str], cluster: dict[str, str]) -> Result:
    """A run as a Ray job, by the script."""
    wait_for_job_server(cluster)
    return run([str(ROOT / "scripts" / "submit.sh"), *arguments[3:]], cluster | {"RAY_ADDRESS": cluster["DASHBOARD"]})


def submit_by_hand(arguments: list[str], cluster: dict[str, str]) -> Result:
    """A run as a Ray job, as the README says it, where scripts/submit.sh does not look at it first."""
    wait_for_job_server(cluster)
    by_hand = [str(BIN / "ray"), "job", "submit", "--address", cluster["DASHBOARD"], "--working-dir", ".", "--"]
    return run([*by_hand, "python", *arguments[1:]], cluster)


def spoilt_manifest(speech: dict[str, Path], folder: Path) -> Path:
    """Eight utterances, of which one file is no audio, one is missing, one is too short for a mel frame, one too long."""
    (folder / "broken.wav").write_bytes(b"RIFFnothing")
    soundfile.write(folder / "short.wav", np.zeros(200, np.float32), 16_000)
    soundfile.write(folder / "long.wav", np.zeros(6 * 16_000, np.float32), 16_000)
    rows = [json.loads(line) for line in speech["train"].read_text().splitlines()][:8]
    for row, name in zip(rows, ("broken", "missing", "short", "long", *[None] * 4), strict=True):
        row["audio"] = str(folder / f"{name}.wav" if name else speech["train"].parent / row["audio"])
    (folder / "spoilt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "spoilt.jsonl"


def foreign_teacher(folder: Path) -> Path:
    """The tiny teacher with each of its ordinary tokens under a name that no other tokenizer has."""
    shutil.copytree(ROOT / "seeds" / "tiny_teacher", folder / "foreign")
    path = folder / "foreign" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= {"vocab": {f"~{token}~": i for token, i in content["model"]["vocab"].items()}, "merges": []}
    path.write_text(json.dumps(content))
    return folder / "foreign"
