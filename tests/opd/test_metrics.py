"""metrics.jsonl, the progress line, and real W&B runs offline (no network, no key)."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from opd.evaluate import sample_table, score_transcripts
from opd.metrics import MetricsLog, PhaseTimer, progress_line

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A home without .netrc or wandb settings, and nothing of W&B in the environment."""
    home = tmp_path / "home"
    home.mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))


def make_log(run_dir: Path, mode: str = "disabled", num_steps: int = 100, log_every: int = 10) -> MetricsLog:
    return MetricsLog(run_dir, {"recipe": "tiny", "optim": {"lr": 1e-3}}, mode, "project", num_steps, log_every)


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_file(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.log_step(1, {"time/update": 0.1 + 0.2, "loss/kl": torch.tensor(0.5), "optim/grad_norm": float("inf")})
    first = (tmp_path / "metrics.jsonl").read_text()  # on disk before close: a killed driver loses no step
    assert first == '{"step": 1, "loss/kl": 0.5, "optim/grad_norm": null, "time/update": 0.30000000000000004}\n'
    result = score_transcripts(["one two"], ["one"])
    log.log_eval(1, "dev", result, [])
    log.log_eval(1, "test", result.to_dict())
    log.close()
    log.close()
    lines = read_lines(tmp_path)
    assert lines[1]["step"] == 1
    assert lines[1]["eval/wer/dev"] == 0.5
    assert lines[1]["eval/deletions/dev"] == 1
    assert "eval/normaliser/dev" not in lines[1]
    assert lines[2]["eval/num_utterances/test"] == 1


def test_metrics_file_is_continued(tmp_path: Path) -> None:
    for step in (1, 2):
        log = make_log(tmp_path)
        log.log_step(step, {"loss/kl": 1.0})
        log.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2]


def test_a_metric_that_is_no_number_is_refused(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    with pytest.raises(AssertionError, match="metric loss/kl is a str"):
        log.log_step(1, {"loss/kl": "high"})
    log.close()


def test_plain_lines_every_log_every_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = make_log(tmp_path, num_steps=25, log_every=10)
    for step in range(1, 26):
        log.log_step(step, {"loss/kl": 1 / step})
    log.log_eval(25, "unseen_voices", {"wer": 0.125, "cer": 0.05, "num_utterances": 800})
    log.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1/25", "10/25", "20/25", "25/25", "25/25"]
    assert lines[-1] == "step 25/25  eval unseen_voices: WER 12.50%  CER 5.00% (800 utterances)"


def test_progress_line() -> None:
    metrics = {
        "loss/kl": 0.12345,
        "loss/k1": 9.0,
        "support/vuss": 0.93,
        "rollout/wer": 0.214,
        "time/rollout": 0.8,
        "time/teacher": 0.3,
        "time/update": 0.5,
    }
    assert progress_line(12, 300, metrics, 1.6) == (
        "step 12/300  loss 0.1235  VUSS 0.930  WER 21.4%  rollout 0.80s  teacher 0.30s  update 0.50s  left 7m41s"
    )
    assert progress_line(1, 5001, {"loss/ce": 2.0}, 1.5) == "step 1/5001  loss 2.0000  left 2h05m"


def test_live_line_on_a_terminal(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "from opd.metrics import MetricsLog\n"
        "log = MetricsLog(sys.argv[1], {}, 'disabled', 'p', 3, 100)\n"
        "for step in (1, 2, 3):\n"
        "    log.log_step(step, {'loss/kl': 0.5})\n"
        "log.log_eval(3, 'dev', {'wer': 0.5})\n"
        "log.close()\n"
    )
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        stdout=slave,
        stderr=slave,
        cwd=ROOT,
        env=environment,
        check=True,
    )
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)
    for step in (1, 2, 3):  # every step, however large log_every is
        assert f"step {step}/3" in shown
    assert "eval dev: WER 50.00%" in shown


def test_phase_timer() -> None:
    began = time.perf_counter()
    timer = PhaseTimer()
    with timer("rollout"):
        time.sleep(0.02)
    with pytest.raises(RuntimeError), timer("rollout"):
        raise RuntimeError
    first = timer.take_step()
    assert set(first) == {"time/rollout", "time/step"}
    assert 0.02 <= first["time/rollout"] <= first["time/step"]
    with timer("teacher"):
        pass
    second = timer.take_step()
    assert set(second) == {"time/teacher", "time/step"}
    time.sleep(0.02)
    third = timer.take_step()
    assert list(third) == ["time/step"]
    assert third["time/step"] >= 0.02
    whole = sum(step["time/step"] for step in (first, second, third, timer.take_step()))
    assert whole <= time.perf_counter() - began, "each is counted from the last call"
    seconds = timer.seconds()
    assert seconds["rollout"] == first["time/rollout"]
    assert seconds["total"] >= seconds["rollout"] + seconds["teacher"]


