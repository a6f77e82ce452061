"""A Ray cluster of several nodes on one machine: a head and more raylets, each with an address of its own on the loopback
interface, its own resources and its own folder. Ended by their processes' ids."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from main_job import BIN, ROOT, TIMEOUT_S, environment, free_port

TOKEN = "0123456789abcdef0123456789abcdef\n"


@dataclass
class Node:
    """One `ray start --block`. `address` is the IP that Ray knows it by, `process` what it was started as."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path
    raylet_pid: int = 0

    def family(self) -> list[psutil.Process]:
        """The node's processes: raylet, agents, workers and, on the head, the GCS and the dashboard."""
        with contextlib.suppress(psutil.NoSuchProcess):
            top = psutil.Process(self.process.pid)
            return [top, *top.children(recursive=True)]
        return []

    def kill(self) -> None:
        """SIGKILL to all of them, as when a machine loses its power."""
        _kill(self.family())
        self.process.wait(timeout=20)


@dataclass
class Nodes:
    """A running cluster. `env` is the environment of its clients (RAY_ADDRESS and the rest)."""

    env: dict[str, str]
    address: str
    folder: Path
    num_cpus: int
    nodes: list[Node] = field(default_factory=list)

    @property
    def head(self) -> Node:
        return self.nodes[0]

    def add(self) -> Node:
        """One more raylet, which has joined the cluster when this returns."""
        number = len(self.nodes) + 2
        node = self._start(number, ["--address", self.address])
        self.nodes.append(node)
        self._wait_for_raylet(node)
        return node

    def _start(self, number: int, where: list[str]) -> Node:
        log = self.folder / f"node-{number}.log"
        arguments = [
            str(BIN / "ray"), "start", "--block", *where, f"--node-ip-address=127.0.0.{number}",
            f"--num-cpus={self.num_cpus}", f"--dashboard-agent-listen-port={free_port()}",
            f"--object-store-memory={200 << 20}", "--disable-usage-stats",
        ]  # fmt: skip
        with log.open("wb") as file:
            process = subprocess.Popen(
                arguments, env=self.env, cwd=self.folder, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        return Node(f"127.0.0.{number}", process, log)

    def _wait_for_raylet(self, node: Node) -> None:
        """`ray start` says that it is up once the raylet has registered."""
        deadline = time.monotonic() + TIMEOUT_S
        while b"Ray runtime started" not in node.log.read_bytes():
            assert node.process.poll() is None, node.log.read_text()
            assert time.monotonic() < deadline, f"{node.address} did not come up within {TIMEOUT_S:g} s"
            time.sleep(0.1)
        node.raylet_pid = next(p.pid for p in node.family() if p.name() == "raylet")


@contextlib.contextmanager
def ray_nodes(
    folder: Path, num_nodes: int = 2, num_cpus: int = 2, *, dashboard: bool = False, **extra: str
) -> Iterator[Nodes]:
    """A cluster of `num_nodes` raylets with `num_cpus` each, started here and ended; `extra` is more environment.

    dashboard: with a job server, whose address is `env["DASHBOARD"]`
    """
    short = Path("/tmp") / f"rn-{os.getpid()}"  # Ray's socket paths are limited to 107 bytes
    token = folder / "token"
    token.write_text(TOKEN)
    port = free_port()
    env = environment(
        folder, PATH=f"{BIN}:{os.environ['PATH']}", PYTHONPATH=str(ROOT), RAY_TMPDIR=str(short), RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token), RAY_prestart_worker_first_driver="0", **extra,
    )  # fmt: skip
    address = f"127.0.0.2:{port}"
    cluster = Nodes(env | {"RAY_ADDRESS": address}, address, folder, num_cpus)
    head = ["--head", f"--port={port}", f"--temp-dir={short / 'ray'}"]
    head += (
        ["--dashboard-host=127.0.0.1", f"--dashboard-port={free_port()}"]
        if dashboard
        else ["--include-dashboard=false"]
    )
    if dashboard:
        cluster.env["DASHBOARD"] = f"http://127.0.0.1:{head[-1].partition('=')[2]}"
    try:
        cluster.nodes.append(cluster._start(2, head))
        cluster._wait_for_raylet(cluster.head)
        for _ in range(num_nodes - 1):
            cluster.add()
        yield cluster
    finally:
        # All at once: a raylet that outlives the head would wait for it.
        _kill([process for node in cluster.nodes for process in node.family()])
        for node in cluster.nodes:
            node.process.wait(timeout=20)
        shutil.rmtree(short, ignore_errors=True)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


FILLER = """
import sys, time
import numpy as np
import ray

ray.init(log_to_driver=False, logging_level="ERROR")
room = int(float(sys.argv[1]) * ray.cluster_resources()["object_store_memory"])
kept, size = [], 32 << 20
while room >= 1 << 10:
    size = max(1 << 10, min(size, room) // 2)
    try:
        while size <= room:
            kept.append(ray.put(np.ones(size, np.uint8)))
            room -= size
            print("took", size, flush=True)
    except ray.exceptions.OutOfDiskError:
        if size == 1 << 10:
            print("full", flush=True)
            time.sleep(0.02)  # and takes what others leave
print("full", flush=True)
time.sleep(3600)
"""


@contextlib.contextmanager
def fill_object_store(env: dict[str, str], share: float = 2.0, settle_s: float = 3.0) -> Iterator[None]:
    """Another job of the cluster holds `share` of a node's object store; all that it can get where that is more than 1.

    Where the store cannot be spilled, Ray leaves this job waiting for its last object, and whoever comes after it too.
    """
    process = subprocess.Popen([sys.executable, "-c", FILLER, str(share)], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None, "a pipe"
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stdout or ()], daemon=True).start()
    try:
        line = lines.get(timeout=TIMEOUT_S)
        while line != "full\n":
            assert process.poll() is None, "whoever fills the store lives"
            try:
                line = lines.get(timeout=settle_s)
            except queue.Empty:
                break
        yield
    finally:
        process.kill()
        process.wait(timeout=20)
