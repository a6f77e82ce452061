"""A student as a Hugging Face folder: config, weights, tokenizer, processor, remote code, model card."""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from safetensors.torch import save_file

from opd.arkasr import (
    CODE_FILES,
    ArkasrConfig,
    ArkasrForConditionalGeneration,
    ArkasrProcessor,
    load_model,
    load_processor,
)
from opd.arkasr.configuration_arkasr import AUTO_MAP
from opd.types import DTYPES

CODE_DIR = Path(__file__).parent / "arkasr"
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def save_arkasr(
    state_dict: Mapping[str, torch.Tensor],
    config: ArkasrConfig,
    processor: ArkasrProcessor,
    out_dir: str | os.PathLike,
    dtype: str | torch.dtype = "bfloat16",
    with_code: bool = True,
) -> Path:
    """Writes an ARK-ASR folder that transformers (with trust_remote_code) and `load_model` read; returns its path.

    state_dict  the whole model's, with or without the copy of the embedding in lm_head.weight
    dtype       of the written weights: float32, bfloat16, float16
    with_code   whether the remote code goes with it

    The folder appears at once, complete, and replaces an earlier export. Raises ValueError for weights that do not fit
    the config, a processor that does not fit it, weights that `dtype` cannot hold, and an out_dir with something else.
    """
    out_dir = Path(out_dir)
    dtype_name = str(dtype).removeprefix("torch.")
    if dtype_name not in DTYPES:
        raise ValueError(f"dtype={dtype_name!r}: must be one of {', '.join(DTYPES)}")
    if out_dir.exists() and not (out_dir / "config.json").is_file() and any(out_dir.iterdir()):
        raise ValueError(
            f"{out_dir}: holds files but no config.json, so it is no earlier export; choose another folder"
        )
    _check_processor(config, processor)
    tensors = _tensors_to_write(state_dict, config, DTYPES[dtype_name])

    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = out_dir.parent / f".{out_dir.name}.{uuid.uuid4().hex[:8]}.tmp"
    temporary.mkdir()
    try:
        processor.save_pretrained(temporary)
        _write_json(temporary / "config.json", _config_dict(config, processor, dtype_name))
        _write_json(temporary / "generation_config.json", _generation_dict(processor))
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        (temporary / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
        if with_code:
            for name in CODE_FILES:
                shutil.copyfile(CODE_DIR / name, temporary / name)
        _replace_folder(temporary, out_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out_dir


def write_model_card(out_dir: str | os.PathLike, facts: Mapping[str, Any]) -> Path:
    """Writes README.md: how to use the folder, and `facts` (nested mappings of plain values) as tables.

    The entry "eval" ({set: {"before" | "after" | "teacher": {"wer": ..., "cer": ...} or None}}) becomes the table of
    results, the entry "config" the settings at the end, all others one table of facts.
    """
    sections = [CARD_HEAD]
    if facts.get("eval"):
        sections.append("## Results\n\n" + _results_table(facts["eval"]))
    plain = {key: value for key, value in facts.items() if key not in ("eval", "config") and value is not None}
    if plain:
        sections.append("## Facts\n\n" + _table(("fact", "value"), _flatten(plain)))
    if facts.get("config"):
        sections.append("## Settings\n\n" + _table(("key", "value"), _flatten(facts["config"])))
    path = Path(out_dir) / "README.md"
    path.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return path


CARD_HEAD = """---
library_name: transformers
pipeline_tag: automatic-speech-recognition
tags:
- arkasr
- on-policy-distillation
---

# ARK-ASR student

A speech recogniser: Whisper encoder, MLP adapter, Qwen2 decoder.

```python
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

path = "."  # this folder
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
conversation = [{"role": "user", "content": [
    {"type": "audio", "path": "speech.wav"},
    {"type": "text", "text": "Please transcribe this audio."},
]}]
inputs = processor.apply_chat_template(conversation)
with torch.no_grad():
    ids = model.generate(
        **inputs, max_new_tokens=256, do_sample=False,
        suppress_tokens=processor.blocked_token_ids(model.config.vocab_size),  # control tokens are not text
    )
print(processor.clean_text(ids[0, inputs["input_ids"].shape[1]:]))
```"""


def _check_processor(config: ArkasrConfig, processor: ArkasrProcessor) -> None:
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    pairs = {
        "audio_token_id": (config.audio_token_id, processor.audio_token_id),
        "merge_factor": (config.merge_factor, processor.merge_factor),
        "num_mel_bins": (config.whisper_config.num_mel_bins, extractor.feature_size),
    }
    for name, (model_has, processor_has) in pairs.items():
        if model_has != processor_has:
            raise ValueError(
                f"{name}: config has {model_has}, the processor {processor_has}; use the model's own processor"
            )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"tokenizer: {len(tokenizer)} tokens, but config.vocab_size is {config.vocab_size}; enlarge it"
        )


def _tensors_to_write(
    state_dict: Mapping[str, torch.Tensor], config: ArkasrConfig, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The tensors of the file, after a check against the model that `config` describes."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in ArkasrForConditionalGeneration(config).state_dict().items()}
    tied = config.tie_word_embeddings
    missing = sorted(shapes.keys() - state_dict.keys() - ({LM_HEAD} if tied else set()))
    unexpected = sorted(state_dict.keys() - shapes.keys())
    if missing or unexpected:
        raise ValueError(f"state_dict does not fit the config: missing {missing}, unexpected {unexpected}")
    if tied and LM_HEAD in state_dict and not torch.equal(state_dict[LM_HEAD], state_dict[EMBEDDING]):
        raise ValueError(f"{LM_HEAD} differs from {EMBEDDING}, to which config.tie_word_embeddings ties it")
    tensors = {}
    for name, tensor in state_dict.items():
        if tied and name == LM_HEAD:
            continue
        if tensor.shape != shapes[name]:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, but the config wants {tuple(shapes[name])}")
        written = tensor.detach().to("cpu", dtype).contiguous()
        if not torch.isfinite(written).all():
            raise ValueError(f"{name}: holds values that are not finite in {dtype}; export in float32 or check the run")
        # A copy where two names share memory: safetensors refuses shared storage.
        tensors[name] = written.clone() if written.data_ptr() == tensor.data_ptr() else written
    return tensors


def _config_dict(config: ArkasrConfig, processor: ArkasrProcessor, dtype_name: str) -> dict[str, Any]:
    content = json.loads(config.to_json_string())
    # 0.6B checkpoints in transformers-4 style have only rope_theta, transformers 5 reads rope_parameters: both go in.
    content |= {
        "architectures": [ArkasrForConditionalGeneration.__name__],
        "auto_map": AUTO_MAP,
        "dtype": dtype_name,
        "rope_theta": config.rope_theta,
        **_token_ids(processor),
    }
    for key in ("torch_dtype", "_name_or_path"):
        content.pop(key, None)
    return content


def _generation_dict(processor: ArkasrProcessor) -> dict[str, Any]:
    return {"_from_model_config": True, **_token_ids(processor), "transformers_version": transformers.__version__}


def _token_ids(processor: ArkasrProcessor) -> dict[str, int]:
    tokenizer = processor.tokenizer
    # Qwen2.5 has no bos of its own; ARK-ASR's files name the padding token.
    bos_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.pad_token_id
    return {"bos_token_id": bos_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def _replace_folder(source: Path, target: Path) -> None:
    """Renames source to target; an earlier target is moved aside first and then removed."""
    old = None
    if target.exists():
        old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
        os.replace(target, old)
    os.replace(source, target)
    if old is not None:
        shutil.rmtree(old)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _results_table(evaluation: Mapping[str, Any]) -> str:
    rows = []
    for name, results in evaluation.items():
        cells = [name]
        for who in ("before", "after", "teacher"):
            result = results.get(who)
            cells.append(f"{result['wer']:.2%} / {result['cer']:.2%}" if result else "-")
        rows.append(cells)
    return _table(("set", "WER / CER before", "WER / CER after", "teacher"), rows)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(value)))
    return rows


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


# -- python -m opd.export run_dir=... [step=...] [out_dir=...] -----------------------------------------------------------


def export_checkpoint(
    run_dir: str | os.PathLike, step: int | None = None, out_dir: str | os.PathLike | None = None
) -> Path:
    """Exports a checkpoint of a run in one process, without Ray; returns the folder.

    step     of a complete checkpoint, by default the newest; out_dir by default <run_dir>/export
    Raises ValueError where there is no such run or checkpoint, naming the steps there are.
    """
    import torch.distributed.checkpoint as dcp

    run_dir = Path(run_dir).expanduser().resolve()
    if not (run_dir / "config.yaml").is_file():
        raise ValueError(f"run_dir={run_dir}: there is no run here (no config.yaml)")
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    steps = sorted(int(p.parent.name.removeprefix("step-")) for p in run_dir.glob("checkpoints/step-*/COMPLETE"))
    if not steps or (step is not None and step not in steps):
        raise ValueError(f"run_dir={run_dir}: no complete checkpoint of step {step}; there are {steps or 'none'}")
    step = steps[-1] if step is None else step
    start = config["student"]["path"] or str(run_dir / "init")
    model, processor = load_model(start), load_processor(start)
    # As the engine names them: the model is a member of what is trained.
    state = {"model": {f"model.{name}": tensor for name, tensor in model.state_dict().items()}}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is wanted
        dcp.load(state, checkpoint_id=run_dir / "checkpoints" / f"step-{step:06d}" / "state", no_dist=True)
    weights = {name.removeprefix("model."): tensor for name, tensor in state["model"].items()}
    export = config["export"]
    target = Path(out_dir) if out_dir else run_dir / "export"
    save_arkasr(weights, model.config, processor, target, export["dtype"], export["code"])
    write_model_card(target, {"recipe": config["recipe"], "stage": config["stage"], "step": step, "config": config})
    return target


def push(folder: str | os.PathLike, repository: str) -> None:
    """Uploads an export to a Hub repository, made where it is missing. Needs a token (HF_TOKEN or `hf auth login`)."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(folder_path=os.fspath(folder), repo_id=repository, commit_message="Export")


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    known = ("run_dir", "step", "out_dir", "push_to")
    transformers.utils.logging.disable_progress_bar()
    try:
        arguments = dict(argument.partition("=")[::2] for argument in argv)
        if unknown := [name for name in arguments if name not in known]:
            raise ValueError(f"unknown argument {unknown[0]}; there are {', '.join(f'{name}=...' for name in known)}")
        if not arguments.get("run_dir"):
            raise ValueError("run_dir=... is missing: the run directory to export from")
        step = arguments.get("step")
        if step is not None and not step.isdigit():
            raise ValueError(f"step={step}: must be a whole number, the step of a checkpoint")
        folder = export_checkpoint(arguments["run_dir"], int(step) if step else None, arguments.get("out_dir"))
        print(f"export: {folder}")
        if arguments.get("push_to"):
            push(folder, arguments["push_to"])
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


__all__ = ["export_checkpoint", "load_model", "load_processor", "push", "save_arkasr", "write_model_card"]

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
