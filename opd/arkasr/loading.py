"""How this project loads a checkpoint: strictly, from the classes of this package. Not part of an export."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from .configuration_arkasr import ArkasrConfig
from .modeling_arkasr import ArkasrForConditionalGeneration
from .processing_arkasr import ArkasrProcessor

WEIGHTS_FILE, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_FILES, PROCESSOR_FILES = ("*.json", "model*.safetensors"), ("*.json", "*.jinja", "*.txt")
STORED_DTYPES = ("F32", "F16", "BF16")
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
COMPARED_ROWS = 4096


def load_model(
    path: str | os.PathLike, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> ArkasrForConditionalGeneration:
    """The model of a folder (or Hub id) in `dtype`, in eval mode, on the CPU.

    attn_implementation  sdpa (default), eager, flash_attention_2

    The weights are model.safetensors, or shards with model.safetensors.index.json, in float32, float16 or bfloat16; tied
    weights may come with the copy in lm_head or without. They are checked from the files' headers before any is read.
    Raises ValueError naming file and tensors where some are missing, unexpected, of another shape or type, in two
    shards, or not where the index says; for a damaged file; and for an lm_head that differs from what it is tied to.
    """
    folder = _local_folder(path, MODEL_FILES)
    config, shapes = _read_config(folder)
    stored = _read_headers(folder)
    _check_fit(folder, stored, shapes, config.tie_word_embeddings)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        model, info = ArkasrForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
    except ImportError as error:
        raise ValueError(
            f"attn_implementation={attn_implementation}: install its package or choose another ({_one_line(error)})"
        ) from error
    left = {kind: keys for kind, keys in info.items() if keys}
    assert not left, f"transformers reads other tensors from {folder} than its headers name: {left}"
    return model.eval()


def load_processor(path: str | os.PathLike) -> ArkasrProcessor:
    """The processor of a folder (or Hub id). Raises ValueError where there is none that ARK-ASR can use."""
    folder = _local_folder(path, PROCESSOR_FILES)
    # Not ArkasrProcessor.from_pretrained: on its way through the Auto classes transformers would ask for
    # trust_remote_code, although no code of the folder is wanted here.
    try:
        settings, _ = ArkasrProcessor.get_processor_dict(folder)
        return ArkasrProcessor(
            WhisperFeatureExtractor.from_pretrained(folder),
            PreTrainedTokenizerFast.from_pretrained(folder),
            **{
                key: settings[key]
                for key in ("audio_token", "merge_factor", "audio_dtype", "chat_template")
                if key in settings
            },
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: has no processor of ARK-ASR ({_one_line(error)})") from error


@contextmanager
def named_by(key: str, path: str | os.PathLike) -> Iterator[None]:
    """What is wrong with the checkpoint at `path` is told with the key that names it, such as "student.path="."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith(os.fspath(path)):
            raise
        raise ValueError(f"{key}{error}") from error


def check_path(path: str | os.PathLike) -> None:
    """Raises ValueError for what is neither a folder nor a Hub repository that can be read; looks at no weights."""
    _local_folder(path, ("config.json",))


# -- a checkpoint's files, checked before they are read ------------------------------------------------------------------


class _Stored(NamedTuple):
    """What the header of a safetensors file says of a tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # in the file's own words: F32, BF16, ...


def _local_folder(path: str | os.PathLike, files: tuple[str, ...]) -> Path:
    if os.path.isdir(path):
        return Path(path)
    try:
        return Path(snapshot_download(os.fspath(path), allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)}: neither a folder nor a Hub repository that can be read here; check the path, or the "
            f"repository, network and token ({_one_line(error)})"
        ) from error


def _read_config(folder: Path) -> tuple[ArkasrConfig, dict[str, tuple[int, ...]]]:
    """The configuration, and the shape of every tensor of the model that it describes."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: has no config.json, so it is no checkpoint")
    try:
        fields, _ = ArkasrConfig.get_config_dict(folder)
        if (model_type := fields.get("model_type")) != ArkasrConfig.model_type:
            raise ValueError(f"model_type is {model_type!r}, but only {ArkasrConfig.model_type!r} is read here")
        config = ArkasrConfig.from_pretrained(folder)
        with torch.device("meta"):
            state = ArkasrForConditionalGeneration(config).state_dict()
    except Exception as error:  # transformers and torch refuse a bad value in many ways
        raise ValueError(f"{path}: {_one_line(error)}") from error
    return config, {name: tuple(tensor.shape) for name, tensor in state.items()}


