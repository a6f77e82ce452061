"""What can be checked of all stages of a ladder, or all arms of a comparison, before the first one trains.

What an earlier run still has to make (`stage:NAME`) is checked when the run that needs it begins.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from opd.checkpoint import CONFIG_FILE
from opd.evaluation import Evaluation
from opd.hub import check_push
from opd.parts import Part, named_parts
from opd.resolve import STAGE_PREFIX, resolve
from opd.schema import Config
from opd.teachers.environment import check_environments
from opd.teachers.routing import Router
from opd.training_data import TrainingData


def check_ahead(config: Config) -> None:
    """Raises ValueError, which names the stage or arm, for what could not run there: the teacher's environment, paths,
    manifests, languages without a teacher, the repository that is pushed to."""
    environments: set[tuple[str | None, str]] = set()  # looking into one takes seconds
    pushes: set[tuple[str, bool | None]] = set()
    for part in named_parts(config):
        try:
            _check_environment(part.config, environments)
            export = part.config.export
            if export.push and (export.push, export.private) not in pushes:
                pushes.add((export.push, export.private))
                check_push(export.push, export.private)
            _check_inputs(_without_made(part))
        except ValueError as error:
            raise ValueError(f"{part.title}: {error}") from error


def _check_environment(config: Config, checked: set[tuple[str | None, str]]) -> None:
    if config.stage == "sft":
        return
    teachers = config.teacher.by_route()
    check_environments({n: t for n, t in teachers.items() if (t.python_path, t.kind) not in checked})
    checked.update((teacher.python_path, teacher.kind) for teacher in teachers.values())


def _without_made(part: Part) -> Config:
    """The part's config without what the runs before it make. Raises ValueError for a stage that makes no manifest."""

    def is_made(name: str | None) -> bool:
        return bool(name) and str(name).startswith(STAGE_PREFIX) and _stage(str(name)) in part.before

    config = part.config
    student, teacher, data = config.student, config.teacher, config.data
    if is_made(student.path):
        student = dataclasses.replace(student, path=None)
    if is_made(teacher.path):
        teacher = dataclasses.replace(teacher, path=None)
    routes = {
        name: {**route, "path": None} if is_made(route.get("path")) else route for name, route in teacher.routes.items()
    }
    teacher = dataclasses.replace(teacher, routes=routes)
    if is_made(data.train_manifest):
        kind = part.before[_stage(str(data.train_manifest))].stage
        if kind != "td":
            raise ValueError(
                f"data.train_manifest={data.train_manifest}: that run has stage: {kind}, only stage: td writes a manifest"
            )
        data = dataclasses.replace(data, train_manifest=None)
    # Sorting by length may read the header of every file; nothing of that is asked here.
    data = dataclasses.replace(data, sorted_epochs=0)
    return dataclasses.replace(config, student=student, teacher=teacher, data=data)


def _stage(name: str) -> str:
    return name.removeprefix(STAGE_PREFIX)


def _check_inputs(config: Config) -> None:
    """As Run.open looks at them."""
    config = resolve(config)
    sets = Evaluation(config).sets
    has_data = bool(config.data.train_manifest or config.data.train_manifests)
    data = TrainingData(config) if has_data else None
    if config.stage == "sft":
        return
    router = Router(config)
    if data is not None:
        data.check_routes(router, is_new=not (Path(str(config.run_dir)) / CONFIG_FILE).exists())
    if config.stage == "opd" and config.eval.teacher:
        router.check([utterance for utterances in sets.values() for utterance in utterances])
