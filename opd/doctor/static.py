"""What can be said before anything is started: config, environments, devices, models, disk, accounts; and all CHECKS."""

from __future__ import annotations

import dataclasses
import difflib
import fcntl
import os
import shutil
import sys
import tempfile
import tomllib
from importlib import metadata, util
from pathlib import Path
from typing import Any

import psutil
import torch
from packaging.requirements import Requirement

from opd.checkpoint import CONFIG_FILE, LOCK_FILE, RunDir
from opd.config import PROJECT_ROOT, resolve_path
from opd.doctor.examined import GB, Examined
from opd.doctor.manifests import check_eval_manifests, check_languages, check_train_audio, check_train_manifest
from opd.doctor.report import Check, Finding
from opd.hub import check_push
from opd.metrics import has_wandb_key
from opd.model_sizes import StudentSizes, student_sizes
from opd.resolve import portable, resolve, resolve_model, resolve_teacher, with_run_dir
from opd.schema import FROZEN_KEYS, Config
from opd.teachers.environment import check_environments
from opd.validate import validate

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check_config(examined: Examined) -> Finding | str:
    """Values that cannot be run, as the run itself refuses them."""
    for part in examined.parts:
        validate(part)
    config = examined.config
    said = f"stage {config.stage}, {config.num_ranks} student ranks, {config.num_teachers} teacher workers"
    if len(examined.parts) > 1:
        return Finding(
            "warning",
            f"this config stands for {len(examined.parts)} runs; the first is looked at: {said}",
            "look at another with its own stage and paths: stages=[] stage=opd student.path=...",
        )
    return said


# -- environments and devices ------------------------------------------------------------------------------------------


def check_packages(_: Any) -> Finding | str:
    """The packages that pyproject.toml asks for, in this environment."""
    project = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    missing, other = [], []
    for requirement in map(Requirement, project["dependencies"]):
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(str(requirement))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            other.append(f"{requirement.name} {version} instead of {requirement.specifier}")
    install = "install what the project asks for: pip install -e . (make env does it in .venv)"
    if missing:
        return Finding("fail", f"{sys.executable} lacks {', '.join(missing)}", install)
    if other:
        return Finding("warning", f"{sys.executable} has {', '.join(other)}", install)
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "ray", "verl"))
    return f"Python {sys.version.split()[0]}, {shown}"


def check_teacher_environment(examined: Examined) -> str | None:
    """The interpreter of teacher.python_path, as a run looks at it."""
    if not examined.with_teacher:
        return None
    versions = check_environments(examined.config.teacher.by_route())
    if not versions:
        return "the teacher runs in this environment"
    return "; ".join(f"{path}: torch {v['torch']}, transformers {v['transformers']}" for path, v in versions.items())


def check_devices(examined: Examined) -> Finding | str:
    """Cores, memory and GPUs of this machine."""
    config = examined.config
    for key in ("student", "teacher"):
        wanted = getattr(config, key).attn_implementation
        in_this = key == "student" or (examined.with_teacher and config.teacher.python_path is None)
        if wanted == "flash_attention_2" and in_this and util.find_spec("flash_attn") is None:
            return Finding(
                "fail", f"{key}.attn_implementation={wanted}: flash-attn is not installed here",
                f"pip install flash-attn --no-build-isolation, or set {key}.attn_implementation=sdpa",
            )  # fmt: skip
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    here = f"{cores} cores, {memory.available / GB:.1f} of {memory.total / GB:.1f} GB memory free"
    if config.cluster.use_gpu:
        if torch.version.cuda is None and torch.version.hip is None:
            return Finding(
                "fail", f"cluster.use_gpu=true, but torch {torch.__version__} is a build for CPU",
                "install the build of torch for your CUDA (README, On a GPU host), or set cluster.use_gpu=false",
            )  # fmt: skip
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return f"{here}; GPUs here: {', '.join(names) or 'none (the cluster may have them on other nodes)'}"
    busy = max(
        config.cluster.ranks_per_node * config.cluster.threads_per_rank,
        config.num_teachers * config.cluster.threads_per_teacher // config.cluster.num_nodes
        if examined.with_teacher
        else 0,
    )
    if busy > cores:
        return Finding(
            "warning", f"{here}; up to {busy} threads compute at once, which wait for each other",
            "lower cluster.ranks_per_node, cluster.threads_per_rank, num_teachers or threads_per_teacher",
        )  # fmt: skip
    return here


