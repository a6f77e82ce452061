"""The Python environment of a teacher's workers, looked at before anything starts."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.schema import TeacherConfig

# What the worker imports; requirements/teacher.txt pins it.
PACKAGES = (
    *("torch", "ray", "transformers", "tokenizers", "numpy", "safetensors", "huggingface_hub", "soundfile", "soxr"),
)
SAME_VERSION = ("torch", "ray")  # tensors and calls go between the two environments
QWEN3_ASR_SINCE = (5, 13)
FIX = "run `make teacher-env`, which makes it in .venv-teacher"
PROBE_TIMEOUT_S = 120.0


def interpreter(python_path: str) -> str:
    """Absolute path of an interpreter that a config names, relative to the project.

    In a Ray job the project is a copy without its environments; there they are looked for beside the running one. A link
    is not followed: a virtual environment's `python` is one, and only under its own name does it know its packages.
    """
    from opd.config import PROJECT_ROOT

    path = Path(python_path).expanduser()
    beside = Path(sys.prefix).parent / path
    return str(beside if beside.is_file() and not (PROJECT_ROOT / path).is_file() else PROJECT_ROOT / path)


def versions_of(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of this process's Python and packages; None where one is missing. Also runs by itself in `probe`."""
    import sys
    from importlib import metadata

    versions: dict[str, str | None] = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def check_environments(teachers: dict[str, TeacherConfig]) -> dict[str, dict[str, str | None]]:
    """Versions in each interpreter that a teacher names, by its path.

    Raises ValueError where one is missing, lacks a package, or has another torch, Ray or Python.
    """
    own = versions_of(PACKAGES)
    seen: dict[str, dict[str, str | None]] = {}
    for teacher in teachers.values():
        versions = own
        if teacher.python_path is not None:
            path = interpreter(teacher.python_path)
            if path not in seen:
                seen[path] = probe(path, teacher.python_path)
                compare(seen[path], own, f"teacher.python_path={teacher.python_path}")
            versions = seen[path]
        if teacher.kind == "qwen3_asr" and _release(versions["transformers"]) < QWEN3_ASR_SINCE:
            where = "this environment" if teacher.python_path is None else teacher.python_path
            raise ValueError(
                f"teacher.kind=qwen3_asr needs transformers {'.'.join(map(str, QWEN3_ASR_SINCE))} or newer, {where} has "
                f"{versions['transformers']}: {FIX}, and set teacher.python_path=.venv-teacher/bin/python"
            )
    return seen


def probe(path: str, shown: str) -> dict[str, str | None]:
    """`versions_of` another interpreter."""
    where = f"teacher.python_path={shown}"
    if not Path(path).is_file():
        raise ValueError(f"{where}: there is no such interpreter; {FIX}, or correct the path")
    code = f"{inspect.getsource(versions_of)}\nimport json; print(json.dumps(versions_of({PACKAGES!r})))"
    command = [path, "-I", "-c", "from __future__ import annotations\n" + code]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: is no Python that can be run ({' '.join(str(error).split())}); {FIX}") from error
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"{where}: {path} did not answer within {PROBE_TIMEOUT_S:g} s; {FIX}") from error
    try:
        versions = json.loads(done.stdout) if done.returncode == 0 else None
    except ValueError:
        versions = None
    if not isinstance(versions, dict):
        said = (done.stderr.strip().splitlines() or ["nothing on its stderr"])[-1].strip()
        ended = f"it ended with exit status {done.returncode}: {said}"
        raise ValueError(f"{where}: {path} is no Python that can be run ({ended}); {FIX}")
    return versions


def compare(theirs: dict[str, Any], own: dict[str, Any], where: str) -> None:
    """Raises ValueError for what a teacher's environment lacks or has in another version than this one."""
    missing = [name for name in PACKAGES if theirs[name] is None]
    if missing:
        raise ValueError(f"{where}: lacks {', '.join(missing)}; {FIX}")
    different = [
        f"{name} {theirs[name]} instead of {own[name]}"
        for name in ("python", *SAME_VERSION)
        if _public(theirs[name]) != _public(own[name])
    ]
    if different:
        raise ValueError(f"{where}: has {', '.join(different)}, which must be the training environment's; {FIX}")


def _public(version: str) -> str:
    """A version without its build: 2.13.0+cpu and 2.13.0 exchange tensors."""
    return str(version).partition("+")[0]


def _release(version: str | None) -> tuple[int, ...]:
    parts = (version or "0").split(".")[:2]
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in parts)
