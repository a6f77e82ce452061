"""The teacher's own Python environment: what is found out about it before anything starts."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from opd.config import load_config
from opd.teachers.environment import PACKAGES, check_environments, compare, interpreter, versions_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real virtual environment without any package."""
    path = tmp_path_factory.mktemp("environment") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    return path


def install(environment: Path, versions: dict[str, str]) -> None:
    """Writes what an installer records of packages: their names and versions."""
    site = environment / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    for folder in site.glob("*.dist-info"):
        (folder / "METADATA").unlink()
        folder.rmdir()
    for name, version in versions.items():
        folder = site / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def check(python_path: Path | str, *overrides: str) -> None:
    config = load_config(["recipe=tiny", f"teacher.python_path={python_path}", *overrides])
    check_environments(config.teacher.by_route())


def test_what_does_not_fit_is_said_in_one_line(environment: Path, tmp_path: Path) -> None:
    python = environment / "bin" / "python"
    install(environment, {})
    with pytest.raises(
        ValueError, match=r"python_path=.*: lacks torch, ray, transformers.*soxr; run `make teacher-env`"
    ):
        check(python)
    own = {name: str(version) for name, version in versions_of(PACKAGES).items() if name != "python"}
    install(environment, own)
    check(python)
    install(environment, own | {"torch": own["torch"].partition("+")[0] + "+cu130"})
    check(python)  # another build of the same version
    install(environment, own | {"torch": "2.12.1", "ray": "2.59.0"})
    with pytest.raises(ValueError, match=r"torch 2.12.1 instead of .*, ray 2.59.0 instead of .*make teacher-env"):
        check(python)
    install(environment, own | {"transformers": "5.12.3"})
    with pytest.raises(
        ValueError, match=r"qwen3_asr needs transformers 5.13 or newer, .*has 5.12.3: run `make teacher-env`"
    ):
        check(python, "teacher.kind=qwen3_asr")
    install(environment, own | {"transformers": "5.13.0"})
    check(python, "teacher.kind=qwen3_asr")
    with pytest.raises(
        ValueError, match=r"python_path=nowhere/python: there is no such interpreter; run `make teacher-env`"
    ):
        check("nowhere/python")
    (tmp_path / "python").write_text("no program")
    with pytest.raises(ValueError, match=r"is no Python that can be run \(.*\); run `make teacher-env`"):
        check(tmp_path / "python")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "ended with exit status 1: nothing on its stderr"),
        ("echo first >&2; echo no module named encodings >&2; exit 3", "exit status 3: no module named encodings"),
        ("echo hello", "exit status 0: nothing on its stderr"),
    ],
)
def test_an_interpreter_that_cannot_be_run_is_named_with_what_it_said(script: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    with pytest.raises(
        ValueError, match=rf"python_path={path}: {path} is no Python .*{said}\); run `make teacher-env`"
    ):
        check(path)


def test_each_route_has_its_environment_looked_at(environment: Path) -> None:
    install(environment, {})
    routes = f"teacher.routes={{a: {{}}, b: {{python_path: {environment / 'bin' / 'python'}}}}}"
    with pytest.raises(ValueError, match=r"lacks torch"):
        check_environments(load_config(["recipe=tiny", routes]).teacher.by_route())


def test_another_python_is_refused() -> None:
    own = {"python": "3.11"} | dict.fromkeys(PACKAGES, "1.0")
    with pytest.raises(ValueError, match="x: has python 3.12 instead of 3.11"):
        compare(own | {"python": "3.12"}, own, "x")
    compare(own | {"numpy": "2.0"}, own, "x")


def test_an_interpreter_keeps_its_name_and_counts_from_the_project(tmp_path: Path) -> None:
    """The `python` of a virtual environment is a link, and knows its packages under its own name only."""
    (tmp_path / "python").symlink_to(sys.executable)
    assert interpreter(str(tmp_path / "python")) == str(tmp_path / "python")
    assert interpreter(".venv-teacher/bin/python") == str(ROOT / ".venv-teacher" / "bin" / "python")


def test_an_interpreter_is_found_beside_the_running_one(other_python: Path) -> None:
    """In a Ray job, where the project is a copy without environments."""
    beside = other_python.parents[2] / "second" / "bin" / "python"
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.symlink_to(sys.executable)
    code = "from opd.teachers.environment import interpreter; print(interpreter('second/bin/python'))"
    done = subprocess.run(
        [str(other_python), "-c", code], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(beside)


def test_a_worker_imports_only_what_its_environment_has() -> None:
    """Every module that a worker imports when it is loaded, followed through our own."""
    listed = {
        line.split("==")[0].split(">=")[0] for line in (ROOT / "requirements/teacher.txt").read_text().splitlines()
    }
    assert set(PACKAGES) <= listed
    allowed = set(PACKAGES) | set(sys.stdlib_module_names) | {"opd", "data"}
    todo, seen = ["opd.teachers.worker", "opd.teachers.arkasr", "opd.teachers.qwen3_asr", "opd.teachers.hf"], set()
    while todo:
        module = todo.pop()
        path = ROOT / module.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module in seen or not path.exists():
            continue
        seen.add(module)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.parse(
            path.read_text()
        ).body:  # what is imported inside a function is imported when it is called
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = package if node.level else ""
                full = ".".join(part for part in (base, node.module) if part)
                names = [full, *(f"{full}.{alias.name}" for alias in node.names)]
            for name in names:
                assert name.split(".")[0] in allowed, f"{module} imports {name}"
            todo += [name for name in names if name.split(".")[0] in ("opd", "data")]
            todo += [name.rpartition(".")[0] for name in names if name.startswith(("opd.", "data."))]
    assert {"opd.teachers.causal", "opd.align", "opd.arkasr.modeling_arkasr", "data.audio", "opd.text"} <= seen
    assert not {"opd.config", "opd.remote", "opd.teachers.actor"} & seen
