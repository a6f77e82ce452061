"""The main job, run for real: Ray, verl workers, FSDP2, the shipped seeds, killed and resumed, submitted as a Ray job."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
STEPS = 6
TINY = [
    "recipe=tiny", f"train.num_steps={STEPS}", "train.batch_size=8", "train.micro_batch_size=2", "train.log_every=1",
    "checkpoint.checkpoint_every=2", "optim.warmup_steps=2", "eval.batch_size=4", "wandb.mode=offline",
    "cluster.num_teachers=1",
]  # fmt: skip

ONE_RANK = ["cluster.ranks_per_node=1", "eval.teacher=false"]


def environment(tmp: Path, **extra: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "VERL_", "WANDB_"))}
    return kept | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "HF_HOME": str(tmp / "hf"), **extra}


def command(speech: dict[str, Path], run_dir: Path, *overrides: str) -> list[str]:
    data = [f"data.train_manifest={speech['unlabelled']}", f"data.eval_manifests={{held_out: {speech['eval']}}}"]
    return [sys.executable, "-m", "opd.train", *TINY, *data, f"run_dir={run_dir}", *overrides]


def run(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def run_together(commands: list[list[str]], env: dict[str, str]) -> list[subprocess.CompletedProcess[str]]:
    """`run` of several commands at the same time: most of a start is waiting."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda arguments: run(arguments, env), commands))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of clients of a Ray head that this module starts, with dashboard and job server, and ends."""
    import socket

    def free_port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    # Ray's socket paths are limited to 107 bytes, so its folder must have a short name.
    folder = tmp_path_factory.mktemp("head")
    short = Path("/tmp") / f"ray-{os.getpid()}"
    token = folder / "token"
    token.write_text("0123456789abcdef0123456789abcdef\n")
    port, dashboard, agent = free_port(), free_port(), free_port()
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment(folder, PATH=path, PYTHONPATH=str(ROOT), RAY_JOB_STOP_WAIT_TIME_S="1", **auth)
    head = subprocess.Popen(
        [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--port={port}",
            f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--temp-dir={short}",
            "--node-ip-address=127.0.0.1", f"--dashboard-agent-listen-port={agent}", "--disable-usage-stats",
        ],
        env=env, cwd=folder, stdout=(folder / "head.log").open("w"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    client = env | {"RAY_ADDRESS": f"127.0.0.1:{port}", "DASHBOARD": f"http://127.0.0.1:{dashboard}"}
    # The job server answers before its agent takes jobs: the head is up when a job went through.
    ready = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", client["DASHBOARD"], "--", "true"]
    deadline = time.monotonic() + 90
    while subprocess.run(ready, env=env, capture_output=True, check=False).returncode:
        assert head.poll() is None, (folder / "head.log").read_text()
        assert time.monotonic() < deadline, "the Ray head did not come up within 90 s"
        time.sleep(1)
    yield client
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    head.wait(timeout=20)
    subprocess.run(["rm", "-rf", str(short)], check=False)


@pytest.fixture(scope="module")
def unbroken(speech: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run, by a driver that starts its own Ray; and what it printed."""
    folder = tmp_path_factory.mktemp("unbroken")
    result = run(command(speech, folder / "run"), environment(folder))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return folder / "run", result.stdout


def metrics(run_dir: Path) -> list[dict]:
    """metrics.jsonl without times, which are never the same."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def test_a_run_ends_with_summary_table_export_and_metrics(unbroken: tuple[Path, str], speech: dict[str, Path]) -> None:
    run_dir, printed = unbroken
    summary = json.loads((run_dir / "summary.json").read_text())
    assert {"recipe", "stage", "steps", "seed", "seconds", "eval", "train_manifest", "export_dir"} <= summary.keys()
    assert (summary["recipe"], summary["stage"], summary["steps"], summary["seed"]) == ("tiny", "opd", STEPS, 0)
    assert {"total", "rollout", "teacher", "update", "eval"} <= summary["seconds"].keys()
    for when in ("before", "after", "teacher"):
        assert summary["eval"]["held_out"][when]["num_utterances"] == 12
        assert 0 <= summary["eval"]["held_out"][when]["wer"] < 1.0
    assert summary["train_texts"] == 0
    assert summary["train_manifest"] == str(speech["unlabelled"])
    assert "held_out" in printed
    assert "first step" in printed
    steps = [line for line in metrics(run_dir) if "loss/kl" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        for name in ("support/vuss", "support/overlap", "support/student_mass", "support/teacher_mass",
                     "student/eos_at_end", "teacher/eos_at_end", "optim/grad_norm", "align/coverage"):  # fmt: skip
            assert math.isfinite(line[name]), name
        assert 32 <= line["support/vuss"] <= 66
        assert line["align/coverage"] == 1.0
        assert line["rollout/forwards"] <= line["rollout/tokens"]
    # The second epoch's drafts are the first's rollouts. (That they are saved is what a run that resumes bit-equal shows.)
    assert [line["rollout/accept_rate"] > 0.5 for line in steps] == [False] * 3 + [True] * 3
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("step-*")) == ["step-000004", "step-000006"]
    assert list((run_dir / "wandb").glob("offline-run-*"))


def test_the_export_writes_the_same_transcripts_where_the_package_is_not_installed(
    unbroken: tuple[Path, str], speech: dict[str, Path], tmp_path: Path
) -> None:
    run_dir, _ = unbroken
    script = tmp_path / "infer.py"
    script.write_text(
        "import json, sys, importlib.util\n"
        "sys.path = [p for p in sys.path if p not in ('', ROOT)]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        "assert importlib.util.find_spec('opd') is None, 'the package must not be found here'\n"
        "from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer\n"
        "path, manifest = sys.argv[1:]\n"
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)\n"
        "processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)\n"
        "tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)\n"
        "assert type(model).__module__.startswith('transformers_modules')\n"
        "import os\n"
        "blocked = [[i] for i in processor.blocked_token_ids(model.config.vocab_size)]\n"
        "for line in open(manifest):\n"
        "    row = json.loads(line)\n"
        "    audio = os.path.join(os.path.dirname(manifest), row['audio'])\n"
        "    chat = [{'role': 'user', 'content': [{'type': 'audio', 'path': audio},\n"
        "            {'type': 'text', 'text': 'Please transcribe this audio.'}]}]\n"
        "    inputs = processor.apply_chat_template(chat, add_generation_prompt=True, return_tensors='pt')\n"
        "    ids = model.generate(**inputs, max_new_tokens=16, do_sample=False, bad_words_ids=blocked)\n"
        "    text = processor.clean_text(ids[0, inputs['input_ids'].shape[1]:].tolist())\n"
        "    print(json.dumps({'id': row['id'], 'pred_text': text}))\n".replace("ROOT", repr(str(ROOT)))
    )
    result = subprocess.run(
        [sys.executable, "-P", str(script), str(run_dir / "export"), str(speech["eval"])],
        env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines() == (run_dir / "transcripts-held_out.jsonl").read_text().splitlines()
    card = (run_dir / "export" / "README.md").read_text()
    assert "tiny" in card
    assert "held_out" in card


def kill_when_training(arguments: list[str], env: dict[str, str], run_dir: Path, victim: str) -> tuple[int, str, float]:
    """Starts a run and kills it with SIGKILL after its third step: the driver, or a rank of the student.

    Returns the driver's exit status, what it printed, and the seconds from the kill to its end.
    """
    process = subprocess.Popen(
        arguments,
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not (run_dir / "metrics.jsonl").exists() or '"step": 3,' not in (run_dir / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline, "no third step within 200 s"
        time.sleep(0.02)
    pid = process.pid if victim == "driver" else json.loads((run_dir / "workers.json").read_text())["student"][1]
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    printed, _ = process.communicate(timeout=120)
    return process.returncode, printed, time.monotonic() - killed


@pytest.mark.parametrize("victim", ["driver", "rank"])
def test_a_killed_run_resumes_bit_equal(
    victim: str, unbroken: tuple[Path, str], speech: dict[str, Path], cluster: dict[str, str], tmp_path: Path
) -> None:
    """Also the proof that two runs of one seed are the same: all numbers but times are compared to the last digit."""
    run_dir = tmp_path / "run"
    status, printed, seconds = kill_when_training(command(speech, run_dir), cluster, run_dir, victim)
    assert status != 0
    if victim == "rank":
        assert "error:" in printed
        assert "resume=auto" in printed
        assert seconds < 60
    assert not (run_dir / "summary.json").exists()
    result = run(command(speech, run_dir), cluster)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "going on after step" in result.stdout
    expected = load_file(unbroken[0] / "export" / "model.safetensors")
    resumed = load_file(run_dir / "export" / "model.safetensors")
    assert expected.keys() == resumed.keys()
    assert all(expected[name].equal(resumed[name]) for name in expected)
    assert metrics(run_dir) == metrics(unbroken[0])


def test_a_ray_job_runs_as_the_readme_says(speech: dict[str, Path], cluster: dict[str, str], tmp_path: Path) -> None:
    # A rate that changes nothing: the second evaluation is no better than the first, and patience is at its end.
    stop_early = ["train.num_steps=5", "optim.lr=1e-12", "eval.eval_every=1", "eval.patience=1"]
    script = [str(ROOT / "scripts" / "submit.sh"), *command(speech, tmp_path / "run", *stop_early)[3:]]
    result = run(script, cluster | {"RAY_ADDRESS": cluster["DASHBOARD"]})
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["exported_step"]) == (2, 1), "stopped early, the better step is exported"
    relative = run([*script, "run_dir=runs/x"], cluster)
    assert relative.returncode == 1
    assert "absolute path" in relative.stderr
    submit = ["ray", "job", "submit", "--address", cluster["DASHBOARD"], "--working-dir", str(ROOT), "--"]
    inside = run([*submit, "python", "-m", "opd.train", "recipe=tiny", "run_dir=runs/x"], cluster)
    assert inside.returncode == 1
    assert "run_dir=runs/x: a Ray job runs in a temporary copy" in inside.stdout + inside.stderr


def test_sft_starts_from_nothing_and_export_runs_again(
    speech: dict[str, Path], cluster: dict[str, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = command(speech, run_dir)
    arguments[3] = "recipe=tiny_student"
    arguments += [f"data.train_manifest={speech['train']}", "train.num_steps=3", "cluster.ranks_per_node=1"]
    arguments += ["data.sorted_epochs=1", "wandb.mode=disabled"]
    result = run(arguments, cluster)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    steps = [line for line in metrics(run_dir) if "loss/ce" in line]
    assert len(steps) == 3
    assert all(math.isfinite(line["loss/ctc"]) for line in steps)
    again = run([sys.executable, "-m", "opd.export", f"run_dir={run_dir}", f"out_dir={tmp_path / 'again'}"], cluster)
    assert again.returncode == 0, again.stderr
    first = load_file(run_dir / "export" / "model.safetensors")
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    assert not any(name.startswith("ctc_head") for name in first)
    other = run([*arguments, "optim.lr=0.5"], cluster)
    assert other.returncode == 1
    assert "optim.lr" in other.stderr


def rewritten(manifest: Path, target: Path, change) -> Path:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    for row in rows:
        row["audio"] = str(manifest.parent / row["audio"])
    target.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))
    return target


def test_bad_audio_stops_or_is_skipped_and_listed(
    speech: dict[str, Path], cluster: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "broken.wav").write_bytes(b"RIFFnothing")

    def spoil(rows: list[dict]) -> list[dict]:
        rows[0]["audio"] = str(tmp_path / "broken.wav")
        rows[1]["audio"] = str(tmp_path / "missing.wav")
        return rows[:8]

    manifest = rewritten(speech["unlabelled"], tmp_path / "spoilt.jsonl", spoil)
    arguments = [f"data.train_manifest={manifest}", *ONE_RANK, "train.num_steps=14", "data.eval_manifests={}"]
    stopped, skipped = run_together(
        [
            command(speech, tmp_path / "stop", *arguments),
            command(speech, tmp_path / "skip", *arguments, "data.on_bad_audio=skip"),
        ],
        cluster,
    )
    assert stopped.returncode == 1
    assert stopped.stderr.splitlines()[-1].startswith("error:")
    assert ".wav" in stopped.stderr.splitlines()[-1]
    assert metrics(tmp_path / "stop") == []
    # Two of eight: more than data.max_bad_share allows, which is looked at once a hundred utterances were seen.
    assert skipped.returncode == 1
    assert "above data.max_bad_share=0.02" in skipped.stderr.splitlines()[-1]
    assert len(metrics(tmp_path / "skip")) == 12
    listed = [json.loads(line) for line in (tmp_path / "skip" / "bad_audio.jsonl").read_text().splitlines()]
    assert {Path(row["audio"]).name for row in listed} == {"broken.wav", "missing.wav"}
    assert len(listed) == 2 * 13
    assert all(row["reason"] for row in listed)


def test_a_step_that_is_not_finite_stops_with_the_utterances(
    speech: dict[str, Path], cluster: dict[str, str], tmp_path: Path
) -> None:
    overrides = ["optim.lr=1e30", "optim.warmup_steps=0", "checkpoint.checkpoint_every=100", "data.eval_manifests={}"]
    overrides += ONE_RANK
    result = run(command(speech, tmp_path / "run", *overrides), cluster)
    assert result.returncode == 1
    line = result.stderr.splitlines()[-1]
    assert "error: step 2: the loss or the gradient is not finite, nothing was updated" in line
    ids = [json.loads(row)["id"] for row in speech["unlabelled"].read_text().splitlines()]
    assert sum(f"{name}" in line for name in ids) >= 8
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_cluster_that_is_too_small_is_refused(
    speech: dict[str, Path], cluster: dict[str, str], tmp_path: Path
) -> None:
    few_cpus, no_gpu = run_together(
        [
            command(speech, tmp_path / "cpu", "cluster.cpus_per_rank=8"),
            command(speech, tmp_path / "gpu", "cluster.use_gpu=true"),
        ],
        cluster,
    )
    for result, message in ((few_cpus, "4 CPUs, this recipe needs 16.5"), (no_gpu, "0 GPUs")):
        assert result.returncode == 1
        line = result.stderr.strip().splitlines()[-1]
        assert line.startswith("error: the Ray cluster has")
        assert message in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train_manifest=nowhere.jsonl"], "nowhere.jsonl"),
        (["data.train_manifest=synthetic:nothing"], "synthetic:nothing"),
        (["run_dir=/proc/nothing/run"], "/proc/nothing"),
        (["teacher.kind=qwen3_asr"], "teacher.kind=qwen3_asr"),
        (["student.path=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    overrides: list[str], message: str, speech: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from opd.train import main

    assert main([*command(speech, tmp_path / "run")[3:], *overrides]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_print_config_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    from opd.train import main

    assert main(["recipe=ark3b", "print_config=true", "optim.lr=3e-6"]) == 0
    printed = capsys.readouterr().out
    assert "lr: 3.0e-06" in printed
    assert "# peak learning rate" in printed
