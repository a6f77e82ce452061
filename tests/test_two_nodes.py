"""A run that is spread over two Ray nodes: it trains, saves and goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import psutil
import pytest
from main_job import BIN, ROOT, command, metrics, run, start, wait_for_job_server, wait_for_step
from safetensors.torch import load_file
from two_nodes import Nodes, ray_nodes

TWO_NODES = ["cluster.num_nodes=2", "cluster.ranks_per_node=1", "cluster.network_interface=lo"]


@pytest.mark.nightly
def test_a_run_over_two_nodes_trains_and_resumes_bit_equal(speech: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = command(speech, run_dir, *TWO_NODES, "data.eval_manifests={}")
    with ray_nodes(tmp_path, num_nodes=2, num_cpus=2) as cluster:
        process = start(arguments, cluster.env)
        wait_for_step(process, run_dir, 1)
        assert nodes_of_ranks(run_dir, cluster) == ["127.0.0.2", "127.0.0.3"]
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
        weights, lines = load_file(run_dir / "export" / "model.safetensors"), metrics(run_dir)
        shutil.rmtree(run_dir / "checkpoints" / "step-000006")  # as if it had been stopped before
        (run_dir / "summary.json").unlink()
        again = run(arguments, cluster.env)
    assert again.returncode == 0, again.stderr
    assert "going on after step 4 of 6" in again.stdout
    assert metrics(run_dir) == lines
    resumed = load_file(run_dir / "export" / "model.safetensors")
    assert weights.keys() == resumed.keys()
    assert all(weights[name].equal(resumed[name]) for name in weights)


@pytest.mark.nightly
def test_the_doctor_looks_at_both_nodes_as_a_job_and_gets_the_variables_that_were_named(
    speech: dict[str, Path], tmp_path: Path
) -> None:
    with ray_nodes(tmp_path, dashboard=True) as cluster:
        wait_for_job_server(cluster.env)
        client = cluster.env | {"RAY_ADDRESS": cluster.env["DASHBOARD"], "OPD_TRACEBACK": "given along"}
        arguments = [*command(speech, tmp_path / "run", *TWO_NODES)[3:], "doctor=true", "env=OPD_TRACEBACK"]
        result = run([str(ROOT / "scripts" / "submit.sh"), *arguments], client)
        jobs = run([str(BIN / "ray"), "job", "list", "--address", client["RAY_ADDRESS"]], client).stdout
    assert result.returncode == 0, result.stdout + result.stderr
    assert "run_dir, models and audio are seen from all 2 nodes" in result.stdout
    assert "this run can work here" in result.stdout
    assert "'OPD_TRACEBACK': 'given along'" in jobs, "which is why no secret goes this way"
    assert not (tmp_path / "run").exists()


def nodes_of_ranks(run_dir: Path, cluster: Nodes) -> list[str]:
    """Address of the node that each rank of a running job is on: the one whose raylet is its parent."""
    address_of = {node.raylet_pid: node.address for node in cluster.nodes}
    pids = json.loads((run_dir / "workers.json").read_text())["student"]
    return [address_of[psutil.Process(pid).ppid()] for pid in pids]