# -- models ----------------------------------------------------------------------------------------------


def check_student(examined: Examined) -> Finding | str:
    """The student's folder, and its size from its config."""
    config = examined.config
    path = config.student.path
    if path:
        path = resolve_model("student.path", path, Path(str(with_run_dir(config).run_dir)))
        if not Path(path).is_dir() and not _is_cached(path):
            return _not_there("student.path", path)
        config = dataclasses.replace(config, student=dataclasses.replace(config.student, path=path))
        examined.student_path = path
    examined.sizes = student_sizes(config)
    return f"{path or 'a fresh one, by student.init'}, {examined.sizes.num_parameters:,} parameters"


def check_teacher_path(examined: Examined) -> Finding | str | None:
    """The folder of each teacher, and that it is of the kind that it is given as."""
    if not examined.with_teacher:
        return None
    run_dir = Path(str(with_run_dir(examined.config).run_dir))
    for name, teacher in examined.config.teacher.by_route().items():
        key = f"teacher.routes.{name}.path" if name else "teacher.path"
        path = resolve_teacher(name, teacher, run_dir)
        if not Path(path).is_dir() and not _is_cached(path):
            return _not_there(key, path)
        examined.teacher_paths[name] = path
    return ", ".join(examined.teacher_paths.values())


def _is_cached(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, "config.json"), str)


def _not_there(key: str, path: str) -> Finding:
    """Of owner/name: a Hub id, or a mistyped folder where `owner` is a folder here."""
    parent = Path(resolve_path(str(Path(path).parent)))
    if parent.is_dir():
        names = sorted(entry.name for entry in parent.iterdir() if (entry / "config.json").is_file())
        close = difflib.get_close_matches(Path(path).name, names, n=len(names) or 1, cutoff=0.0)
        there = ", ".join(f"{path.rpartition('/')[0]}/{name}" for name in close[:5])
        fix = f"set {key} to one of the checkpoints beside it: {there}"
        if not there:
            fix = f"there is no checkpoint in {parent}: set {key} to another folder"
        return Finding("fail", f"{key}={path}: no such folder", fix)
    return Finding(
        "fail", f"{key}={path}: not on this machine yet, so the step cannot be tried",
        f"hf download {path} (on every node, or into a folder that all see), then look again",
    )  # fmt: skip


# -- disk and accounts -------------------------------------------------------------------------------------------------


def standing(path: Path) -> Path:
    """The path itself or the nearest folder above it that is there."""
    return next(parent for parent in (path, *path.parents) if parent.exists())


def check_run_dir(examined: Examined) -> str:
    """Can be made or written, is no other run's, and nobody writes it now. Leaves nothing there."""
    config = with_run_dir(examined.config)
    path = Path(str(config.run_dir))
    place = standing(path)
    try:
        with tempfile.TemporaryFile(dir=place):
            pass  # without a name: nothing is to be seen of it
    except OSError as error:
        raise ValueError(f"run_dir={path}: {place} cannot be written ({error.strerror})") from error
    if place != path:
        return f"{path} can be made"
    if any(path.iterdir()) and not (path / CONFIG_FILE).exists():
        raise ValueError(f"run_dir={path}: the directory is not empty and is no run directory")
    if (path / LOCK_FILE).exists():
        with open(path / LOCK_FILE, encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"run_dir={path}: another driver ({lock.read().strip()}) writes this run") from error
    try:
        config = resolve(config)  # what the run saves, and compares
    except ValueError as error:
        raise ValueError(f"run_dir={path}: cannot be compared with this config ({error})") from error
    run_dir = RunDir(path, portable(config.to_dict()), config.checkpoint.keep_last, None)
    run_dir.check_saved_config(config.resume, FROZEN_KEYS, Config().to_dict())
    step = run_dir.latest()
    return f"{path} is there" + (f" and goes on after step {step}" if step else "")


