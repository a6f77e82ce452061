"""Where Ray places the workers: on a cluster of two nodes with pretended GPUs, in a process of its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
from main_job import ROOT, environment

from trainers.cluster import check_head

SCRIPT = """
import json, sys
from trainers.env import set_verl_env
set_verl_env(use_gpu=False)
import ray
from ray.cluster_utils import Cluster
from opd.schema import ClusterConfig
from trainers.cluster import StudentPool, choose_nodes, rank_env

nodes = Cluster()
for number in (3, 2):  # the head's address is not the first
    nodes.add_node(num_cpus=4, num_gpus=2, node_ip_address=f"127.0.0.{number}", include_dashboard=False)
ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
address_of = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}

def places(pool):
    table = ray._private.state.state.placement_group_table
    return [address_of[node] for pg in pool.get_placement_groups() for node in table(pg.id)["bundles_to_node_id"].values()]

@ray.remote(num_cpus=0.5, num_gpus=0.4)
class Teacher:
    def place(self):
        return [ray.util.get_node_ip_address(), ray.get_gpu_ids()]

found = {}
for num_nodes, ranks in ((1, 2), (2, 1), (2, 2)):
    config = ClusterConfig(num_nodes=num_nodes, ranks_per_node=ranks, use_gpu=True, gpus_per_rank=0.6)
    for attempt in range(2):
        pool = StudentPool(config)
        found[f"{num_nodes}x{ranks}.{attempt}"] = places(pool)
        if (num_nodes, ranks, attempt) == (2, 2, 1):
            teachers = [Teacher.remote() for _ in range(4)]
            found["teachers"] = ray.get([teacher.place.remote() for teacher in teachers], timeout=60)
            for teacher in teachers:
                ray.kill(teacher)
        pool.remove()
config = ClusterConfig(num_nodes=3, ranks_per_node=1, placement_timeout_s=20.0)
found["fewer nodes"] = places(StudentPool(config))
found["too large"] = choose_nodes({"CPU": 3.0}, 2, 2)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("cluster")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
        env=environment(folder, PYTHONPATH=str(ROOT), RAY_AUTH_MODE="disabled"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_each_nodes_ranks_are_together_and_in_the_same_order_each_time(found: dict) -> None:
    """Although there is room for all on the first node."""
    assert found["1x2.0"] == ["127.0.0.2"] * 2
    for attempt in range(2):
        assert found[f"2x1.{attempt}"] == ["127.0.0.2", "127.0.0.3"]
        assert found[f"2x2.{attempt}"] == ["127.0.0.2"] * 2 + ["127.0.0.3"] * 2


def test_one_teacher_shares_each_gpu_with_a_rank_that_was_placed_before(found: dict) -> None:
    places = sorted((address, gpus) for address, gpus in found["teachers"])
    assert places == [(f"127.0.0.{node}", [gpu]) for node in (2, 3) for gpu in (0, 1)]


def test_fewer_nodes_than_asked_for_are_shared_and_small_ones_are_left_out(found: dict) -> None:
    assert sorted(set(found["fewer nodes"])) == ["127.0.0.2", "127.0.0.3"]
    assert len(found["fewer nodes"]) == 3
    assert found["too large"] == []


def test_a_head_that_takes_connections_and_never_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError, match=f"RAY_ADDRESS={address}: Ray could not be joined within 4 s: its control"):
            check_head(4.0)


def test_an_address_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    with pytest.raises(ValueError, match="RAY_ADDRESS=nowhere: Ray cannot be joined: "):
        check_head(60.0)


def test_without_an_address_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_head(0.0)
