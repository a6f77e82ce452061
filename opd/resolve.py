"""What a recipe names -> absolute paths: run directory, models, manifests. Synthetic speech is made where it is missing."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from pathlib import Path

from opd.config import SYNTHETIC_PREFIX, Config, resolve_path


def in_ray_job() -> bool:
    """Whether this driver was started by `ray job submit` (its working directory is then a temporary copy)."""
    return bool(os.environ.get("RAY_JOB_SUBMISSION_ID") or os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"))


def resolve(config: Config) -> Config:
    """The config with absolute paths: run directory, models and manifests; synthetic sets are made where missing."""
    run_dir = config.run_dir
    if run_dir is None:
        run_dir = f"runs/{config.recipe_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if in_ray_job() and not Path(run_dir).expanduser().is_absolute():
        raise ValueError(
            f"run_dir={run_dir}: a Ray job runs in a temporary copy of the working directory, where a relative run "
            "directory would be lost; give an absolute path"
        )
    student, teacher, data = config.student, config.teacher, config.data
    if student.path:
        student = dataclasses.replace(student, path=resolve_model("student.path", student.path))
    if teacher.path:
        teacher = dataclasses.replace(teacher, path=resolve_model("teacher.path", teacher.path))
    names = [data.train_manifest, *data.eval_manifests.values()]
    manifests = resolve_manifests(names)
    data = dataclasses.replace(
        data,
        train_manifest=manifests[data.train_manifest],
        eval_manifests={name: manifests[path] for name, path in data.eval_manifests.items()},
    )
    return dataclasses.replace(
        config, run_dir=str(Path(run_dir).expanduser().resolve()), student=student, teacher=teacher, data=data
    )


def resolve_manifests(names: list[str]) -> dict[str, str]:
    """Manifest names of a recipe -> absolute paths. `synthetic:NAME` is one of the sets of data/synthetic.py."""
    asked = {name: name.removeprefix(SYNTHETIC_PREFIX) for name in names if name.startswith(SYNTHETIC_PREFIX)}
    synthetic: dict[str, Path] = {}
    if asked:
        from data.synthetic import SETS, ensure_digits

        for name, set_name in asked.items():
            if set_name not in SETS:
                raise ValueError(f"{name}: there is no such synthetic set; there are {', '.join(sorted(SETS))}")
        synthetic = ensure_digits()
    return {name: str(synthetic[asked[name]]) if name in asked else resolve_path(name) for name in names}


def resolve_model(key: str, path: str) -> str:
    """Absolute folder of a model, or a Hub id as it is. Raises ValueError for what is neither."""
    resolved = resolve_path(path)
    if Path(resolved).is_dir():
        if not (Path(resolved) / "config.json").is_file():
            raise ValueError(f"{key}={path}: this folder has no config.json, so it is no checkpoint")
        return resolved
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) is None:
        raise ValueError(f"{key}={path}: there is no such folder, and a Hub id is written owner/name")
    return path
