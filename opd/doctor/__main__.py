"""python -m opd.doctor recipe=NAME [section.key=value ...]

Says in a table whether this run can work here, and how to fix what cannot: versions of both environments, devices, cluster,
disk, manifests, teacher, and one step that is run for real and kept nowhere. Nothing is written into run_dir. The exit
status is 1 where a check fails.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from data.command_line import wants_help
from opd.config import load_config
from opd.doctor.examined import Examined
from opd.doctor.report import Check, Finding, examine, print_report, sentence
from opd.doctor.static import CHECKS, check_packages


def findings_of(arguments: list[str], scratch: Path) -> tuple[str, dict[str, Finding]]:
    """(title, findings by check). scratch: an empty folder for what a step needs on disk."""
    packages = Check("this environment", check_packages, fix="install the package anew: pip install -e .")
    findings: dict[str, Finding] = {}
    try:
        config = load_config(arguments, check=False)
        examined = Examined(config, scratch)  # reads the stages of a ladder and the arms of a comparison
    except ValueError as error:
        examine([packages], None, findings)
        lists_recipes = str(error).startswith(("no recipe given", "recipe="))
        fix = "" if lists_recipes else "print_config=true shows every key with its meaning"
        return "opd.doctor", findings | {
            "config": Finding("fail", sentence(error), fix),
            "all others": Finding("skipped", "needs what failed: config"),
        }
    from opd.doctor.live import LIVE_CHECKS  # imports Ray and verl

    try:
        with Console(stderr=True).status("looking") as status:
            checks = [packages, *CHECKS, *LIVE_CHECKS]
            examine(checks, examined, examined.findings, lambda name: status.update(f"looking at: {name}"))
    finally:
        examined.close()
    return f"opd.doctor recipe={config.recipe_name}", examined.findings


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if wants_help(arguments):
        print(__doc__)
        return 0
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="opd-doctor-") as scratch:
        title, findings = findings_of(arguments, Path(scratch))
    print_report(title, findings, time.perf_counter() - began)
    return int(any(finding.status == "fail" for finding in findings.values()))


if __name__ == "__main__":
    raise SystemExit(main())
