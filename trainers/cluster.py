"""Ray: start or join a cluster, check that it is large enough, place the workers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from verl.single_controller.ray import RayResourcePool
from verl.single_controller.ray.base import sort_placement_group_by_node_ip

from opd.object_store import ADVICE
from opd.remote import wait_for_placement
from opd.schema import ClusterConfig
from trainers.env import verl_env

# Ends the process that started it unless its own input is closed within a number of seconds.
WATCHER = """
import os, select, signal, sys
watched, limit_s, message = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
if not select.select([sys.stdin], [], [], limit_s)[0] and os.getppid() == watched:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os.kill(watched, signal.SIGKILL)
"""

# Joins Ray as a driver does, and leaves again.
PROBE = "import ray; ray.init(log_to_driver=False, logging_level='ERROR'); ray.shutdown()"


def check_head(limit_s: float) -> None:
    """Raises ValueError where a process cannot join the cluster of RAY_ADDRESS within a number of seconds.

    That process is another one, since ray.init may hang for ever, or end the process that calls it.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address or ray.is_initialized():
        return
    # Within a Ray job, the probe is no second driver of that job.
    env = {key: value for key, value in os.environ.items() if key != "RAY_JOB_CONFIG_JSON_ENV_VAR"}
    try:
        subprocess.run(
            [sys.executable, "-c", PROBE], env=env, stdin=subprocess.DEVNULL, timeout=limit_s, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ValueError(
            f"RAY_ADDRESS={address}: Ray could not be joined within {limit_s:g} s: its control service does not answer, or "
            "the object store of this node is full"
        ) from error
    except subprocess.CalledProcessError as error:
        said = next((line.strip() for line in reversed(error.stderr.splitlines()) if line.strip()), "")
        raise ValueError(
            f"RAY_ADDRESS={address}: Ray cannot be joined: {said or f'exit status {error.returncode}'}"
        ) from error


def connect(cluster: ClusterConfig) -> None:
    """Joins the cluster of RAY_ADDRESS or of the surrounding Ray job; starts a local one where there is none.

    Where this process is connected already (the stage before this one did it), it stays so.
    """
    if ray.is_initialized():
        return
    env = verl_env(cluster.use_gpu)
    options: dict[str, Any] = {"runtime_env": {"env_vars": env}, "log_to_driver": False, "logging_level": "WARNING"}
    if not os.environ.get("RAY_ADDRESS"):
        # "local": a head that somebody started on this machine is not joined unasked, and Ray would refuse num_cpus for it.
        # Ray counts the machine's cores; the dashboard costs seconds and nobody looks at a local one.
        options |= {"address": "local", "include_dashboard": False, "num_cpus": max(os.cpu_count() or 1, 2)}
    limit_s = cluster.start_timeout_s
    message = (
        f"joining Ray took more than cluster.start_timeout_s={limit_s:g} s: its control service does not answer, or the object "
        f"store of this node is full and cannot be spilled; {ADVICE}"
    )
    with ended_after(limit_s, message):
        ray.init(**options)


@contextlib.contextmanager
def ended_after(limit_s: float, message: str) -> Iterator[None]:
    """Kills this process, with an error line, where the block takes longer than limit_s seconds.

    For what may hang with Python's lock held, as ray.init does at a full object store: no thread of ours would run then.
    """
    arguments = [sys.executable, "-S", "-E", "-c", WATCHER, str(os.getpid()), str(limit_s), message]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE) as watcher:
        try:
            yield
        finally:
            assert watcher.stdin is not None, "a pipe"
            watcher.stdin.close()


