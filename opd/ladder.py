"""A ladder of stages in one command, such as SFT -> TD -> OPD: one run directory per stage, one table at the end.

    stages: [teacher, sft, td, opd]
    ladder:                                   # what differs in a stage; all else is the recipe's
      teacher: {stage: sft, student: {init: {...}}}       # a name that is no kind of stage says which it is
      opd: {teacher: {path: "stage:teacher"}, train: {num_steps: 400}}

Each stage starts from the export of the one before it, unless it says its own `student.path` or `student.init`;
`stage:NAME` is the export of another stage. Each is an ordinary run in `<run_dir>/<name>`: a ladder that was interrupted
goes on in the middle of the stage where it stood.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd.checkpoint import atomic_write_text
from opd.config import derive
from opd.resolve import STAGE_PREFIX, with_run_dir
from opd.schema import Config
from opd.tables import print_ladder
from opd.validate import STAGES


def stage_configs(config: Config) -> list[tuple[str, Config]]:
    """(name, config of its run) of each stage, in order.

    Raises ValueError for a stage without a kind, names that stand twice, and `ladder` names that are no stage.
    """
    if len(set(config.stages)) < len(config.stages):
        raise ValueError(
            f"stages={config.stages}: a name stands twice; give the second another name, and its kind in ladder"
        )
    for name, changes in config.ladder.items():
        # A stage that is described but not asked for is fine: `stages` may be cut short on the command line.
        if name not in (*config.stages, *STAGES) and not (isinstance(changes, dict) and "stage" in changes):
            raise ValueError(f"ladder.{name}: there is no such stage; stages are {', '.join(config.stages)}")
    base = dataclasses.replace(config, stages=[], ladder={})
    found: list[tuple[str, Config]] = []
    for name in config.stages:
        changes = config.ladder.get(name)
        changes = {} if changes is None else changes
        if not isinstance(changes, dict):
            raise ValueError(f"ladder.{name}: must be a mapping of sections and keys, not {changes!r}")
        changes = dict(changes)
        kind = changes.setdefault("stage", name)
        if kind not in STAGES:
            raise ValueError(
                f"stages: {name} is no kind of stage; set ladder.{name}.stage to one of {', '.join(STAGES)}"
            )
        own = changes.get("student")
        own = own if isinstance(own, dict) else {}  # `derive` refuses what is no section
        start: dict[str, Any] = {}
        if own.get("init"):
            start = {"student": {"path": None}}
        elif found and not own.get("path"):
            start = {"student": {"path": f"{STAGE_PREFIX}{found[-1][0]}", "init": {}}}
        elif own.get("path"):
            start = {"student": {"init": {}}}
        run_dir = {"run_dir": f"{config.run_dir}/{name}"} if config.run_dir else {}
        found.append((name, derive(base, [start, changes, run_dir], f"ladder.{name}")))
    return found


def run_ladder(config: Config, train: Callable[[Config], dict[str, Any]]) -> dict[str, Any]:
    """Runs the stages; `train` runs one. Writes <run_dir>/summary.json, prints and returns the table of all stages.

    Raises ValueError before the first stage for what a later one could not run with, as far as it is there already.
    """
    from opd.ahead import check_ahead  # what only a run needs; `stage_configs` is asked of every config

    config = with_run_dir(config)
    check_ahead(config)
    run_dir = Path(str(config.run_dir))
    summaries = {}
    for name, stage in stage_configs(config):
        print(f"== stage {name} ({stage.stage}) ==")
        summaries[name] = train(stage)
        summary = {"recipe": config.recipe_name, "seed": config.seed, "stages": summaries}
        atomic_write_text(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    print_ladder(summary)
    print(f"run: {run_dir}")
    return summary
