"""What a recipe names -> absolute paths: run directory, models, manifests. Synthetic speech is made where it is missing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.sound import HUGGINGFACE_PREFIX
from opd.config import PROJECT_ROOT, SYNTHETIC_PREFIX, resolve_path
from opd.schema import Config, TeacherConfig

RECORDINGS_PREFIX = "recordings:"
OWN_KINDS = ("arkasr", "qwen3_asr")  # teacher.kind of models that have one of their own; it is their model_type
STAGE_PREFIX = "stage:"  # in a ladder or a comparison: what another stage of the same made


def in_ray_job() -> bool:
    """Whether this driver was started by `ray job submit` (its working directory is then a temporary copy)."""
    return bool(os.environ.get("RAY_JOB_SUBMISSION_ID") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def resolve(config: Config) -> Config:
    """The config with absolute paths: run directory, models and manifests; synthetic sets are made where missing."""
    config = with_run_dir(config)
    run_dir = Path(str(config.run_dir))
    student, teacher, data = config.student, config.teacher, config.data
    if student.path:
        student = dataclasses.replace(student, path=resolve_model("student.path", student.path, run_dir))
    if config.stage != "sft":
        teacher = resolve_teachers(teacher, run_dir)
    if data.train_manifest and data.train_manifest.startswith(STAGE_PREFIX):
        data = dataclasses.replace(data, train_manifest=_stage_manifest(data.train_manifest, run_dir))
    several = {name: str(source["path"]) for name, source in data.train_manifests.items()}
    names = [*filter(None, [data.train_manifest]), *several.values(), *data.eval_manifests.values()]
    manifests = resolve_manifests(names, recordings=data.recordings, held_out_speakers=data.held_out_speakers)
    data = dataclasses.replace(
        data,
        recordings=data.recordings and resolve_path(data.recordings),
        train_manifest=data.train_manifest and manifests[data.train_manifest],
        train_manifests={
            name: {**source, "path": manifests[several[name]]} for name, source in data.train_manifests.items()
        },
        eval_manifests={name: manifests[path] for name, path in data.eval_manifests.items()},
    )
    return dataclasses.replace(config, student=student, teacher=teacher, data=data)


def portable(values: dict[str, Any]) -> dict[str, Any]:
    """A config dictionary as a run directory keeps it: paths inside the project relative to it, all others as they are.

    A Ray job sees the project in a temporary copy, under another name each time: what is saved must not depend on it.
    """

    def relative(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: inner if key == "run_dir" else relative(inner) for key, inner in value.items()}
        inside = isinstance(value, str) and Path(value).is_absolute() and Path(value).is_relative_to(PROJECT_ROOT)
        return str(Path(value).relative_to(PROJECT_ROOT)) if inside else value

    return relative(values)


def absolute(values: dict[str, Any]) -> dict[str, Any]:
    """The opposite of `portable`: what is there inside the project by its absolute path, all else (Hub ids) as it is."""

    def whole(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: whole(inner) for key, inner in value.items()}
        inside = isinstance(value, str) and "/" in value and os.path.exists(PROJECT_ROOT / value)
        return str(PROJECT_ROOT / value) if inside else value

    return whole(values)


def with_run_dir(config: Config) -> Config:
    """The config with an absolute run directory, the default one where it names none."""
    run_dir = config.run_dir or f"runs/{config.recipe_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if in_ray_job() and not Path(run_dir).expanduser().is_absolute():
        raise ValueError(
            f"run_dir={run_dir}: a Ray job runs in a temporary copy of the working directory, where a relative run "
            "directory would be lost; give an absolute path"
        )
    return dataclasses.replace(config, run_dir=str(Path(run_dir).expanduser().resolve()))


def _stage_manifest(name: str, run_dir: Path) -> str:
    """The teacher data that a stage beside this one wrote."""
    path = run_dir.parent / name.removeprefix(STAGE_PREFIX) / "td" / "manifest.jsonl"
    if not path.is_file():
        raise ValueError(f"data.train_manifest={name}: there is no {path}; that stage must come before, with stage: td")
    return str(path)


def resolve_manifests(
    names: list[str], *, recordings: str | None = None, held_out_speakers: Sequence[str] = ()
) -> dict[str, str]:
    """Manifest names of a recipe -> absolute paths; what is made here is made first, where it is missing.

    `synthetic:NAME` is a set of data/synthetic.py or data/sentence_sets.py; `recordings:NAME` one of data/recordings.py,
    made from the folder or tar file `recordings`. Raises ValueError for unknown sets and what cannot be made.
    """
    made = _make_synthetic([name for name in names if name.startswith(SYNTHETIC_PREFIX)])
    recorded = [name for name in names if name.startswith(RECORDINGS_PREFIX)]
    if recorded:
        made |= _make_recorded(recorded, recordings, held_out_speakers)
    return {name: str(made[name]) if name in made else _resolve_source(name) for name in names}


def _resolve_source(name: str) -> str:
    """A manifest's path, or the name of a Hugging Face data set with the path in it."""
    if not name.startswith(HUGGINGFACE_PREFIX):
        return resolve_path(name)
    path, mark, query = name.removeprefix(HUGGINGFACE_PREFIX).partition("?")
    return f"{HUGGINGFACE_PREFIX}{resolve_path(path)}{mark}{query}"


