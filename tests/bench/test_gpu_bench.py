"""bench.gpu runs through on a CPU with tiny sizes: every case computes on both sides, and says so where one does not."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_cases, gpu_loss
from bench.gpu_bench import Bench
from bench.gpu_models import SIZES, make_inputs, make_model
from bench.gpu_rollout import CHECKED, HF, check_graphs, different, read_weights_case
from opd.rollout.decode import decode
from opd.types import Rollout

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
    assert f"{len(CHECKED)} float32 rollouts, 300 tokens: fixed memory" in done.stdout
    assert done.stdout.count("teacher-forced 100.0%") == 3
    rows = {row["case"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {
        "rollout_tiny/plain", "rollout_tiny/fresh_graphs", "rollout_tiny/no_graphs", "rollout_tiny/wer10",
        "rollout_tiny/read_weights", "loss_tiny/tail", "loss_tiny/renormalized", "loss_tiny/chunk", "step_tiny/wer10",
    }  # fmt: skip
    chunk = rows.pop("loss_tiny/chunk")
    assert (chunk["other_s"], chunk["ratio"]) == (None, None)
    assert chunk["ours_s"] > 0
    assert "compiled on CUDA only" in done.stdout
    # A difference of two times, which one run of a tiny model may not tell.
    noisy = rows.pop("rollout_tiny/read_weights")
    for row in [*rows.values(), *([noisy] if noisy["ours_s"] is not None else [])]:
        assert row["ours_s"] > 0
        assert row["ratio"] == pytest.approx(row["other_s"] / row["ours_s"])


def test_a_decoding_step_is_what_the_rollout_takes_over_its_prefill() -> None:
    row, note = read_weights_case("06b", 1.5, 0.5, 10, 2 * 10**9, 4e10)
    assert (row.ours_s, row.other_s, row.ratio) == (pytest.approx(0.1), pytest.approx(0.05), pytest.approx(0.5))
    assert note == "2.00 GB of weights; 2.00 times the limit; prefill 0.500 s"
    row, note = read_weights_case("06b", 0.49, 0.5, 10, 2 * 10**9, 4e10)
    assert (row.ours_s, row.other_s, row.ratio) == (None, pytest.approx(0.05), None)
    assert note == "the prefill took 0.5000 s, the whole rollout 0.4900 s: raise --runs"


def test_a_case_that_fails_is_a_row_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(bench: Bench) -> list:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setitem(gpu_cases.CASES, "rollout", (fail, HF))
    monkeypatch.delitem(gpu_cases.CASES, "step")
    rows, notes = gpu_cases.run_cases(["tiny"], CPU, 1, 100.0)
    assert [row.ours_s is None for row in rows] == [True, False, False, False]
    assert notes["rollout_tiny"] == "OutOfMemoryError: no memory left"
    rows, notes = gpu_cases.run_cases(["tiny"], CPU, 1, 0.0)
    assert all(row.ours_s is None for row in rows)
    assert "0 s are over" in notes["loss_tiny"]


def test_where_graphs_err_what_needs_none_is_timed() -> None:
    rows, notes = gpu_cases.run_cases(["tiny"], CPU, 1, 100.0, no_graphs="graphs are not timed: row 0")
    timed = {row.case for row in rows if row.ours_s is not None}
    assert {row.case for row in rows} - timed - {"rollout_tiny/read_weights"} == {
        "rollout_tiny/plain", "rollout_tiny/fresh_graphs", "rollout_tiny/wer10", "step_tiny"
    }  # fmt: skip
    assert "rollout_tiny/no_graphs" in timed
    assert notes["rollout_tiny/plain"] == "graphs are not timed: row 0"
    assert "graphs are not timed: row 0" in notes["step_tiny"]


def rollout_of(scale: float) -> Rollout:
    size = SIZES["tiny"]
    model = make_model(size.decoder, size.whisper, CPU, torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(scale)
    inputs = make_inputs(size, CPU, torch.float32, size.whisper["num_mel_bins"])
    blocked_V = torch.zeros(size.decoder["vocab_size"], dtype=torch.bool)
    return decode(model, inputs, eos_id=382, pad_id=381, blocked_V=blocked_V, max_new_tokens=12, top_k=2)


def test_a_rollout_of_other_weights_is_noticed_and_rounding_is_not() -> None:
    assert check_graphs(CPU).endswith("fixed memory (no CUDA, no graphs) write what plain decoding writes")
    plain = rollout_of(1.0)
    assert different(plain, rollout_of(1.0)) == ""
    assert different(rollout_of(1.0 + 1e-5), plain) == ""
    assert different(rollout_of(1.2), plain).startswith("row 0 agrees for ")
    shorter = dataclasses.replace(plain, response_mask_BT=plain.response_mask_BT.clone())
    shorter.response_mask_BT[2, 5:] = False
    assert different(shorter, plain).startswith("row 2 agrees for 5 of 12 tokens")


def test_a_chunk_is_what_the_loss_makes_of_its_logits() -> None:
    """The gradient of the logarithm of the sum: the softmax."""
    logits_nV = torch.randn(5, 300)
    expected_nV = logits_nV.softmax(-1) * torch.arange(5.0)[:, None]
    torch.testing.assert_close(gpu_loss.chunk_apart(logits_nV, torch.arange(5.0)), expected_nV)
    torch.testing.assert_close(gpu_loss.chunk_part(logits_nV, torch.arange(5.0)), expected_nV)


@pytest.mark.parametrize(("name", "version"), [("transformers", "4.53.3"), ("torch", "2.4.1+cu121")])
def test_a_version_that_is_too_old_is_told(name: str, version: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} {re.escape(version)} is too old: bench.gpu needs \S+ or newer$"):
        gpu.check_version(name, version)
    gpu.check_version("transformers", "4.57.6")
    gpu.check_version("torch", "2.13.0a0+git")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_there_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    for device in ("cuda", "nosuch"):
        assert gpu.main(["--size", "tiny", "--device", device]) == 1
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith(f"error: --device {device}: torch {torch.__version__} cannot use it (")
        assert err.count("\n") == 1


def test_what_a_random_model_writes_is_not_one_token_again_and_again() -> None:
    bench = Bench("tiny", SIZES["tiny"], CPU, torch.float32, 1, 1.0)
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
