"""A student made by leaving layers of a larger model out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opd.arkasr import load_model, load_processor

ROOT = Path(__file__).resolve().parents[1]
SEED = ROOT / "seeds" / "sentence_teacher"  # three encoder layers, two of the decoder


def drop(out: Path, encoder: list[int], decoder: list[int]) -> subprocess.CompletedProcess[str]:
    numbers = ["--encoder", *map(str, encoder), "--decoder", *map(str, decoder)]
    command = [
        sys.executable,
        str(ROOT / "scripts" / "drop_layers.py"),
        "--model",
        str(SEED),
        "--out",
        str(out),
        *numbers,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_layers_that_stay_are_those_of_the_model(tmp_path: Path, waveforms: list[np.ndarray]) -> None:
    result = drop(tmp_path / "small", [0, 2], [1])
    assert result.returncode == 0, result.stderr
    large, small = load_model(SEED), load_model(tmp_path / "small")
    inputs = load_processor(tmp_path / "small").build_inputs(waveforms[:2])
    # The same function as the large model's with those layers skipped.
    del large.audio_encoder.whisper.layers[1]
    del large.model.layers[0]
    large.model.config.num_hidden_layers = 1
    with torch.no_grad():
        expected, found = (model.eval()(**inputs, use_cache=False).logits for model in (large, small))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("encoder", "decoder", "what"), [([0, 3], [0], "encoder"), ([0], [1, 0], "decoder")])
def test_layers_that_are_not_there(tmp_path: Path, encoder: list[int], decoder: list[int], what: str) -> None:
    result = drop(tmp_path / "small", encoder, decoder)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith(f"error: --{what} [")
    assert not (tmp_path / "small").exists()