def _make_synthetic(names: list[str]) -> dict[str, Path]:
    """The digit sets are made all together, each set of sentences by itself."""
    from data.sentence_sets import SENTENCE_SETS, ensure_sentences
    from data.synthetic import SETS, ensure_digits

    asked = {name: name.removeprefix(SYNTHETIC_PREFIX) for name in names}
    known = [*sorted(SETS), *sorted(SENTENCE_SETS)]
    for name, set_name in asked.items():
        if set_name not in known:
            raise ValueError(f"{name}: there is no such synthetic set; there are {', '.join(known)}")
    made = ensure_sentences([set_name for set_name in asked.values() if set_name in SENTENCE_SETS])
    if any(set_name in SETS for set_name in asked.values()):
        made |= ensure_digits()
    return {name: made[set_name] for name, set_name in asked.items()}


def _make_recorded(names: list[str], recordings: str | None, held_out_speakers: Sequence[str]) -> dict[str, Path]:
    from data.recordings import RECORDING_SETS, ensure_recordings

    asked = {name: name.removeprefix(RECORDINGS_PREFIX) for name in names}
    for name, set_name in asked.items():
        if set_name not in RECORDING_SETS:
            raise ValueError(f"{name}: there is no such set of recordings; there are {', '.join(RECORDING_SETS)}")
    if not recordings:
        raise ValueError(f"{names[0]}: set data.recordings to the folder or tar file with the recordings")
    try:
        made = ensure_recordings(resolve_path(recordings), held_out_speakers)
    except ValueError as error:
        keys = f"data.recordings={recordings} data.held_out_speakers=[{','.join(held_out_speakers)}]"
        raise ValueError(f"{keys}: {error}") from error
    return {name: made[set_name] for name, set_name in asked.items()}


def resolve_model(key: str, path: str, run_dir: Path | None = None) -> str:
    """Absolute folder of a model, or a Hub id as it is. Raises ValueError for what is neither.

    `stage:NAME` is the export of the stage of that name, whose run directory is beside `run_dir`.
    """
    if path.startswith(STAGE_PREFIX) and run_dir is not None:
        resolved = str(run_dir.parent / path.removeprefix(STAGE_PREFIX) / "export")
        if not Path(resolved).is_dir():
            raise ValueError(f"{key}={path}: there is no {resolved}; that stage must come before this one")
    else:
        resolved = resolve_path(path)
    if Path(resolved).is_dir():
        if not (Path(resolved) / "config.json").is_file():
            raise ValueError(f"{key}={path}: this folder has no config.json, so it is no checkpoint")
        return resolved
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) is None:
        raise ValueError(f"{key}={path}: there is no such folder, and a Hub id is written owner/name")
    return path


def resolve_teachers(teacher: TeacherConfig, run_dir: Path) -> TeacherConfig:
    """The teacher section with absolute paths, those of its routes too. Raises ValueError as `resolve_teacher` does."""
    paths = {name: resolve_teacher(name, one, run_dir) for name, one in teacher.by_route().items() if one.path}
    if not teacher.routes:
        return dataclasses.replace(teacher, path=paths.get(""))
    routes = {
        name: {**route, "path": paths[name]} if route.get("path") else route for name, route in teacher.routes.items()
    }
    shared = [paths[name] for name, route in routes.items() if "path" not in route and name in paths]
    unused = teacher.path and resolve_path(teacher.path)
    return dataclasses.replace(teacher, path=shared[0] if shared else unused, routes=routes)


def resolve_teacher(name: str, teacher: TeacherConfig, run_dir: Path) -> str:
    """Absolute folder of the teacher of a route ("" where there are none), or its Hub id.

    Raises ValueError for a path that is no model, or one whose `model_type` is that of another kind.
    """
    where = f"teacher.routes.{name}" if name else "teacher"
    path = resolve_model(f"{where}.path", str(teacher.path), run_dir)
    if Path(path).is_dir():
        _check_kind(where, path, teacher.kind)
    return path


def _check_kind(where: str, path: str, kind: str) -> None:
    """A folder's config.json says which kind reads it. Qwen3-ASR may be `hf` too, under a prompt of the recipe."""
    try:
        model_type = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{where}.path={path}: its config.json names no model_type ({' '.join(str(error).split())}); fetch the "
            "checkpoint again"
        ) from error
    fitting = model_type if model_type in OWN_KINDS else "hf"
    if kind == fitting or (kind == "hf" and model_type != "arkasr"):
        return
    prompt = f" and give its {where}.prompt (opd/teachers/hf.py)" if fitting == "hf" else ""
    without = f" without {where}.prompt" if kind == "hf" else ""
    raise ValueError(
        f"{where}.kind={kind}: {path} is no such model, its config.json says model_type {model_type}; set "
        f"{where}.kind={fitting}{prompt}{without}, or another {where}.path"
    )
