"""scripts/submit.sh: what it refuses before it asks a cluster for anything."""

from __future__ import annotations

import os
import subprocess

import pytest
from main_job import ROOT

RUN = ["recipe=tiny", "run_dir=/tmp/run-of-a-job"]


@pytest.mark.parametrize(("arguments", "status"), [(["--help"], 0), (["recipe=tiny", "-h"], 0), ([], 2)])
def test_help_is_told_and_so_is_how_it_is_used(arguments: list[str], status: int) -> None:
    result = subprocess.run(
        [str(ROOT / "scripts" / "submit.sh"), *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == status
    assert (result.stderr if status else result.stdout).startswith("usage: scripts/submit.sh recipe=NAME run_dir=")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=tiny"], "run_dir=/absolute/path is missing"),
        (["recipe=tiny", "run_dir=runs/x"], "run_dir=runs/x: a job runs in a temporary copy of this folder"),
        ([*RUN, "env=HF_TOKEN"], "env=HF_TOKEN: Ray shows a job's variables to everybody who sees the dashboard"),
        ([*RUN, "env=OMP_NUM_THREADS,WANDB_API_KEY"], "env=WANDB_API_KEY: Ray shows a job's variables"),
        *(
            ([*RUN, f"env={name}"], f"env={name}: Ray shows a job's variables")
            for name in ("wandb_api_key", "DB_PASSWD", "GIT_PASS", "MYSQL_PWD", "AWS_AUTH", "Cloud_Cred")
        ),
        ([*RUN, "env=http_proxy"], "env=http_proxy: it may hold a password before its @"),
        ([*RUN, "env=HTTPS_PROXY"], "env=HTTPS_PROXY: it may hold a password before its @"),
        ([*RUN, "env=NO_PROXY,NOT_SET_ANYWHERE"], "env=NOT_SET_ANYWHERE: this variable is not set here"),
        ([*RUN, "env=NOT_SET_ANYWHERE"], "env=NOT_SET_ANYWHERE: this variable is not set here"),
        ([*RUN, "env=A=1"], "env=A=1: give names of variables"),
    ],
)
def test_what_cannot_go_well_is_refused(arguments: list[str], message: str) -> None:
    secret = (
        "HF_TOKEN",
        "WANDB_API_KEY",
        "wandb_api_key",
        "DB_PASSWD",
        "GIT_PASS",
        "MYSQL_PWD",
        "AWS_AUTH",
        "Cloud_Cred",
    )
    proxies = dict.fromkeys(("http_proxy", "HTTPS_PROXY"), "http://me:hidden-value@proxy:3128")
    environment = {**os.environ, **dict.fromkeys(secret, "hidden-value"), **proxies, "NO_PROXY": "localhost"}
    result = subprocess.run(
        [str(ROOT / "scripts" / "submit.sh"), *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert f"error: {message}" in result.stderr
    assert "hidden-value" not in result.stdout + result.stderr
