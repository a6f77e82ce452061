"""Configurations of teachers, as workers get them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_teachers import ARKASR, GLM_PROMPT, QWEN3_ASR, make_glm


@pytest.fixture(scope="session")
def glm_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_glm(tmp_path_factory.mktemp("models") / "glm")


@pytest.fixture(scope="session")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another interpreter, which sees this one's packages but not this project."""
    path = tmp_path_factory.mktemp("environment") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(path)], check=True)
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    own = Path(sys.prefix) / "lib" / version / "site-packages"
    (path / "lib" / version / "site-packages" / "others.pth").write_text(f"{own}\n")
    return path / "bin" / "python"


@pytest.fixture
def make_config(glm_dir: Path) -> Callable[..., dict[str, Any]]:
    """What a worker gets (`Config.to_dict`), as far as teachers read it."""

    def make(kind: str, loss: dict[str, Any] | None = None, **teacher: Any) -> dict[str, Any]:
        paths = {"arkasr": ARKASR, "qwen3_asr": QWEN3_ASR, "hf": glm_dir}
        section = {
            "kind": kind, "path": str(paths[kind]), "dtype": "float32", "attn_implementation": "sdpa",
            "language": "manifest", "prompt": {"text": GLM_PROMPT} if kind == "hf" else {}, "routes": {}, "cache_dir": None,
        }  # fmt: skip
        return {
            "teacher": section | teacher,
            "cluster": {"use_gpu": False, "threads_per_teacher": 1},
            "data": {"max_seconds": 30.0, "on_bad_audio": "stop", "read_timeout_s": 120.0},
            "rollout": {"max_new_tokens": 12, "max_repeats": 8, "source": "student"},
            "loss": {"kind": "forward_kl", "top_k": 8, "temperature": 1.0, "support": "union"} | (loss or {}),
        }

    return make
