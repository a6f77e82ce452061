"""The main job, run for real: Ray, verl workers, FSDP2, the shipped seeds, killed and resumed, submitted as a Ray job."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from eventful_jobs import (
    NO_EVAL,
    PREEMPTED,
    Result,
    foreign_teacher,
    kill_twice,
    lose_a_rank,
    preempt,
    run_with_two_batch_sizes,
    spoilt_manifest,
    submit,
    submit_by_hand,
)
from main_job import ONE_RANK, ROOT, STEPS, command, environment, last_error, metrics, run
from safetensors.torch import load_file

from data.manifest import read_manifest
from opd import export
from opd.config import load_config
from opd.run import Run
from opd.train import main
from opd.training_data import TrainingData

NOT_FINITE = ["optim.lr=1e30", "optim.warmup_steps=0", "checkpoint.checkpoint_every=100", NO_EVAL, *ONE_RANK]
# A rate that changes nothing: the second evaluation is no better than the first, and patience is at its end.
STOP_EARLY = ["train.num_steps=5", "optim.lr=1e-12", "eval.eval_every=1", "eval.patience=1", *ONE_RANK]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the jobs below write."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def jobs(speech: dict[str, Path], cluster: dict[str, str], folder: Path) -> Iterator[dict[str, Future]]:
    """All runs of this module by name, three at a time: half of a start is waiting. The tests look at what came of them."""
    sft = [
        "train.num_steps=3",
        "cluster.ranks_per_node=1",
        "data.sorted_epochs=1",
        "eval.eval_every=2",
        "eval.patience=9",
    ]
    sft += [f"data.train_manifest={speech['train']}"]
    spoilt = ["cluster.ranks_per_node=1", "train.num_steps=14", "data.max_seconds=5", NO_EVAL]
    spoilt += [f"data.train_manifest={spoilt_manifest(speech, folder)}"]
    # The head is where Ray looks for one; nobody named it, so this run must start its own all the same.
    own_ray = environment(folder, RAY_TMPDIR=cluster["RAY_TMPDIR"])
    plans: dict[str, Callable[[], Result]] = {
        "unbroken": lambda: run(command(speech, folder / "unbroken", "wandb.mode=offline"), own_ray),
        "broken": lambda: kill_twice(command(speech, folder / "broken"), cluster, folder / "broken"),
        "zero": lambda: lose_a_rank(command(speech, folder / "zero", "engine=deepspeed"), cluster, folder / "zero"),
        "job": lambda: submit(command(speech, folder / "job", *STOP_EARLY), cluster),
        "relative": lambda: submit_by_hand(command(speech, Path("runs/x")), cluster),
        "sft": lambda: run(command(speech, folder / "sft", *sft, recipe="tiny_student"), cluster),
        "stop": lambda: run(command(speech, folder / "stop", *spoilt, recipe="tiny_student"), cluster),
        "skip": lambda: run(command(speech, folder / "skip", *spoilt, "data.on_bad_audio=skip"), cluster),
        "not_finite": lambda: run(command(speech, folder / "not_finite", *NOT_FINITE), cluster),
        "mixed": lambda: run_with_two_batch_sizes(speech, folder / "mixed", cluster),
        "preempted": lambda: preempt(command(speech, folder / "preempted", *PREEMPTED), cluster, folder / "preempted"),
        "few_cpus": lambda: run(command(speech, folder / "few_cpus", "cluster.cpus_per_rank=8"), cluster),
        "no_gpu": lambda: run(command(speech, folder / "no_gpu", "cluster.use_gpu=true"), cluster),
        "no_overlap": lambda: run(
            command(speech, folder / "no_overlap", *ONE_RANK, f"teacher.path={foreign_teacher(folder)}"), cluster
        ),
    }
    with ThreadPoolExecutor(3) as pool:
        yield {name: pool.submit(plan) for name, plan in plans.items()}
        pool.shutdown(cancel_futures=True)


def finished(jobs: dict[str, Future], name: str) -> Result:
    """What came of a run that must have ended well."""
    result = jobs[name].result()
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def test_a_run_ends_with_summary_table_export_and_metrics(
    jobs: dict[str, Future], folder: Path, speech: dict[str, Path]
) -> None:
    run_dir, printed = folder / "unbroken", finished(jobs, "unbroken").stdout
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
        assert line["align/retokenised_share"] == 0.0
        assert line["rollout/forwards"] <= line["rollout/tokens"]
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():  # `metrics` leaves times out
        line = json.loads(text)
        assert "loss/kl" not in line or 0 < line["time/overhead"] < line["time/step"]
    # The second epoch's drafts are the first's rollouts. (That they are saved is what a run that resumes bit-equal shows.)
    assert [line["rollout/accept_rate"] > 0.5 for line in steps] == [False] * 3 + [True] * 3
    assert sorted(p.name for p in (run_dir / "checkpoints").glob("step-*")) == ["step-000004", "step-000006"]
    assert list((run_dir / "wandb").glob("offline-run-*"))


def test_the_export_writes_the_same_transcripts_where_the_package_is_not_installed(
    jobs: dict[str, Future], folder: Path, speech: dict[str, Path], tmp_path: Path
) -> None:
    finished(jobs, "unbroken")
    run_dir = folder / "unbroken"
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


def test_help_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "print_config=true" in capsys.readouterr().out


def test_a_killed_run_resumes_bit_equal(jobs: dict[str, Future], folder: Path) -> None:
    """Also the proof that two runs of one seed are the same: all numbers but times are compared to the last digit."""
    finished(jobs, "unbroken")
    # A checkpoint is written beside training: the one of step 4 may not have been complete yet.
    assert re.search(r"going on after step [24] of 6", finished(jobs, "broken").stdout)
    expected = load_file(folder / "unbroken" / "export" / "model.safetensors")
    resumed = load_file(folder / "broken" / "export" / "model.safetensors")
    assert expected.keys() == resumed.keys()
    assert all(expected[name].equal(resumed[name]) for name in expected)
    assert metrics(folder / "broken") == metrics(folder / "unbroken")
    (restart,) = map(json.loads, (folder / "broken" / "restarts.jsonl").read_text().splitlines())
    assert re.match(r"step \d: student rank 1 \(pid \d+ on .*\) died during .* restart 1 of 3", restart["reason"])


def test_deepspeed_goes_on_from_its_checkpoint_with_the_losses_of_fsdp2(jobs: dict[str, Future], folder: Path) -> None:
    finished(jobs, "unbroken")
    printed = finished(jobs, "zero").stdout
    assert re.search(r"^going on after step [2-5] of 6$", printed, re.MULTILINE)
    own, other = (
        {line["step"]: line["loss/kl"] for line in metrics(folder / name) if "loss/kl" in line}
        for name in ("zero", "unbroken")
    )
    assert own == pytest.approx(other, rel=1e-4)
    files = json.loads((folder / "zero" / "checkpoints" / "step-000006" / "COMPLETE").read_text())["files"]
    assert {f"state/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)} < files.keys()


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_later(
    jobs: dict[str, Future], folder: Path, speech: dict[str, Path]
) -> None:
    """With schedule=one_step_off, where a rollout is in line that no checkpoint holds."""
    finished(jobs, "preempted")
    lines = metrics(folder / "preempted")
    steps = [line["step"] for line in lines if "loss/kl" in line]
    assert steps == list(range(1, 41)), "no step is lost, none is done twice"
    evaluated = [line["step"] for line in lines if "eval/wer/held_out" in line]
    assert evaluated == list(range(41)), "nor is an evaluation that a request to stop came before"
    rows = [json.loads(line) for line in (folder / "preempted" / "batches.jsonl").read_text().splitlines()]
    feed = TrainingData(load_config(["recipe=tiny", f"data.train_manifest={speech['unlabelled']}"])).feed
    assert [sorted(row["ids"]) for row in rows] == [sorted(u.id for u in feed.next_batch(8)) for _ in range(40)]


def test_a_ray_job_runs_as_the_readme_says(jobs: dict[str, Future], folder: Path) -> None:
    finished(jobs, "job")
    summary = json.loads((folder / "job" / "summary.json").read_text())
    assert (summary["steps"], summary["exported_step"]) == (2, 1), "stopped early, the better step is exported"
    relative = jobs["relative"].result()
    assert relative.returncode == 1
    assert "run_dir=runs/x: a Ray job runs in a temporary copy" in relative.stdout + relative.stderr
    script = run([str(ROOT / "scripts" / "submit.sh"), "recipe=tiny", "run_dir=runs/x"], dict(os.environ))
    assert script.returncode == 1
    assert "absolute path" in script.stderr


def test_what_a_job_left_goes_on_and_exports_outside_of_it(
    jobs: dict[str, Future], folder: Path, speech: dict[str, Path], tmp_path: Path
) -> None:
    """The job saw the project under another path. And what stopped early only lacks its end: it trains no more."""
    finished(jobs, "job")
    (folder / "job" / "summary.json").unlink()
    with Run.open(load_config(command(speech, folder / "job", *STOP_EARLY)[3:])) as again:
        assert again.step == 2
        assert not again.is_finished()
        assert list(again.steps_left()) == []
    assert export.main([f"run_dir={folder / 'job'}", f"out_dir={tmp_path / 'again'}"]) == 0


def test_sft_starts_from_nothing_and_export_runs_again(jobs: dict[str, Future], folder: Path, tmp_path: Path) -> None:
    finished(jobs, "sft")
    steps = [line for line in metrics(folder / "sft") if "loss/ce" in line]
    assert len(steps) == 3
    assert all(math.isfinite(line["loss/ctc"]) for line in steps)
    assert (folder / "sft" / "export" / "ctc_head.safetensors").is_file(), "for drafts of later rollouts"
    best = json.loads((folder / "sft" / "checkpoints" / "best.json").read_text())
    assert [step for step, _ in best["evals"]] == [2, 3], "with early stopping the last step competes too"
    assert export.main([f"run_dir={folder / 'sft'}", f"out_dir={tmp_path / 'again'}", f"step={best['step']}"]) == 0
    first = load_file(folder / "sft" / "export" / "model.safetensors")
    second = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    assert not any(name.startswith("ctc_head") for name in first)


def test_another_batch_size_and_number_of_ranks_go_on_with_the_next_utterance(
    jobs: dict[str, Future], folder: Path, speech: dict[str, Path]
) -> None:
    """From the ids that the run logged: none is skipped or repeated, in any of its sources."""
    printed = finished(jobs, "mixed").stdout
    assert "going on after step 4 of 6" in printed
    assert "train.batch_size was 8 and is now 12: going on with the utterance that comes next" in printed
    logged = [json.loads(line) for line in (folder / "mixed" / "batches.jsonl").read_text().splitlines()]
    assert [(row["step"], len(row["ids"])) for row in logged] == [(1, 8), (2, 8), (3, 8), (4, 8), (5, 12), (6, 12)]
    drawn = [name.split("/", 1) for row in logged for name in row["ids"]]
    train, evaluation = (
        [u.id for u in read_manifest(speech["train"])], [u.id for u in read_manifest(speech["eval"])],
    )  # fmt: skip
    for name, known in (("rows", train[:24]), ("stream", train[24:]), ("tar", evaluation)):
        ids = [utterance_id for source, utterance_id in drawn if source == name]
        assert len(ids) > 5
        # A batch is spread by length, so an epoch may end in the midst of one: how often each was drawn is what tells.
        times = Counter(dict.fromkeys(known, 0))
        times.update(ids)
        assert times.keys() == set(known)
        assert set(times.values()) <= {len(ids) // len(known), len(ids) // len(known) + 1}, (
            "none skipped, none repeated"
        )
        assert metrics(folder / "mixed")[-1][f"data/share/{name}"] == len(ids) / 56
    assert metrics(folder / "mixed")[-1]["data/bad_audio"] == 0


@pytest.mark.parametrize(
    "change",
    [
        "seed=1", "optim.lr=0.5", "train.num_steps=9", "loss.top_k=8", "rollout.temperature=1",
        "teacher.dtype=bfloat16",
    ],
)  # fmt: skip
def test_a_run_is_not_resumed_with_another_config(
    jobs: dict[str, Future], folder: Path, speech: dict[str, Path], change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finished(jobs, "unbroken")
    assert main([*command(speech, folder / "unbroken")[3:], change]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "this run cannot be resumed with a changed configuration: " + change.split("=")[0] + " was " in line


def test_bad_audio_stops_or_is_skipped_and_listed(jobs: dict[str, Future], folder: Path) -> None:
    assert "error: audio of utterance " in (line := last_error(jobs["stop"].result()))
    assert line.count(".wav") >= 1
    assert metrics(folder / "stop") == []
    # Four of eight: more than data.max_bad_share allows, which is looked at once a hundred utterances were seen.
    line = last_error(jobs["skip"].result())
    assert "50.0% of the utterances seen so far are bad audio, above data.max_bad_share=0.02" in line
    assert len(metrics(folder / "skip")) == 12
    listed = [json.loads(line) for line in (folder / "skip" / "bad_audio.jsonl").read_text().splitlines()]
    assert len(listed) == 4 * 13
    reasons = {Path(row["audio"]).stem: row["reason"] for row in listed}
    assert reasons.keys() == {"broken", "missing", "short", "long"}
    assert "is too short (0.0125 s, needs more than 0.0125 s)" in reasons["short"]
    assert "is too long (6.00 s, at most 5 s)" in reasons["long"]
    assert all("cannot be read" in reasons[name] for name in ("broken", "missing"))


def test_a_step_that_is_not_finite_stops_with_the_utterances(
    jobs: dict[str, Future], folder: Path, speech: dict[str, Path]
) -> None:
    line = last_error(jobs["not_finite"].result())
    assert "error: step 2: the loss or the gradient is not finite, nothing was updated" in line
    ids = [json.loads(row)["id"] for row in speech["unlabelled"].read_text().splitlines()]
    assert sum(f"{name}" in line for name in ids) >= 8
    assert not list((folder / "not_finite" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("few_cpus", "the Ray cluster has 8 CPUs, this recipe needs 16.5 (2 student ranks, 1 teacher workers)"),
        ("no_gpu", "the Ray cluster has 0 GPUs, this recipe needs 3"),
        ("no_overlap", "student and teacher share none of their "),
    ],
)
def test_what_only_the_cluster_or_the_models_can_tell_is_refused(
    jobs: dict[str, Future], folder: Path, name: str, message: str
) -> None:
    assert last_error(jobs[name].result()).startswith(f"error: {message}")
    assert metrics(folder / name) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?"),
        (["recipe=tinny"], "recipe=tinny: unknown recipe; there are ark06b, "),
        (["print_config=yes"], "print_config=yes: must be true or false"),
        (["data.train_manifest=nowhere.jsonl"], "manifest nowhere.jsonl cannot be read (No such file or directory)"),
        (["data.train_manifest=synthetic:nothing"], "synthetic:nothing"),
        (["run_dir=/proc/nothing/run"], "run_dir=/proc/nothing/run: it cannot be made or written"),
        (["teacher.kind=qwen3_asr"], "teacher.kind=qwen3_asr"),
        (["student.path=nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(
    overrides: list[str], message: str, speech: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(speech, tmp_path / "run")[3:], *overrides]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"audio": "a.wav"', ":1: not a JSON object in UTF-8"),
        ('{"text": "one"}', ":1: lacks `audio`"),
        ('{"audio": "a.wav", "task": "s2tt"}', ":1: `task` is 's2tt', but only 'asr' is supported"),
        ('{"audio": "a.wav", "begin_time": 3, "end_time": 1}', ":1: `begin_time` 3.0 is not before `end_time` 1.0"),
        ("", " has no utterances"),
    ],
)
def test_a_bad_manifest_is_one_line_with_its_place(
    content: str, message: str, speech: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = tmp_path / "bad.jsonl"
    manifest.write_text(content)
    assert main([*command(speech, tmp_path / "run")[3:], f"data.train_manifest={manifest}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert f"{manifest}{message}" in line


def test_the_run_directory_of_another_recipe_is_refused(
    jobs: dict[str, Future], folder: Path, speech: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    finished(jobs, "unbroken")
    assert main(command(speech, folder / "unbroken", recipe="tiny_student")[3:]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "this run belongs to recipe 'tiny', not to 'tiny_student'; choose another run_dir" in line


def test_print_config_runs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe=ark3b", "print_config=true", "optim.lr=3e-6"]) == 0
    printed = capsys.readouterr().out
    assert "lr: 3.0e-06" in printed
    assert "# peak learning rate" in printed
