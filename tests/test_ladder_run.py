"""A ladder run for real: stopped in the middle of a stage, taken up again, with a gate, filters and kept transcripts."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

from main_job import TIMEOUT_S, run, start

LADDER = [
    "recipe=tiny_ladder", "stages=[sft, td, opd]", "ladder.sft.student={path: seeds/tiny_student}",
    "ladder.sft.train.num_steps=2", "train.num_steps=4", "train.batch_size=8", "train.micro_batch_size=4", "train.log_every=1",
    "ladder.sft.train.batch_size=8", "ladder.sft.train.micro_batch_size=4", "ladder.sft.data.sorted_epochs=0",
    "ladder.opd={teacher: {gate_max_wer: 0.0}}", "checkpoint.checkpoint_every=2", "eval.batch_size=4", "td.max_wer=0.2",
    "cluster.ranks_per_node=1", "cluster.num_teachers=1",
]  # fmt: skip


def test_a_stopped_ladder_goes_on_in_the_middle_of_its_stage(
    speech: dict[str, Path], cluster: dict[str, str], tmp_path: Path
) -> None:
    run_dir, cache = tmp_path / "run", tmp_path / "kept"
    arguments = [
        sys.executable, "-m", "opd.train", *LADDER, f"run_dir={run_dir}", f"teacher.cache_dir={cache}",
        f"ladder.sft.data.train_manifest={speech['train']}", f"data.train_manifest={speech['train']}",
        f"data.eval_manifests={{held_out: {speech['eval']}}}",
    ]  # fmt: skip
    first = start(arguments, cluster)
    transcripts = run_dir / "td" / "td" / "transcripts.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    while not transcripts.exists() or transcripts.read_text().count("\n") < 8:
        assert first.poll() is None, first.stdout.read() if first.stdout else ""
        assert time.monotonic() < deadline, f"no teacher data within {TIMEOUT_S:g} s"
        time.sleep(0.02)
    first.terminate()
    printed, _ = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGTERM, printed
    kept = transcripts.read_text().count("\n")
    assert printed.splitlines()[-1] == (
        f"stopped after {kept} of 48 transcripts, which are kept; start again with the same command and run_dir to go on"
    )
    written_before = transcripts.read_text().split("\n")[:8]
    assert not (run_dir / "td" / "summary.json").exists()

    second = run(arguments, cluster)
    assert second.returncode == 0, second.stdout[-3000:] + second.stderr[-3000:]
    rows = [json.loads(line) for line in transcripts.read_text().split("\n") if line]
    assert transcripts.read_text().split("\n")[:8] == written_before
    assert len({row["id"] for row in rows}) == len(rows) == 48, "each utterance is transcribed once"
    summary = json.loads((run_dir / "summary.json").read_text())
    stages = summary["stages"]
    assert list(stages) == ["sft", "td", "opd"]
    assert [stage["steps"] for stage in stages.values()] == [2, 4, 4]
    counts = stages["td"]["teacher_data"]
    assert counts["num_kept"] + sum(counts["left_out"].values()) == 48
    manifest = [json.loads(line) for line in (run_dir / "td" / "td" / "manifest.jsonl").read_text().split("\n") if line]
    assert len(manifest) == counts["num_kept"]
    assert all(row["reference"] and row["text"] and row["text_source"].endswith("tiny_teacher") for row in manifest)
    # Each stage starts where the one before ended.
    for before, after in (("sft", "td"), ("td", "opd")):
        assert stages[before]["eval"]["held_out"]["after"]["wer"] == stages[after]["eval"]["held_out"]["before"]["wer"]
    # TD trains no CTC head, but hands on the one that SFT has trained: drafts for audio without a text.
    heads = [run_dir / stage / "export" / "ctc_head.safetensors" for stage in ("sft", "td", "opd")]
    assert heads[0].read_bytes() == heads[1].read_bytes()
    assert not heads[2].exists()
    # The gate asked the teacher about what it had transcribed for TD: nothing was decoded again but the evaluation set.
    gate = stages["opd"]["gate"]
    assert gate["checked"] >= 32
    assert gate["checked"] - gate["left_out"] > 0
    assert len(list((cache / "transcript").rglob("*.json"))) == 48 + 12
    assert stages["opd"]["cpu_seconds"]["student"] > 0
    assert stages["opd"]["cpu_seconds"]["teacher"] > 0
    assert "WER after each stage" in second.stdout
