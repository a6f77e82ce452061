"""The doctor on a good set-up and on broken ones: each fault is named with its fix, and hides no other."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from main_job import ONE_RANK, ROOT, command, run

from data.manifest import read_manifest
from opd.checkpoint import RunDir
from opd.config import load_config
from opd.doctor import manifests, static
from opd.doctor.cost import check_expected_memory
from opd.doctor.examined import Examined
from opd.doctor.report import Check, Finding, examine
from opd.model_sizes import student_sizes
from opd.resolve import portable, resolve

Table = dict[str, tuple[str, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("doctor")


@pytest.fixture(scope="module")
def visits(speech: dict[str, Path], cluster: dict[str, str], folder: Path) -> Iterator[dict[str, Future]]:
    """All calls of the command by name: a good set-up, one with five faults at once, and one that is too large."""
    broken = [
        f"teacher.path={foreign_teacher(folder)}", f"data.train_manifest={spoilt_manifest(speech, folder)}",
        f"data.eval_manifests={{held_out: {speech['unlabelled']}}}", "export.push=some/name", *ONE_RANK,
    ]  # fmt: skip
    with_hub = cluster | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf")}
    large = ["cluster.ranks_per_node=40", "train.batch_size=80"]
    with ThreadPoolExecutor(2) as pool:
        yield {
            "good": pool.submit(visit, speech, folder / "good", cluster),
            "broken": pool.submit(visit, speech, folder / "broken", with_hub, *broken),
            "large": pool.submit(visit, speech, folder / "large", cluster, *large),
        }


def visit(
    speech: dict[str, Path], run_dir: Path, env: dict[str, str], *overrides: str
) -> subprocess.CompletedProcess[str]:
    arguments = command(speech, run_dir, *overrides)
    arguments[arguments.index("opd.train")] = "opd.doctor"
    return run(arguments, env)


def table(printed: str) -> Table:
    """check -> (result, what was found and how to fix it), from what was printed."""
    rows: dict[str, list[str]] = {}
    name = ""
    for line in printed.splitlines():
        if line.startswith("│"):
            check, result, text = (cell.strip() for cell in line.strip("│").split("│"))
            name = check or name
            row = rows.setdefault(name, [result, ""])
            row[1] = f"{row[1]} {text}".strip()
    return {name: (result, text) for name, (result, text) in rows.items()}


def foreign_teacher(folder: Path) -> Path:
    """The tiny teacher with another name for each token of more than one byte, so that it shares few with the student."""
    shutil.copytree(ROOT / "seeds" / "tiny_teacher", folder / "foreign")
    path = folder / "foreign" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = {token if len(token) == 1 else f"~{token}~": i for token, i in content["model"]["vocab"].items()}
    content["model"] |= {"vocab": vocab, "merges": []}
    path.write_text(json.dumps(content))
    return folder / "foreign"


def spoilt_manifest(speech: dict[str, Path], folder: Path) -> Path:
    """Eight utterances, of which the file of one is no audio and that of another is missing."""
    (folder / "corrupt.wav").write_bytes(b"RIFFnothing")
    rows = [json.loads(line) for line in speech["unlabelled"].read_text().splitlines()][:8]
    for row, name in zip(rows, ("corrupt", "missing", *[None] * 6), strict=True):
        row["audio"] = str(folder / f"{name}.wav" if name else speech["unlabelled"].parent / row["audio"])
    (folder / "spoilt.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "spoilt.jsonl"


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_good_set_up_is_ok_in_every_row_and_nothing_is_written(visits: dict[str, Future], folder: Path) -> None:
    result = visits["good"].result()
    assert result.returncode == 0, result.stdout + result.stderr
    found = table(result.stdout)
    statuses = {name: status for name, (status, _) in found.items()}
    # The machine may have fewer cores than threads; all else has to be ok.
    assert {name for name, status in statuses.items() if status != "ok"} <= {"devices", "this environment"}, (
        result.stdout
    )
    later = {"a step", "time", "expected memory", "measured memory", "identity"}
    assert later | {"student", "teacher", "teacher's scores", "vocabulary"} <= found.keys()
    assert not (folder / "good").exists()
    identity = re.search(r"against itself is (\S+)", found["identity"][1])
    assert identity is not None
    assert abs(float(identity[1])) < 1e-6
    step = re.search(r"4 utterances, (\d+) positions: loss (\S+), gradient norm (\S+);", found["a step"][1])
    assert step is not None, found["a step"]
    assert int(step[1]) > 4
    assert float(step[2]) > 1e-4, "this teacher is another model"
    assert re.search(
        r"s a step of 8 utterances \(rollout .*, teacher .*, update .*\), from one of 4; 6 steps", found["time"][1]
    )
    assert "GB a student rank" in found["measured memory"][1]
    assert "this run can work here" in result.stdout


def test_five_faults_are_named_in_one_table_and_what_does_not_depend_on_them_is_looked_at(
    visits: dict[str, Future], folder: Path
) -> None:
    result = visits["broken"].result()
    assert result.returncode == 1
    found = table(result.stdout)
    failed = {name for name, (status, _) in found.items() if status == "fail"}
    assert failed == {"training audio", "evaluation manifests", "accounts", "vocabulary"}, result.stdout
    assert {found[name][0] for name in ("student", "teacher", "a step", "identity", "run directory")} == {"ok"}
    audio = found["training audio"][1].replace(" ", "")
    assert "8utterancesdecoded,2cannotbeused(25.0%)" in audio
    assert f"{folder}/corrupt.wav" in audio
    assert f"{folder}/missing.wav" in audio
    assert "fix:mendorremovethesefiles" in audio
    assert re.search(
        r":1: this set needs a transcript.*fix: .*every line needs a `text`", found["evaluation manifests"][1]
    )
    assert re.search(r"push=some/name: there is no token.*fix: .*HF_TOKEN", found["accounts"][1])
    assert re.search(
        r"of the response positions map.*below teacher.min_coverage=0.9.*fix: a teacher with a closer tokenizer",
        found["vocabulary"][1],
    )
    assert "this run cannot work here: training audio, evaluation manifests, accounts, vocabulary" in result.stdout


def test_too_many_ranks_for_the_cluster_skip_the_workers_with_the_reason(visits: dict[str, Future]) -> None:
    result = visits["large"].result()
    assert result.returncode == 1
    found = table(result.stdout)
    assert {name for name, (status, _) in found.items() if status == "fail"} == {"resources"}
    assert re.search(r"has 8 CPUs, this recipe needs 20.5 .*change cluster.ranks_per_node", found["resources"][1])
    for name in ("student", "teacher", "identity"):
        assert found[name][0] == "skipped"
    assert found["student"][1] == "needs what failed: resources"
    assert found["disk"][0] == "ok"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=tiny", "optim.lrr=1"], "unknown key optim.lrr; did you mean optim.lr?"),
        (["recipe=tiny_ladder", "stages=[nope]"], "stages: nope is no kind of stage"),
        (["recipe=tiny_compare", "compare={arms:{a:{x:1}}}"], "compare.seeds is missing"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_row(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from opd.doctor.__main__ import main

    assert main(arguments) == 1
    found = table(capsys.readouterr().out)
    assert found["config"][0] == "fail"
    assert message in found["config"][1]
    assert "fix: print_config=true" in found["config"][1]
    assert found["all others"] == ("skipped", "needs what failed: config")
    for arguments in (["optim.lr=1"], ["recipe=tinyy"]):
        assert main(arguments) == 1
        found = table(capsys.readouterr().out)
        assert "tiny_teacher" in found["config"][1]
        assert "fix:" not in found["config"][1]


# -- one check at a time -----------------------------------------------------------------------------------------------


def findings(look: list[Callable], speech: dict[str, Path], tmp_path: Path, *overrides: str) -> list[Finding]:
    """Findings of these checks of CHECKS, in order."""
    arguments = command(speech, tmp_path / "run", *overrides)[3:]
    examined = Examined(load_config(arguments, check=False), tmp_path / "scratch")
    checks = [check for check in static.CHECKS if check.look in look]
    examine(checks, examined, examined.findings)
    assert len(examined.findings) == len(look)
    return list(examined.findings.values())


@pytest.mark.parametrize(
    ("look", "overrides", "found", "fix"),
    [
        (
            static.check_config, ["train.batch_size=7"],
            "train.batch_size=7 does not divide over 2 ranks", "change this value",
        ),
        (
            static.check_teacher_path, ["teacher.path=seeds/nowhere/x"],
            "teacher.path=seeds/nowhere/x: there is no such folder", "set teacher.path",
        ),
        (
            static.check_teacher_path, ["teacher.path=seeds/tiny_teachr"],
            "teacher.path=seeds/tiny_teachr: no such folder", "beside it: seeds/tiny_teacher, seeds/",
        ),
        (
            static.check_student, ["student.path=tests/nowhere"],
            "student.path=tests/nowhere: no such folder", "tests: set student.path",
        ),
        (
            static.check_teacher_path, ["teacher.path=nobody/model-that-is-not-here"],
            "not on this machine yet", "hf download nobody/model-that-is-not-here",
        ),
        (
            static.check_teacher_environment, ["teacher.python_path=nowhere/python"],
            "teacher.python_path=nowhere/python: there is no such interpreter", "make teacher-env",
        ),
        (
            static.check_teacher_environment, ["teacher.kind=qwen3_asr"],
            "teacher.kind=qwen3_asr needs transformers 5.13 or newer", "teacher.python_path=.venv-teacher/bin/python",
        ),
        (static.check_run_dir, ["run_dir=/proc/nothing/run"], "/proc cannot be written", "choose a run_dir"),
        (manifests.check_train_manifest, ["data.train_manifest=nowhere.jsonl"], "nowhere.jsonl cannot be read", "correct"),
        (
            static.check_devices, ["student.attn_implementation=flash_attention_2"],
            "flash-attn is not installed here", "student.attn_implementation=sdpa",
        ),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_fix(
    look: Callable, overrides: list[str], found: str, fix: str, speech: dict[str, Path], tmp_path: Path
) -> None:
    (finding,) = findings([look], speech, tmp_path, *overrides)
    assert finding.status == "fail"
    assert found in finding.found
    assert fix in finding.fix


def test_a_teacher_in_an_environment_with_another_torch_is_named(speech: dict[str, Path], tmp_path: Path) -> None:
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    from opd.teachers.environment import PACKAGES, versions_of

    site = next((environment / "lib").glob("python*")) / "site-packages"
    for name, version in (versions_of(PACKAGES) | {"torch": "2.12.1"}).items():
        if name != "python":
            (site / f"{name}-{version}.dist-info").mkdir()
            record = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            (site / f"{name}-{version}.dist-info" / "METADATA").write_text(record)
    key = f"teacher.python_path={environment / 'bin' / 'python'}"
    (finding,) = findings([static.check_teacher_environment], speech, tmp_path, key)
    assert finding.status == "fail"
    assert f"has torch 2.12.1 instead of {torch.__version__.partition('+')[0]}" in finding.found
    assert "make teacher-env" in finding.fix


def test_a_language_that_the_teacher_does_not_know_is_named(speech: dict[str, Path], tmp_path: Path) -> None:
    rows = [json.loads(line) | {"language": "Slovak"} for line in speech["train"].read_text().splitlines()]
    (tmp_path / "slovak.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["teacher.kind=qwen3_asr", f"data.train_manifest={tmp_path / 'slovak.jsonl'}"]
    _, finding = findings([manifests.check_train_manifest, manifests.check_languages], speech, tmp_path, *options)
    assert finding.status == "fail"
    assert re.search(r"utterance '.*': language 'Slovak' is not one that this teacher knows", finding.found)
    assert "data.default_language" in finding.fix


def test_a_route_that_takes_no_line_is_a_warning(speech: dict[str, Path], tmp_path: Path) -> None:
    options = ["teacher.routes={calls: {match: {task: call}}, rest: {}}"]
    *_, finding = findings([manifests.check_train_manifest, manifests.check_languages], speech, tmp_path, *options)
    assert finding.status == "warning"
    assert finding.found.startswith("teacher.routes.calls has no utterance to score")


def test_a_language_without_rules_is_a_warning(speech: dict[str, Path], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in speech["train"].read_text().splitlines()]
    rows[0]["language"] = "Klingon"
    for row in rows:
        row["audio"] = str(speech["train"].parent / row["audio"])
    (tmp_path / "klingon.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"data.eval_manifests={{held_out: {tmp_path / 'klingon.jsonl'}}}"]
    looks = [manifests.check_train_manifest, manifests.check_eval_manifests, manifests.check_languages]
    *_, finding = findings(looks, speech, tmp_path, *options)
    assert finding.status == "warning"
    assert finding.found == "no rules for Klingon: such transcripts are compared by opd-basic-1"


def test_checkpoints_that_no_disk_can_hold_are_named(speech: dict[str, Path], tmp_path: Path) -> None:
    """A student of 10^13 parameters: only its config is read for its size."""
    shutil.copytree(ROOT / "seeds" / "tiny_student", tmp_path / "huge")
    config = json.loads((tmp_path / "huge" / "config.json").read_text())
    (tmp_path / "huge" / "config.json").write_text(json.dumps(config | {"vocab_size": 10**11}))
    look = [static.check_student, static.check_run_dir, static.check_disk]
    path, _, disk = findings(look, speech, tmp_path, f"student.path={tmp_path / 'huge'}")
    assert path.status == "ok"
    assert disk.status == "fail"
    assert re.search(r"GB free in .*, .*need about \d{6,}", disk.found.replace(";", ","))
    assert "lower checkpoint.keep_last" in disk.fix


@pytest.mark.parametrize(
    ("overrides", "trained", "frozen"),
    [
        ([], 12, 4),
        (["engine=deepspeed", "zero.stage=2"], 16, 4),
        (["engine=deepspeed", "zero.stage=1", "student.dtype=bfloat16"], 14, 2),
        (["engine=deepspeed", "zero.stage=3", "student.dtype=bfloat16"], 12, 2),
    ],
)
def test_bytes_of_a_checkpoint_by_engine(overrides: list[str], trained: int, frozen: int) -> None:
    """Bytes of each weight; docs/engines.md has measured 0.7 GB (FSDP2, stage 3) and 0.9 GB of 59 M in float32."""
    config = load_config(["recipe=tiny", "student.freeze=[encoder]", *overrides])
    sizes = student_sizes(config)
    expected = trained * sizes.num_trained + frozen * (sizes.num_parameters - sizes.num_trained)
    assert static.checkpoint_bytes(config, sizes) == expected


def test_memory_that_nothing_estimates_is_a_warning(speech: dict[str, Path], tmp_path: Path) -> None:
    config = load_config([*command(speech, tmp_path / "run")[3:], "engine=deepspeed"])
    finding = check_expected_memory(Examined(config, tmp_path))
    assert isinstance(finding, Finding)
    assert (finding.status, finding.found) == ("warning", "there is no estimate for engine=deepspeed")


def test_a_foreign_or_busy_run_directory_is_named(speech: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("mine")
    (finding,) = findings([static.check_run_dir], speech, tmp_path)
    assert finding.status == "fail"
    assert "the directory is not empty and is no run directory" in finding.found
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["letter.txt"]


def test_a_run_directory_that_is_there_is_compared_with_the_config(speech: dict[str, Path], tmp_path: Path) -> None:
    relative = f"data.train_manifest={os.path.relpath(speech['unlabelled'])}"  # the run saves it as an absolute path
    config = load_config([*command(speech, tmp_path / "run")[3:], relative])
    saved = RunDir.open(tmp_path / "run", portable(resolve(config).to_dict()))
    saved.begin_save(2)
    saved.commit_save(2, {})
    (busy,) = findings([static.check_run_dir], speech, tmp_path)
    assert busy.status == "fail"
    assert re.search(r"another driver \(pid \d+ on .*\) writes this run", busy.found)
    saved.close()
    (good,) = findings([static.check_run_dir], speech, tmp_path, relative)
    assert good == Finding("ok", f"{tmp_path / 'run'} is there and goes on after step 2")
    (changed,) = findings([static.check_run_dir], speech, tmp_path, "optim.lr=0.5")
    assert changed.status == "fail"
    assert "optim.lr was 0.001, is now 0.5" in changed.found
    assert "or a new one" in changed.fix


def test_bad_audio_within_its_share_is_a_warning(speech: dict[str, Path], tmp_path: Path) -> None:
    look = [manifests.check_train_manifest, manifests.check_train_audio]
    options = [f"data.train_manifest={spoilt_manifest(speech, tmp_path)}", "data.on_bad_audio=skip"]
    assert findings(look, speech, tmp_path, *options)[1].status == "fail"
    assert findings(look, speech, tmp_path, *options, "data.max_bad_share=0.5")[1].status == "warning"


def test_audio_that_blocks_is_named(speech: dict[str, Path], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.wav")
    first, second, *_ = read_manifest(speech["train"])
    waiting = dataclasses.replace(second, audio=str(tmp_path / "pipe.wav"))
    with pytest.raises(ValueError, match=rf"2 files were not read within 0.5 s.*{waiting.id}.*pipe.wav"):
        manifests.decoded([first, waiting], 30.0, limit_s=0.5)
    with open(tmp_path / "pipe.wav", "wb"):  # lets the reader go
        pass


def test_the_sample_runs_through_the_whole_manifest(speech: dict[str, Path]) -> None:
    utterances = read_manifest(speech["train"])
    chosen = manifests.spread(utterances, 5)
    assert [u.id for u in chosen] == [utterances[i].id for i in (0, 12, 24, 35, 47)]
    assert len(manifests.spread(utterances, 500)) == len(utterances)


def test_a_check_that_fails_hides_only_those_that_need_it() -> None:
    def fail(_: object) -> str:
        raise KeyError("x")

    found: dict[str, Finding] = {}
    checks = [
        Check("a", fail, fix="mend a"),
        Check("b", lambda _: "fine"),
        Check("c", lambda _: "fine", ("a",)),
        Check("d", lambda _: "fine", ("c",)),
        Check("e", lambda _: None),
        Check("f", lambda _: Finding("warning", "hm", "do"), ("e", "b")),
    ]
    examine(checks, None, found)
    assert found == {
        "a": Finding("fail", "KeyError: 'x'", "mend a"),
        "b": Finding("ok", "fine"),
        "c": Finding("skipped", "needs what failed: a"),
        "d": Finding("skipped", "needs what failed: c"),
        "f": Finding("warning", "hm", "do"),
    }