def check_resources(cluster: ClusterConfig, ranks: int, teachers: int, wait_s: float = 0.0) -> None:
    """Raises ValueError where the cluster has too few CPUs or GPUs for this many student ranks and teacher workers.

    wait_s   how long a node that is to take the place of a lost one may need to join
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return _check_resources(cluster, ranks, teachers)
        except ValueError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(1.0)


def _check_resources(cluster: ClusterConfig, ranks: int, teachers: int) -> None:
    needed = {"CPU": ranks * cluster.cpus_per_rank + teachers * cluster.cpus_per_teacher}
    if cluster.use_gpu:
        needed["GPU"] = ranks * cluster.gpus_per_rank + teachers * cluster.gpus_per_teacher
    have = ray.cluster_resources()
    for kind, amount in needed.items():
        if have.get(kind, 0.0) + 1e-6 < amount:
            raise ValueError(
                f"the Ray cluster has {have.get(kind, 0.0):g} {kind}s, this recipe needs {amount:g} "
                f"({ranks} student ranks, {teachers} teacher workers): change cluster.ranks_per_node, "
                f"cluster.num_teachers or cluster.{kind.lower()}s_per_*"
            )


class StudentPool(RayResourcePool):
    """verl's resource pool with CPUs per rank as configured (fractions too) and a limit on the wait for placement.

    verl's own pool asks for whole CPUs by its colocation count and waits for ever. Each node's ranks are one placement
    group, and each group has a node of its own as far as there are enough; ranks are numbered by the nodes' addresses (verl's
    order), so a rank is on the same node again when the run is started again on the same nodes.
    """

    def __init__(self, cluster: ClusterConfig) -> None:
        # verl gives each worker 1 / max_colocate_count GPUs.
        super().__init__(
            [cluster.ranks_per_node] * cluster.num_nodes,
            use_gpu=cluster.use_gpu,
            max_colocate_count=1 / cluster.gpus_per_rank,  # type: ignore[arg-type]
        )
        self.cluster = cluster
        self.pgs: list[PlacementGroup] | None = None

    def get_placement_groups(
        self, strategy: str = "STRICT_PACK", name: str | None = None, device_name: str = "cuda"
    ) -> list[PlacementGroup]:
        if self.pgs is None:
            bundle: dict[str, float] = {"CPU": self.cluster.cpus_per_rank}
            if self.use_gpu:
                bundle["GPU"] = self.cluster.gpus_per_rank
            nodes: list[str | None] = [*choose_nodes(bundle, self.store[0], len(self.store))]
            nodes += [None] * (len(self.store) - len(nodes))  # where one is missing, whichever joins or has room
            groups = [
                placement_group([dict(bundle)] * count, strategy=strategy, _soft_target_node_id=node)
                for count, node in zip(self.store, nodes, strict=True)
            ]
            wait_for_placement(groups, f"{self.world_size} student ranks", bundle, self.cluster.placement_timeout_s)
            self.pgs = sort_placement_group_by_node_ip(groups)
        return self.pgs

    def remove(self, wait_s: float = 5.0) -> None:
        """Gives the placement groups back, and waits until Ray counts their resources as free.

        Ray takes its time for it, and whoever places workers before would find these nodes full and take others.
        """
        if not self.pgs:
            return
        expected = _free_cpus() + self.cluster.cpus_per_rank * self.world_size
        for group in self.pgs:
            remove_placement_group(group)
        self.pgs = None
        deadline = time.monotonic() + wait_s  # somebody else may take them at once, or their node is lost
        while _free_cpus() + 1e-6 < expected and time.monotonic() < deadline:
            time.sleep(0.05)


def _free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


def choose_nodes(bundle: dict[str, float], ranks_per_node: int, num_nodes: int) -> list[str]:
    """Ids of at most num_nodes nodes that can hold ranks_per_node bundles each, ordered by address.

    Those that have room now come before those that are full. Without this, Ray fills one node before it takes the next.
    """
    free = ray._private.state.available_resources_per_node()

    def fits(resources: dict[str, float]) -> bool:
        return all(resources.get(kind, 0.0) + 1e-6 >= amount * ranks_per_node for kind, amount in bundle.items())

    fitting = [node for node in ray.nodes() if node["Alive"] and fits(node["Resources"])]
    fitting.sort(key=lambda node: (not fits(free.get(node["NodeID"], {})), _address_key(node)))
    return [node["NodeID"] for node in sorted(fitting[:num_nodes], key=_address_key)]


def _address_key(node: dict[str, Any]) -> tuple[str, str]:
    return node["NodeManagerAddress"], node["NodeID"]


def rank_env(cluster: ClusterConfig) -> dict[str, str]:
    """Environment of the student's ranks, beside what verl gives them."""
    if cluster.network_interface is None:
        return {}
    return {"GLOO_SOCKET_IFNAME": cluster.network_interface, "NCCL_SOCKET_IFNAME": cluster.network_interface}


def check_interface(cluster: ClusterConfig) -> None:
    """Raises ValueError where this machine has no cluster.network_interface. For a rank, before it joins the others."""
    name, known = cluster.network_interface, [name for _, name in socket.if_nameindex()]
    if name is not None and name not in known:
        raise ValueError(
            f"cluster.network_interface={name}: node {ray.util.get_node_ip_address()} has no such interface; it has "
            f"{', '.join(known)}"
        )


@ray.remote(num_cpus=0)
def free_address() -> tuple[str, str]:
    """Address and a free port of the node this runs on, for the ranks' rendezvous."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address().strip("[]"), str(probe.getsockname()[1])