def checkpoint_bytes(config: Config, sizes: StudentSizes) -> float:
    """Of one checkpoint: float32 weights and two moments of what is trained, and the weights that are not.

    DeepSpeed holds those in the compute type; at stages 1 and 2 it writes what is trained in that type, too.
    """
    frozen = sizes.num_parameters - sizes.num_trained
    trained = 12.0 * sizes.num_trained
    if config.engine == "fsdp2":
        return trained + 4.0 * frozen
    compute = BYTES[config.student.dtype]
    return trained + compute * (frozen if config.zero.stage == 3 else sizes.num_parameters)


def disk_needed(config: Config, sizes: StudentSizes) -> float:
    """Bytes of each checkpoint that is kept or being written, and of the export."""
    kept = config.checkpoint.keep_last + 1 + bool(config.data.eval_manifests and config.eval.eval_every)
    return kept * checkpoint_bytes(config, sizes) + sizes.num_parameters * BYTES[config.export.dtype]


def check_disk(examined: Examined) -> Finding | str:
    """Room for the checkpoints of the run and its export."""
    assert examined.sizes is not None, "the student was looked at"
    config = with_run_dir(examined.config)
    place = standing(Path(str(config.run_dir)))
    needed, free = disk_needed(config, examined.sizes), shutil.disk_usage(place).free
    said = (
        f"{free / GB:.2f} GB free in {place}; checkpoints (keep_last={config.checkpoint.keep_last} and the next) and export "
        f"need about {needed / GB:.2f} GB"
    )
    fix = "free space, choose a run_dir on a larger disk, or lower checkpoint.keep_last"
    if free < needed:
        return Finding("fail", said, fix)
    return Finding("warning", f"{said}, more than half of it", fix) if free < 2 * needed else said


def check_accounts(examined: Examined) -> Finding | str:
    """The Hub, where the export is pushed to it, and W&B."""
    export, wandb = examined.config.export, examined.config.wandb
    pushed = "nothing is pushed to the Hub"
    if export.push:
        check_push(export.push, export.private)
        pushed = f"{export.push} can be pushed to"
    if wandb.mode == "online" and not has_wandb_key():
        return Finding(
            "warning", f"{pushed}; wandb.mode=online without an API key: the run is logged offline",
            "set WANDB_API_KEY, or wandb.mode=offline",
        )  # fmt: skip
    return f"{pushed}; W&B {wandb.mode}"


CHECKS = [
    Check("config", check_config, fix="change this value in the recipe or on the command line"),
    Check(
        "teacher's environment", check_teacher_environment,
        fix="make teacher-env, then teacher.python_path=.venv-teacher/bin/python",
    ),
    Check("devices", check_devices),
    Check("student's path", check_student, fix="set student.path to the folder of an ARK-ASR checkpoint, or to its Hub id"),
    Check("teacher's path", check_teacher_path, fix="set teacher.path to the folder of a checkpoint, or to its Hub id"),
    Check("training manifest", check_train_manifest, fix="correct the manifest (python -m data.validate) or its path"),
    Check("training audio", check_train_audio, ("training manifest",), "put audio on storage that answers at once"),
    Check(
        "evaluation manifests", check_eval_manifests,
        fix="correct data.eval_manifests: every line needs a `text`; leave a set without references out",
    ),
    Check(
        "languages", check_languages, ("training manifest",),
        fix="give lines a `language` that the teacher knows, set data.default_language, or teacher.language=auto",
    ),
    Check("run directory", check_run_dir, fix="choose a run_dir in a place that can be written, or a new one"),
    Check("disk", check_disk, ("student's path", "run directory")),
    Check("accounts", check_accounts, fix="log in with `hf auth login` or set HF_TOKEN; or set export.push=null"),
]  # fmt: skip