def test_phase_timer_of_a_resumed_run() -> None:
    began = time.perf_counter()
    timer = PhaseTimer({"total": 100.0, "rollout": 40.0})
    with timer("rollout"):
        pass
    seconds, step = timer.seconds(), timer.take_step()
    elapsed = time.perf_counter() - began
    assert 40 <= seconds["rollout"] <= 40 + elapsed + 1e-9
    assert 100 <= seconds["total"] <= 100 + elapsed + 1e-9
    assert step["time/rollout"] <= elapsed


def wandb_folders(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("offline-run-*"))


def wait_for(path: Path, *contents: bytes, timeout_s: float = 60.0) -> bool:
    """Whether the file comes to hold all of it: W&B's own process writes it, some time after finish() has returned."""
    deadline = time.monotonic() + timeout_s
    while not all(content in path.read_bytes() for content in contents):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_wandb_offline_without_a_key(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """mode=online without a key ends in a real offline run, with one line that says so."""
    run_dir = tmp_path / "run"
    log = make_log(run_dir, "online")
    log.log_step(1, {"loss/kl": 0.5})
    samples = sample_table(["a"], ["one two"], ["one"])
    log.log_eval(1, "dev", score_transcripts(["one two"], ["one"]), samples)
    log.close()
    said = capfd.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "wandb" in line]
    assert len(lines) == 1
    assert lines[0].startswith("wandb: no API key; logging offline")
    (folder,) = wandb_folders(run_dir)
    run_id = (run_dir / "wandb_run_id").read_text().strip()
    record = folder / f"run-{run_id}.wandb"
    assert wait_for(record, b"loss/kl", b"eval/wer/dev")
    (table,) = folder.rglob("*.table.json")
    assert json.loads(table.read_text()) == {
        "columns": ["id", "reference", "hypothesis", "wer"],
        "data": [["a", "one two", "one", 0.5]],
    }
    assert len(read_lines(run_dir)) == 2


def test_wandb_with_a_key_and_no_server(tmp_path: Path) -> None:
    """In a process of its own: wandb keeps the server's address for as long as a process lives."""
    program = (
        "import sys\n"
        "from opd.metrics import MetricsLog\n"
        "log = MetricsLog(sys.argv[1], {}, 'online', 'p', 1, 1)\n"
        "log.log_step(1, {'loss/kl': 0.5})\n"
        "log.close()\n"
    )
    server = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "2"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **server},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("wandb: online did not start") == 1
    (folder,) = wandb_folders(tmp_path)
    assert wait_for(next(folder.glob("*.wandb")), b"loss/kl")
    assert read_lines(tmp_path) == [{"step": 1, "loss/kl": 0.5}]


def test_a_resumed_run_keeps_its_wandb_id(tmp_path: Path) -> None:
    for step in (1, 2):
        log = make_log(tmp_path, "offline")
        log.log_step(step, {"loss/kl": 0.5})
        log.close()
        time.sleep(1.1)  # wandb names its folders by the second
    folders = wandb_folders(tmp_path)
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    assert [folder.name.endswith(f"-{run_id}") for folder in folders] == [True, True]


@pytest.mark.parametrize("mode", ["disabled", "environment"])
def test_wandb_disabled_leaves_nothing(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mode == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    log = make_log(tmp_path / "run", "disabled" if mode == "disabled" else "online")
    log.log_step(1, {"loss/kl": 0.5})
    log.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


def test_failing_wandb_loses_no_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = make_log(tmp_path, "offline")
    log.log_step(1, {"loss/kl": 0.5})
    log.log_eval(1, "dev", {"wer": 0.5}, [("too", "few columns")])  # wandb raises: a row must fit its columns
    log.log_step(2, {"loss/kl": 0.4})
    log.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 1, 2]
    assert capsys.readouterr().out.count("wandb: stopped logging") == 1


def test_wandb_that_cannot_start_loses_no_metrics(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wandb_run_id").write_text("an/impossible:id\n")
    log = make_log(tmp_path, "offline")
    log.log_step(1, {"loss/kl": 0.5})
    log.close()
    assert len(read_lines(tmp_path)) == 1
    assert "wandb: could not start" in capsys.readouterr().out


def test_key_in_netrc_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from opd.metrics import has_wandb_key

    assert not has_wandb_key()
    path = Path(os.environ["NETRC"])
    path.touch(mode=0o600)
    path.write_text("machine example.org login user password no\n")
    assert not has_wandb_key()
    path.write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    assert has_wandb_key()
    path.unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert has_wandb_key()
