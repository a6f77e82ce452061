"""Names of a recipe -> absolute paths, and what is said of a teacher's folder before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_teachers import ARKASR, QWEN3_ASR, STUDENT

from opd.config import Config, load_config
from opd.resolve import resolve
from opd.teachers.routing import Router

TEXT = "teacher.prompt={text: '{audio}'}"
ROUTE = "teacher.routes={a: {kind: hf, prompt: {chat: [{role: user, content: [{type: audio}]}]}}}"


def resolved(run_dir: Path, *overrides: str) -> Config:
    data = ["data.train_manifest=none.jsonl", "data.eval_manifests={}", f"run_dir={run_dir}"]
    return resolve(load_config(["recipe=tiny", *data, *overrides]))


def model_of(folder: Path, model_type: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    return folder


def test_paths_of_routes_are_resolved_as_that_of_one_teacher_is(tmp_path: Path) -> None:
    shutil.copytree(ARKASR, tmp_path / "sft" / "export")
    routes = "teacher.routes={a: {match: {task: asr}, path: 'stage:sft'}, b: {path: seeds/tiny_student}, c: {num_workers: 2}}"
    teacher = resolved(tmp_path / "opd", routes).teacher
    assert teacher.routes["a"] == {"match": {"task": "asr"}, "path": str(tmp_path / "sft" / "export")}
    assert (teacher.routes["b"], teacher.routes["c"]) == ({"path": str(STUDENT)}, {"num_workers": 2})
    assert teacher.path == str(ARKASR)
    assert resolved(tmp_path / "opd").teacher.path == str(ARKASR)
    hub = resolved(tmp_path / "opd", "teacher.path=null", "teacher.routes={a: {path: owner/name}}")
    assert [one.path for one in Router(hub).teachers.values()] == ["owner/name"]


@pytest.mark.parametrize("path", ["stage:sft", "nowhere", "seeds"])
def test_a_route_without_a_model_is_named(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"teacher.routes.a.path={path}: .*(there is no|no checkpoint)"):
        resolved(tmp_path / "opd", f"teacher.routes={{a: {{path: '{path}'}}}}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.kind=hf", TEXT], "teacher.kind=hf: .*model_type arkasr; set teacher.kind=arkasr without teacher.prompt"),
        ([f"teacher.path={QWEN3_ASR}"], "teacher.kind=arkasr: .*model_type qwen3_asr; set teacher.kind=qwen3_asr, or"),
        (["teacher.kind=qwen3_asr"], "teacher.kind=qwen3_asr: .*model_type arkasr; set teacher.kind=arkasr, or"),
        (["teacher.path={glm}"], "model_type glmasr; set teacher.kind=hf and give its teacher.prompt .opd/teachers/hf.py"),
        ([ROUTE], "teacher.routes.a.kind=hf: .*set teacher.routes.a.kind=arkasr"),
    ],
)  # fmt: skip
def test_a_folder_of_another_kind_is_named_with_the_kind(overrides: list[str], message: str, tmp_path: Path) -> None:
    glm = model_of(tmp_path / "glm", "glmasr")
    with pytest.raises(ValueError, match=message) as caught:
        resolved(tmp_path / "run", *(override.replace("{glm}", str(glm)) for override in overrides))
    assert "\n" not in str(caught.value)


def test_folders_of_their_kind_are_taken(tmp_path: Path) -> None:
    glm = model_of(tmp_path / "glm", "glmasr")
    assert resolved(tmp_path / "run", "teacher.kind=hf", TEXT, f"teacher.path={glm}").teacher.path == str(glm)
    for kind in (["teacher.kind=qwen3_asr"], ["teacher.kind=hf", TEXT]):  # the second under a prompt of the recipe
        assert resolved(tmp_path / "run", f"teacher.path={QWEN3_ASR}", *kind).teacher.path == str(QWEN3_ASR)
    assert resolved(tmp_path / "run", "stage=sft", "teacher.path=nowhere").teacher.path == "nowhere"


def test_a_config_that_names_no_model_is_said(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    for content in ("", "[]", "{}"):
        (tmp_path / "broken" / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"teacher.path=.*broken: its config.json names no model_type"):
            resolved(tmp_path / "run", f"teacher.path={tmp_path / 'broken'}")
