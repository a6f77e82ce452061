"""Which file may import which (CONTRIBUTING.md): read from the syntax trees, so nothing has to be run."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DRIVER = {"opd.train", "opd.run", "opd.workers", "opd.doctor.live"}
RAY_ALLOWED = DRIVER | {"opd.remote", "opd.object_store", "opd.teachers.actor"}
HEAVY = {"vllm", "deepspeed", "wandb", "jiwer", "matplotlib"}
ONLY_IN = {"wandb": {"opd.metrics"}, "jiwer": {"opd.evaluate"}, "deepspeed": {"trainers.zero", "opd.zero_checkpoint"}}

COMMON = {"types", "arkasr", "encoding", "cpu_linear", "rollout", "support", "vocab", "schema", "config", "peak_memory"}
OPD_OF = {  # what these parts may have of `opd`
    "trainers": COMMON | {"trainable", "zero_checkpoint", "export", "fused", "losses", "remote", "object_store"},
    "opd.rollout": {"types", "cpu_linear", "rollout"},
    "opd.teachers.actor": COMMON | {"teachers", "remote", "resolve"},
    "opd.teachers": COMMON | {"teachers", "align", "text"},
}


def modules() -> dict[str, Path]:
    paths = [p for top in ("opd", "trainers", "data", "scripts") for p in (ROOT / top).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imported(path: Path, module: str) -> set[str]:
    """Absolute names of everything a file imports, inside functions too."""
    names = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            full = ".".join(part for part in (base, node.module) if part)
            names |= {full} | {f"{full}.{alias.name}" for alias in node.names}
    return names


def top(name: str) -> str:
    return name.split(".")[0]


def within(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_one_way(module: str) -> None:
    names = imported(modules()[module], module)
    tops = {top(name) for name in names}
    own = {name for name in names if top(name) in ("opd", "trainers", "data", "scripts")}
    if top(module) == "opd" and module not in DRIVER:
        assert not tops & {"trainers", "verl", "scripts"}, "only the driver knows verl and the workers"
    if module not in RAY_ALLOWED and top(module) != "trainers":
        assert "ray" not in tops
    if top(module) == "data":
        assert all(within(name, {"data", "opd.types", "opd.text", "opd"}) for name in own)
        assert (
            not {n for n in own if within(n, {"opd"})}
            - {"opd"}
            - {n for n in own if within(n, {"opd.types", "opd.text"})}
        )
        assert not tops & {"transformers", "verl", "ray"}
    if module in {"opd.fused", "opd.losses", "opd.support", "opd.vocab"}:
        assert all(within(name, {"opd.types", "opd.support", "opd.losses"}) for name in own)
        assert not tops & {"transformers", "ray", "verl"}
    if within(module, {"opd.arkasr"}):
        assert all(within(name, {"opd.arkasr"}) for name in own)
    if top(module) == "trainers":
        assert not any(within(name, {"opd.train", "opd.run"}) for name in own)
    if part := next((part for part in OPD_OF if within(module, {part})), None):
        assert {name.split(".")[1] for name in own if name.startswith("opd.")} <= OPD_OF[part]
    if top(module) == "scripts":
        assert "trainers" not in tops


@pytest.mark.parametrize("module", sorted(modules()))
def test_optional_and_heavy_packages_stay_in_one_module(module: str) -> None:
    for name in {top(n) for n in imported(modules()[module], module)} & HEAVY:
        assert module in ONLY_IN.get(name, set()), f"{name} is imported in {module}"


def test_the_teacher_side_needs_no_verl() -> None:
    """Everything a teacher's process imports, followed through, is free of verl and trainers."""
    table = modules()
    seen, todo = set(), ["opd.teachers.actor", "opd.teachers.arkasr"]
    while todo:
        module = todo.pop()
        if module in seen or module not in table:
            continue
        seen.add(module)
        names = imported(table[module], module)
        assert not {top(n) for n in names} & {"verl", "trainers"}, f"{module} imports verl or trainers"
        todo += [n for n in names if top(n) in ("opd", "data")]
    assert {"opd.losses", "data.audio", "opd.support"} & seen >= {"data.audio", "opd.support"}


def test_files_and_functions_stay_small() -> None:
    for module, path in [*modules().items(), *((f"bench.{p.stem}", p) for p in (ROOT / "bench").glob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, f"{module} is {len(text.splitlines())} lines long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 80, f"{module}.{node.name} is {length} lines long"