def _read_headers(folder: Path) -> dict[str, _Stored]:
    """Name -> what is stored, for all tensors of the single file or of the shards that the index names."""
    index_path = folder / WEIGHTS_INDEX
    has_single, has_index = (folder / WEIGHTS_FILE).is_file(), index_path.is_file()
    if has_single and has_index:
        raise ValueError(f"{folder}: has both {WEIGHTS_FILE} and {WEIGHTS_INDEX}; remove the one that is not wanted")
    if not has_single and not has_index:
        raise ValueError(f"{folder}: has neither {WEIGHTS_FILE} nor {WEIGHTS_INDEX}; only safetensors weights are read")
    weight_map = _read_index(index_path) if has_index else {}
    stored: dict[str, _Stored] = {}
    for file in sorted(set(weight_map.values())) if has_index else [WEIGHTS_FILE]:
        try:
            with safe_open(folder / file, "pt") as content:
                for name in content.keys():  # noqa: SIM118  safe_open is no mapping
                    if name in stored:
                        raise ValueError(
                            f"{folder}: {name} is in both {stored[name].file} and {file}; keep one of them"
                        )
                    header = content.get_slice(name)
                    stored[name] = _Stored(file, tuple(header.get_shape()), header.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{folder / file}: cannot be read ({_one_line(error)}); it was cut off, damaged or is a Git LFS pointer: "
                "fetch it again"
            ) from error
    if has_index:
        wrong = {name for name, file in weight_map.items() if name not in stored or stored[name].file != file}
        wrong |= stored.keys() - weight_map.keys()
        if wrong:
            raise ValueError(
                f"{index_path}: does not agree with the shards about {_first(wrong)}; fetch index and shards of one "
                "checkpoint again"
            )
    return stored


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard that holds it. All shards are there."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index with a weight_map ({_one_line(error)}); fetch it again") from error
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{path}: weight_map must map tensor names to file names; fetch it again")
    if absent := {file for file in weight_map.values() if not (path.parent / file).is_file()}:
        raise ValueError(f"{path}: names shards that are not in the folder: {_first(absent)}; fetch them")
    return weight_map


def _check_fit(folder: Path, stored: dict[str, _Stored], shapes: dict[str, tuple[int, ...]], tied: bool) -> None:
    """Raises one ValueError for all tensors that do not fit, and for a tied head of its own values."""
    known = {name: tensor for name, tensor in stored.items() if name in shapes}
    problems = {
        "missing": shapes.keys() - stored.keys() - ({LM_HEAD} if tied else set()),
        "unexpected": {f"{name} ({tensor.file})" for name, tensor in stored.items() if name not in shapes},
        "wrong shape": {
            f"{name} ({tensor.file} has {tensor.shape}, config.json says {shapes[name]})"
            for name, tensor in known.items()
            if tensor.shape != shapes[name]
        },
        "wrong type": {
            f"{name} ({tensor.file} has {tensor.dtype}, not one of {', '.join(STORED_DTYPES)})"
            for name, tensor in known.items()
            if tensor.dtype not in STORED_DTYPES
        },
    }
    if found := "; ".join(f"{what}: {_first(names)}" for what, names in problems.items() if names):
        raise ValueError(
            f"{folder}: weights do not fit config.json ({found}); take both from one and the same ARK-ASR checkpoint"
        )
    if tied and LM_HEAD in stored and not _equal_on_disk(folder, stored, LM_HEAD, EMBEDDING):
        raise ValueError(
            f"{folder}: {LM_HEAD} differs from {EMBEDDING}, to which config.json ties it, and would be lost; set "
            "tie_word_embeddings to false, or remove the tensor"
        )


def _equal_on_disk(folder: Path, stored: dict[str, _Stored], first: str, second: str) -> bool:
    """Whether two matrices of one shape are equal, read a few thousand rows at a time."""
    with safe_open(folder / stored[first].file, "pt") as a, safe_open(folder / stored[second].file, "pt") as b:
        left, right = a.get_slice(first), b.get_slice(second)
        starts = range(0, stored[first].shape[0], COMPARED_ROWS)
        return all(bool((left[i : i + COMPARED_ROWS] == right[i : i + COMPARED_ROWS]).all()) for i in starts)


def _first(names: Iterable[str], limit: int = 4) -> str:
    """The first few names in order, and how many there are in all."""
    ordered = sorted(names)
    shown = ", ".join(ordered[:limit])
    return shown if len(ordered) <= limit else f"{shown} and {len(ordered) - limit} more"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
