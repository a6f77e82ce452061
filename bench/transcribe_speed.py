"""Batched transcription against a loop over single files, side by side in one run, on the same threads.

    python -m bench.transcribe_speed [clips=500] [batch_size=40] [model=seeds/tiny_teacher]

Both read the files, compute features and call `generate`; the loop does so for one file after the other. The sets take
turns in blocks, so that a machine that slows down slows both. Exits with 1 where a transcript differs or the batches
are less than 3 times as fast.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from data.audio import load_audio
from data.command_line import key_values, wants_help
from data.manifest import read_manifest
from data.synthetic import ensure_digits
from opd.arkasr.loading import named_by
from opd.batch_transcribe import measure, plan_batches, transcribe_batches
from opd.transcribe import Transcriber

TARGET = 3.0
NUM_BLOCKS = 4
ROOT = Path(__file__).parent.parent


def main(argv: list[str]) -> int:
    if wants_help(argv):
        print(__doc__)
        return 0
    try:
        options = key_values(argv, ("clips", "batch_size", "model"))
        num_clips, batch_size = _count(options, "clips", 500), _count(options, "batch_size", 40)
        with named_by("model=", model := options.get("model") or str(ROOT / "seeds" / "tiny_teacher")):
            transcriber = Transcriber(model)
        clips = list(enumerate(read_manifest(ensure_digits()["unseen_voices"])[:num_clips]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return compare(transcriber, clips, batch_size)


def _count(options: dict[str, str], key: str, default: int) -> int:
    value = options.get(key, str(default))
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"{key}={value}: must be a whole number from 1 on")
    return int(value)


def compare(transcriber: Transcriber, clips: list, batch_size: int) -> int:
    """Prints the times of both ways; returns the exit status."""
    seconds, _ = measure(clips)
    in_loop(transcriber, clips[:4])  # both paths once, so that neither pays for the first call
    in_batches(transcriber, clips[:4], seconds, batch_size)
    loop_s = batch_s = 0.0
    loop, batched = {}, {}
    for block in range(NUM_BLOCKS):
        part = clips[block::NUM_BLOCKS]
        began = time.perf_counter()
        loop |= in_loop(transcriber, part)
        middle = time.perf_counter()
        batched |= in_batches(transcriber, part, seconds, batch_size)
        loop_s, batch_s = loop_s + middle - began, batch_s + time.perf_counter() - middle
    audio_s = sum(seconds.values())
    different = sum(loop[line] != batched[line] for line, _ in clips)
    lengths = sorted(seconds.values())
    print(f"{len(clips)} clips of {lengths[0]:.1f} to {lengths[-1]:.1f} s, {torch.get_num_threads()} threads")
    print(
        f"loop over files     {loop_s:7.2f} s  {len(clips) / loop_s:7.1f} clips/s  {audio_s / loop_s:7.1f}x real time"
    )
    print(
        f"batches of {batch_size:<4}     {batch_s:7.2f} s  {len(clips) / batch_s:7.1f} clips/s  {audio_s / batch_s:7.1f}x real time"
    )
    print(f"{loop_s / batch_s:.2f} times as fast (target {TARGET:g}), {different} transcripts differ")
    return 0 if not different and loop_s / batch_s >= TARGET else 1


def in_loop(transcriber: Transcriber, clips: list) -> dict[int, str]:
    texts = {}
    for line, utterance in clips:
        inputs = transcriber.processor.build_inputs([load_audio(utterance)])
        with torch.inference_mode():
            ids = transcriber.model.generate(**inputs, **transcriber.generate_options)
        texts[line] = transcriber.processor.clean_text(ids[0, inputs["input_ids"].shape[1] :])
    return texts


def in_batches(transcriber: Transcriber, clips: list, seconds: dict[int, float], batch_size: int) -> dict[int, str]:
    batches = plan_batches(clips, seconds, batch_size, transcriber.settings.max_audio_seconds)
    outcomes = [outcome for part in transcribe_batches(transcriber, batches, batch_size) for outcome in part]
    return {outcome.line: outcome.pred_text for outcome in outcomes}


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
