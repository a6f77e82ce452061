"""Large manifests: the index, opening it, and going on at a random position, each in a process of its own.

    python -m bench.manifest [--lines 10000000] [--folder DIR] [--json rows.json]

The other side reads all lines into a list (`read_manifest`), of a manifest with one line in PART, as its memory would
not do for all. Memory is the process's peak, which `import torch` and the rest begin with; that is a row of its own.
Seconds are those after the imports. The manifests are made in a temporary folder below --folder and removed.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.command import Parser, command, positive
from bench.tables import Row, print_rows, write_json

PART = 20
BATCH_SIZE = 32
TEXT = "it was the best of times the worst of days and we had all before us then as ever"


@command
def main(argv: list[str]) -> int:
    parser = Parser("manifest", __doc__)
    parser.add_argument("--lines", type=positive, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where there is room for 160 bytes a line; default: the system's")
    parser.add_argument("--measure", nargs=2, help="used by this program itself: a stage and a manifest")
    arguments = parser.parse_args(argv)
    if arguments.measure:
        stage, path = arguments.measure
        print(json.dumps(measure(stage, Path(path))))
        return 0
    with tempfile.TemporaryDirectory(prefix="opd-manifest-", dir=arguments.folder) as name:
        whole, part = Path(name) / "whole.jsonl", Path(name) / "part.jsonl"
        num_part = max(1, arguments.lines // PART)
        write_lines(whole, arguments.lines)
        write_lines(part, num_part)
        size = whole.stat().st_size
        print(f"{arguments.lines:,} lines, {size / 1e9:.2f} GB, {size / arguments.lines:.0f} bytes each", flush=True)
        rows, notes = measure_all(whole, part, f"read_manifest, {num_part:,} lines")
    print_rows(rows, notes)
    if arguments.json:
        write_json(rows, arguments.json)
    return 0


def write_lines(path: Path, num: int) -> None:
    """A manifest as a large corpus has it; ids and texts differ in length."""
    draw, words = random.Random(0), TEXT.split()
    with open(path, "w", encoding="utf-8", buffering=1 << 20) as file:
        for i in range(num):
            text = " ".join(words[draw.getrandbits(4)] for _ in range(4 + (i & 7)))
            file.write(
                f'{{"id": "s{i % 9973}-{i}", "audio": "clips/{i % 1000:03}/s{i % 9973}-{i}.flac", "language": "en", '
                f'"text": "{text}", "duration": {1 + i % 1500 / 100:.2f}}}\n'
            )


def measure_all(whole: Path, part: Path, other: str) -> tuple[list[Row], dict[str, str]]:
    """The rows of the table, and the processor time of each case: on a busy machine it tells more."""
    imports = in_new_process("imports", whole)
    listed = in_new_process("list", part)
    listed_resume = in_new_process("list_resume", part)
    sides = {
        "imports alone": (imports, "the same", imports),
        "index, once": (in_new_process("open", whole), other, listed),  # the first to open it builds it
        "open": (in_new_process("open", whole), other, listed),
        "resume at a random position, first batch": (in_new_process("resume", whole), other, listed_resume),
    }
    rows = [
        Row(case, ours["s"], name, theirs["s"], theirs["s"] / ours["s"] if ours["s"] else 1.0, ours["mb"], theirs["mb"])
        for case, (ours, name, theirs) in sides.items()
    ]
    return rows, {case: f"{ours['cpu_s']:.2f} s of a processor" for case, (ours, _, _) in sides.items()}


def in_new_process(stage: str, path: Path) -> dict[str, float]:
    """Seconds (of the clock and of a processor) and megabytes of a stage."""
    command = [sys.executable, "-m", "bench.manifest", "--measure", stage, str(path)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure(stage: str, path: Path) -> dict[str, float]:
    from data.index import IndexedManifest
    from data.manifest import read_manifest
    from data.sampler import EpochSampler

    def first_batch(utterances: list | IndexedManifest) -> None:
        sampler = EpochSampler(len(utterances), seed=0)
        position = random.SystemRandom().randrange(5 * len(utterances))
        sampler.load_state_dict({**sampler.state_dict(), "position": position})
        batch = [utterances[index] for index in sampler.next_batch(BATCH_SIZE)]
        assert len({utterance.id for utterance in batch}) == BATCH_SIZE or len(utterances) < 10 * BATCH_SIZE

    stages: dict[str, Callable[[], object]] = {
        "imports": lambda: None,
        "open": lambda: IndexedManifest(path),
        "list": lambda: read_manifest(path),
        "list_resume": lambda: first_batch(read_manifest(path)),
        "resume": lambda: first_batch(IndexedManifest(path)),
    }
    began, cpu = time.perf_counter(), time.process_time()
    stages[stage]()
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    return {"s": seconds, "cpu_s": cpu_s, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}


if __name__ == "__main__":
    raise SystemExit(main(None))
