"""The main job as tests start it: small runs of recipe=tiny, and a Ray head that they share."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
STEPS = 6
TINY = [
    f"train.num_steps={STEPS}", "train.batch_size=8", "train.micro_batch_size=2", "train.log_every=1",
    "checkpoint.checkpoint_every=2", "optim.warmup_steps=2", "eval.batch_size=4", "wandb.mode=disabled",
    "cluster.num_teachers=1",
]  # fmt: skip
ONE_RANK = ["cluster.ranks_per_node=1", "eval.teacher=false"]
BIN = Path(sys.executable).parent
TIMEOUT_S = 400.0  # many times what an idle machine needs: only a hang is to end here


def environment(tmp: Path, **extra: str) -> dict[str, str]:
    """This process's environment without what would reach into Ray, verl or W&B of the run that is tested."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "VERL_", "WANDB_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "HF_HOME": str(tmp / "hf"), **extra}


def command(speech: dict[str, Path], run_dir: Path, *overrides: str, recipe: str = "tiny") -> list[str]:
    """The command line of a small run on the test's speech."""
    data = [f"data.train_manifest={speech['unlabelled']}", f"data.eval_manifests={{held_out: {speech['eval']}}}"]
    return [sys.executable, "-m", "opd.train", f"recipe={recipe}", *TINY, *data, f"run_dir={run_dir}", *overrides]


def run(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments,
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def last_error(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a refused run ends with."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1, result.stdout[-3000:] + result.stderr[-3000:]
    assert lines[-1].startswith("error: "), lines
    return lines[-1]


def metrics(run_dir: Path) -> list[dict]:
    """metrics.jsonl without times, which are never the same."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def start(arguments: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    """Returns as soon as the run has logged a step."""
    path = run_dir / "metrics.jsonl"
    wait_until(lambda: path.exists() and f'"step": {step},' in path.read_text(), process, f"step {step}")


def wait_for_checkpoint(process: subprocess.Popen[str], run_dir: Path) -> None:
    """Returns as soon as a checkpoint is complete: it is written beside training, so a later step says nothing of it."""
    wait_until(lambda: any(run_dir.glob("checkpoints/step-*/COMPLETE")), process, "complete checkpoint")


def wait_until(happened: Callable[[], bool], process: subprocess.Popen[str], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not happened():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, f"no {what} within {TIMEOUT_S:g} s"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def wait_for_job_server(cluster: dict[str, str]) -> None:
    """The job server answers before its agent takes jobs: it is up when a job went through."""
    ready = [str(BIN / "ray"), "job", "submit", "--address", cluster["DASHBOARD"], "--", "true"]
    deadline = time.monotonic() + TIMEOUT_S
    while subprocess.run(ready, env=cluster, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline, f"no job went through within {TIMEOUT_S:g} s"
        time.sleep(1)


@contextlib.contextmanager
def ray_head(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of clients of a Ray head with dashboard and job server, which is started here and ended."""
    # Ray's socket paths are limited to 107 bytes, so its folder must have a short name.
    short = Path("/tmp") / f"ray-{os.getpid()}"
    token = folder / "token"
    token.write_text("0123456789abcdef0123456789abcdef\n")
    port, dashboard, agent = free_port(), free_port(), free_port()
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    env = environment(
        folder, PATH=f"{BIN}:{os.environ['PATH']}", PYTHONPATH=str(ROOT), RAY_TMPDIR=str(short),
        RAY_JOB_STOP_WAIT_TIME_S="1",
        RAY_prestart_worker_first_driver="0", **auth,
    )  # fmt: skip
    head = subprocess.Popen(
        [
            str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=8", f"--port={port}",
            f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={short / 'ray'}",
            "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats",
        ],
        env=env, cwd=folder, stdout=(folder / "head.log").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        address = f"127.0.0.1:{port}"
        deadline = time.monotonic() + TIMEOUT_S
        while not is_open(port):
            assert head.poll() is None, (folder / "head.log").read_text()
            assert time.monotonic() < deadline, f"the Ray head did not come up within {TIMEOUT_S:g} s"
            time.sleep(0.2)
        yield env | {"RAY_ADDRESS": address, "DASHBOARD": f"http://127.0.0.1:{dashboard}"}
    finally:
        for process in [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(timeout=20)
        subprocess.run(["rm", "-rf", str(short)], check=False)
