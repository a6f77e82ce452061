"""bench.gpu runs through on a CPU with tiny sizes: every case computes on both sides, and says so where one does not."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu_models import SIZES

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_all_cases_run_through(tmp_path: Path) -> None:
    """In a process in which neither verl nor Ray can be imported."""
    blocked = (
        "import sys; sys.modules.update(verl=None, ray=None); from bench.gpu import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["--size", "tiny", "--device", "cpu", "--runs", "1", "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(
        [sys.executable, "-c", blocked, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"torch {torch.__version__}" in done.stdout
    rows = {row["case"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {
        "rollout_tiny/plain", "rollout_tiny/no_graphs", "rollout_tiny/wer10", "rollout_tiny/read_weights",
        "loss_tiny/tail", "loss_tiny/renormalized", "step_tiny/wer10",
    }  # fmt: skip
    noisy = rows.pop(
        "rollout_tiny/read_weights"
    )  # a difference of two times, which one run of a tiny model may not tell
    for row in [*rows.values(), *([noisy] if noisy["ours_s"] is not None else [])]:
        assert row["ours_s"] > 0
        assert row["ratio"] == pytest.approx(row["other_s"] / row["ours_s"])


def test_a_decoding_step_is_what_the_rollout_takes_over_its_prefill() -> None:
    row, note = gpu.read_weights_case("06b", 1.5, 0.5, 10, 2 * 10**9, 4e10)
    assert (row.ours_s, row.other_s, row.ratio) == (pytest.approx(0.1), pytest.approx(0.05), pytest.approx(0.5))
    assert note == "2.00 GB of weights; 2.00 times the limit; prefill 0.500 s"
    row, note = gpu.read_weights_case("06b", 0.49, 0.5, 10, 2 * 10**9, 4e10)
    assert (row.ours_s, row.other_s, row.ratio) == (None, pytest.approx(0.05), None)
    assert note == "the prefill took 0.5000 s, the whole rollout 0.4900 s: raise --runs"


def test_a_case_that_fails_is_a_row_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bench: gpu.Bench) -> list:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setitem(gpu.CASES, "rollout", (fail, gpu.HF))
    monkeypatch.delitem(gpu.CASES, "step")
    rows, notes = gpu.run_cases(["tiny"], CPU, 1, 100.0)
    assert [row.ours_s is None for row in rows] == [True, False, False]
    assert notes["rollout_tiny"] == "OutOfMemoryError: no memory left"
    rows, notes = gpu.run_cases(["tiny"], CPU, 1, 0.0)
    assert all(row.ours_s is None for row in rows)
    assert "0 s are over" in notes["loss_tiny"]


def test_what_a_random_model_writes_is_not_one_token_again_and_again() -> None:
    bench = gpu.Bench("tiny", SIZES["tiny"], CPU, torch.float32, 1, 1.0)
    inputs = bench.inputs()
    ids_BL = bench.model().generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=1)
    written = ids_BL[:, inputs["input_ids"].shape[1] :].tolist()
    assert sum(len(set(row)) for row in written) > 0.6 * sum(len(row) for row in written)


def test_sizes_are_the_published_ones() -> None:
    for name, file in (("06b", "ark_asr_06b.json"), ("3b", "ark_asr_3b.json")):
        config = json.loads((ROOT / "tests" / "opd" / "arkasr" / "fixtures" / file).read_text())
        size = SIZES[name]
        assert {key: config[key] for key in size.decoder} == size.decoder
        assert {key: config["whisper_config"][key] for key in size.whisper} == size.whisper


def test_nothing_but_torch_and_transformers_is_imported() -> None:
    """Read from the syntax trees, so that a machine that has more does not hide it."""
    for path in ROOT.glob("bench/gpu*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tops = {name.split(".")[0] for name in names}
            assert tops <= {"torch", "transformers", "bench", "opd", *sys.stdlib_module_names}
