"""How much does on-policy distillation bring on the tiny task?

    python -m bench.quality [seeds=0,1,2] [out_dir=runs/quality] [honest=false|true]

Runs recipe=tiny once per seed (about 4 minutes each on 2 cores) and prints WER before and after on the unseen voices, with
the median. `honest=true` adds the check of the start: the same student trained 30 % longer by SFT. A run that is finished
in out_dir is not run again.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from data.command_line import check_writable, key_values, one_of, wants_help
from opd.config import load_config

ROOT = Path(__file__).resolve().parent.parent
SET = "unseen_voices"


def run(recipe: str, run_dir: Path, *overrides: str) -> dict[str, Any]:
    """summary.json of a finished run; an interrupted one is taken up again, a finished one is used as it is."""
    if (run_dir / "summary.json").is_file():
        print(
            f"{run_dir}: is finished already and used as it is; choose another out_dir to run it anew", file=sys.stderr
        )
    command = [sys.executable, "-m", "opd.train", f"recipe={recipe}", f"run_dir={run_dir}", "wandb.mode=disabled"]
    subprocess.run([*command, *overrides], cwd=ROOT, check=True, stdout=sys.stderr)
    return json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))


def distil(seeds: list[int], out_dir: Path) -> list[dict[str, float]]:
    rows = []
    for seed in seeds:
        summary = run("tiny", out_dir / f"tiny-seed{seed}", f"seed={seed}")
        result, seconds = summary["eval"][SET], summary["seconds"]
        start, end, teacher = (result[when]["wer"] for when in ("before", "after", "teacher"))
        rows.append(
            {
                "seed": seed,
                "before": start,
                "after": end,
                "teacher": teacher,
                "cut": (start - end) / start,
                "gap_closed": (start - end) / (start - teacher),
                "seconds": seconds["total"] - seconds["eval"],
            }  # fmt: skip
        )
    return rows


def honest_start(out_dir: Path) -> dict[str, float]:
    """The student's SFT recipe as it is and with 30 % more steps: WER of each."""
    steps = load_config(["recipe=tiny_student"]).train.num_steps
    usual = run("tiny_student", out_dir / "student")
    longer = run("tiny_student", out_dir / "student-longer", f"train.num_steps={round(1.3 * steps)}")
    wer, wer_longer = (s["eval"][SET]["after"]["wer"] for s in (usual, longer))
    return {"steps": steps, "wer": wer, "wer_longer": wer_longer, "cut": (wer - wer_longer) / wer}


def main(argv: list[str]) -> int:
    if wants_help(argv):
        print(__doc__)
        return 0
    try:
        arguments = key_values(argv, ("seeds", "out_dir", "honest"))
        honest = one_of(arguments, "honest", "false", "true") == "true"
        seeds = arguments.get("seeds", "0,1,2").split(",")
        if not all(seed.isdecimal() for seed in seeds) or len(set(seeds)) < len(seeds):
            raise ValueError(
                f"seeds={','.join(seeds)}: must be whole numbers from 0 on, each once, with commas between"
            )
        out_dir = Path(arguments.get("out_dir") or ROOT / "runs" / "quality").resolve()
        check_writable("out_dir=", out_dir, is_folder=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = distil([int(seed) for seed in seeds], out_dir)
    print("| seed | WER before | WER after | teacher | relative cut | gap closed | seconds without evaluation |")
    print("|---|---|---|---|---|---|---|")
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    for name, row in [*((str(row["seed"]), row) for row in rows), ("median", median)]:
        rates = " | ".join(f"{row[key]:.1%}" for key in ("before", "after", "teacher", "cut", "gap_closed"))
        print(f"| {name} | {rates} | {row['seconds']:.0f} |")
    if honest:
        start = honest_start(out_dir)
        print(
            f"\nSFT student, {start['steps']} steps: WER {start['wer']:.1%}; 30 % more steps: "
            f"{start['wer_longer']:.1%} ({start['cut']:.1%} better)"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
