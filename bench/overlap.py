"""Rollout and scoring of the next batch while this one trains, against one after the other: time of a step, and WER.

    python -m bench.overlap [--json FILE] [--seeds 0 1 2] [--out_dir runs/overlap] [section.key=value ...]

Runs recipe=tiny to its end with `schedule=sync` and `schedule=one_step_off`, in turns, each seed once with either: the same
steps on the same audio. One student rank and one teacher worker with a core each. A run that is there already is read, an
interrupted one is taken up again.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from bench.command import Parser, command, count
from bench.quality import ROOT, SET, run
from bench.tables import Row, print_rows, write_json

CASE, OURS, OTHER = "overlap/tiny", "one_step_off", "sync"
WARM_UP = 20  # first steps of a run: imports, first calls
PLACES = ("cluster.ranks_per_node=1", "cluster.num_teachers=1", "train.micro_batch_size=32")


def measure(schedule: str, seed: int, out_dir: Path, keys: list[str]) -> dict[str, Any]:
    """Median step and its phases in seconds, WER before and after, and the share of tokens that were one update old."""
    run_dir = out_dir / f"{schedule}-seed{seed}"
    summary = run("tiny", run_dir, f"schedule={schedule}", f"seed={seed}", *PLACES, *keys)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "time/step" in line][WARM_UP:]
    figures = {key: statistics.median(step[key] for step in steps) for key in ("time/step", "time/overhead")}
    figures |= {when: summary["eval"][SET][when]["wer"] for when in ("before", "after")}
    figures["staleness"] = statistics.mean(step.get("rollout/staleness", 0.0) for step in steps)
    return figures


@command
def main(argv: list[str]) -> int:
    parser = Parser("overlap", __doc__)
    parser.add_argument("keys", nargs="*", metavar="section.key=value", help="what differs from recipe=tiny")
    parser.add_argument("--seeds", type=count, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out_dir", type=Path, default=ROOT / "runs" / "overlap")
    options = parser.parse_args(argv)
    done: dict[str, list[dict[str, Any]]] = {OURS: [], OTHER: []}
    for seed in options.seeds:
        for schedule, figures in done.items():
            figures.append(measure(schedule, seed, options.out_dir.resolve(), options.keys))
    print("| seed | sync, s a step | one_step_off, s a step | WER before | after, sync | after, one_step_off |")
    print("|---|---|---|---|---|---|")
    for seed, ours, other in zip(options.seeds, done[OURS], done[OTHER], strict=True):
        seconds = f"{other['time/step']:.3f} | {ours['time/step']:.3f}"
        print(f"| {seed} | {seconds} | {ours['before']:.1%} | {other['after']:.1%} | {ours['after']:.1%} |")
    own_s, other_s = (statistics.median(f["time/step"] for f in done[name]) for name in (OURS, OTHER))
    stale = statistics.mean(figures["staleness"] for figures in done[OURS])
    wers = " against ".join(f"{statistics.mean(f['after'] for f in done[name]):.1%}" for name in (OURS, OTHER))
    row = Row(CASE, own_s, OTHER, other_s, other_s / own_s)
    print_rows(
        [row],
        {CASE: f"mean WER after equal steps {wers}, {len(options.seeds)} seeds; rollouts {stale:.2f} updates old"},
    )
    if options.json:
        write_json([row], options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(None))
