"""How fast does audio reach a step? python -m bench.data [--json FILE] [--lines N] [--batches N]

A manifest of 100,000 lines is read and shuffled; batches of its audio are decoded, resampled and made mel by the trainer's
own loader, with two threads ahead of the consumer, against the same work done when it is needed. Both sides must give the
same features. The recordings are a few hundred files of 3 to 12 s at 16 and 44.1 kHz that many lines share, so the disk's
cache is warm: the figure is for the processor's work. Exit status 1 where, over twelve batches or more, the loader is
less than 0.9 times as fast, or a step that leaves the processor free waits for audio more than 5 % of the time.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

from bench.command import Parser, command, positive, report_missed
from bench.tables import Row, print_rows, write_json
from data.collate import Collator
from data.manifest import read_manifest
from data.sampler import EpochSampler
from opd.arkasr import load_processor
from opd.types import Batch
from trainers.loader import PromptLoader

ROOT = Path(__file__).resolve().parent.parent
BATCH_SIZE, NUM_THREADS, RUNS = 16, 2, 3
LINES, BATCHES = 100_000, 12
LEAST = 0.9  # times as fast as reading when it is needed, where nothing else is done
MAX_WAITED = 0.05  # of the time, where the processor is free between the batches
RATES = (16_000, 44_100)


def write_manifest(folder: Path, num_lines: int, num_files: int = 200) -> tuple[Path, float]:
    """A manifest whose lines share `num_files` recordings; and the mean seconds of a line."""
    generator = np.random.default_rng(0)
    seconds = generator.uniform(3.0, 12.0, num_files)
    for index, length in enumerate(seconds):
        rate = RATES[index % len(RATES)]
        audio = 0.1 * generator.standard_normal(int(length * rate))
        soundfile.write(folder / f"{index}.flac", audio, rate)
    path = folder / "manifest.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for line in range(num_lines):
            file.write(json.dumps({"id": f"u{line}", "audio": f"{line % num_files}.flac", "text": "one two"}) + "\n")
    return path, float(seconds.mean())


def run(
    utterances: Batch, num_threads: int, num_batches: int, step_s: float
) -> tuple[float, float, list[torch.Tensor]]:
    """Seconds of all batches, seconds waited for audio, and the features of the first batch; a step takes `step_s`."""
    loader = PromptLoader(Collator(), load_processor(ROOT / "seeds" / "tiny_student"), num_threads)
    sampler = EpochSampler(len(utterances), seed=0)
    first: list[torch.Tensor] = []
    began = time.perf_counter()
    for _ in range(num_batches):
        batch = [utterances[index] for index in sampler.next_batch(BATCH_SIZE)]
        ahead = [utterances[index] for index in sampler.peek_batch(BATCH_SIZE)]
        inputs, _ = loader.take(batch)
        loader.prefetch(ahead)
        first = first or list(inputs.values())
        time.sleep(step_s)  # on an accelerator the processor is free meanwhile
    return time.perf_counter() - began, loader.take_waited_s(), first


@command
def main(argv: list[str]) -> int:
    parser = Parser("data", __doc__)
    parser.add_argument("--lines", type=positive, default=LINES)
    parser.add_argument("--batches", type=positive, default=BATCHES)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        path, mean_seconds = write_manifest(Path(name), arguments.lines)
        began = time.perf_counter()
        utterances = read_manifest(path)
        read_s = time.perf_counter() - began
        audio_seconds = mean_seconds * BATCH_SIZE * arguments.batches
        rows, notes, missed = [], {}, []
        for case, step_s in (("data/loader", 0.0), ("data/beside_steps", 0.5)):
            ours, other = [], []
            for _ in range(RUNS):  # in turns
                ours.append(run(utterances, NUM_THREADS, arguments.batches, step_s))
                other.append(run(utterances, 0, arguments.batches, step_s))
            assert all(torch.equal(a, b) for a, b in zip(ours[0][2], other[0][2], strict=True)), "the features differ"
            ours_s, other_s = (statistics.median(seconds for seconds, _, _ in side) for side in (ours, other))
            waited_s = statistics.median(waited for _, waited, _ in ours)
            rows.append(Row(case, ours_s, "read_when_needed", other_s, other_s / ours_s))
            if step_s and waited_s > MAX_WAITED * ours_s:
                missed.append(f"{case}: {waited_s / ours_s:.1%} of the time waited for audio, target {MAX_WAITED:.0%}")
            if not step_s and other_s < LEAST * ours_s:
                missed.append(f"{case}: {other_s / ours_s:.2f} times as fast, target {LEAST:g}")
            notes[case] = (
                f"{audio_seconds / ours_s:,.0f} seconds of audio a second; {waited_s / ours_s:.1%} of the time waited for it"
            )
    print(
        f"manifest of {arguments.lines:,} lines read in {read_s:.2f} s; {NUM_THREADS} threads, batches of {BATCH_SIZE}"
    )
    print_rows(rows, notes)
    if arguments.json:
        write_json(rows, arguments.json)
    return report_missed(missed, arguments.batches >= BATCHES)  # the first batch is always waited for


if __name__ == "__main__":
    raise SystemExit(main(None))
