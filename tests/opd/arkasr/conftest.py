"""Shared by the tests of the remote code: an export, isolated processes that load it, and a local web server."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).resolve().parents[3]
SEEDS = ROOT / "seeds"


@pytest.fixture(scope="session")
def compat() -> ModuleType:
    """scripts/compat.py; by its path, because verl installs a package named scripts."""
    specification = importlib.util.spec_from_file_location("compat", ROOT / "scripts" / "compat.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def teacher_export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher as a user gets it: in bfloat16, with the remote code."""
    from opd.export import load_model, load_processor, save_arkasr

    model, processor = load_model(SEEDS / "tiny_teacher"), load_processor(SEEDS / "tiny_teacher")
    return save_arkasr(model.state_dict(), model.config, processor, tmp_path_factory.mktemp("exports") / "teacher")


@pytest.fixture(scope="session")
def run_isolated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """run(program, *arguments): what the program prints last, as JSON; neither this folder nor PYTHONPATH is on its path."""
    folder = tmp_path_factory.mktemp("isolated")
    caches = {"HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | caches
    (folder / "empty").mkdir()

    def run(program: str, *arguments: Any) -> Any:
        done = subprocess.run(
            [sys.executable, "-I", "-c", program, *map(str, arguments)],
            cwd=folder / "empty",
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def served(
    tmp_path_factory: pytest.TempPathFactory, waveforms: list[np.ndarray]
) -> Iterator[tuple[np.ndarray, str, bytes]]:
    """(waveform, address of its FLAC file on a local server, bytes of the file)."""
    folder = tmp_path_factory.mktemp("served")
    soundfile.write(folder / "a.flac", waveforms[0], 16000)
    samples, _ = soundfile.read(folder / "a.flac", dtype="float32")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield samples, f"http://127.0.0.1:{server.server_port}/a.flac", (folder / "a.flac").read_bytes()
    server.shutdown()
    thread.join()
    server.server_close()
