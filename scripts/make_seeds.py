"""Makes shipped seeds again: python scripts/make_seeds.py [tiny_teacher tiny_student sentence_teacher sentence_student]

Each is what a run of the recipe of its name exports at its end. The WER that each reached, which the run prints, belongs into
seeds/README.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# What a seed starts from, where its recipe does not make it.
BEFORE = {
    "sentence_student": [
        "scripts/drop_layers.py", "--model", "seeds/sentence_teacher", "--out", "runs/sentence_student_init",
        "--encoder", "0", "2", "--decoder", "0", "1",
    ],
}  # fmt: skip
SEEDS = ("tiny_teacher", "tiny_student", "sentence_teacher", "sentence_student")


def main() -> int:
    names = sys.argv[1:]
    if {"-h", "--help"} & set(names):
        print(__doc__)
        return 0
    if unknown := [name for name in names if name not in SEEDS]:
        print(f"error: {unknown[0]}: no seed that is made here; there are {', '.join(SEEDS)}", file=sys.stderr)
        return 2
    for name in names or SEEDS:
        run_dir = ROOT / "runs" / f"seed_{name}"
        commands = [[sys.executable, "-m", "opd.train", f"recipe={name}", f"run_dir={run_dir}"]]
        if name in BEFORE:
            shutil.rmtree(ROOT / "runs" / f"{name}_init", ignore_errors=True)
            commands.insert(0, [sys.executable, *BEFORE[name]])
        for command in commands:
            status = subprocess.run(command, cwd=ROOT, check=False).returncode
            if status:
                return status
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        last = list(summary["stages"].values())[-1] if "stages" in summary else summary
        copy_seed(Path(last["export_dir"]), ROOT / "seeds" / name)
        print(f"seeds/{name}: made")
    return 0


def copy_seed(export: Path, target: Path) -> None:
    """An export without its model card: seeds/README.md says of all seeds together what matters."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(export, target, ignore=shutil.ignore_patterns("README.md"))


if __name__ == "__main__":
    raise SystemExit(main())
