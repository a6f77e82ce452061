"""A student as a Hugging Face folder: config, weights, tokenizer, processor, remote code, model card."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from data.command_line import key_values, wants_help
from opd.arkasr import (
    CODE_FILES,
    ArkasrConfig,
    ArkasrForConditionalGeneration,
    ArkasrProcessor,
    load_model,
    load_processor,
)
from opd.arkasr.configuration_arkasr import AUTO_MAP, CUSTOM_PIPELINES
from opd.card import check_card_facts, write_model_card
from opd.config import resolve_path
from opd.hub import check_folder, check_push, push
from opd.saved_run import choose_step, run_facts, saved_config
from opd.schema import LoraConfig
from opd.trainable import choose_trained, plain_state
from opd.types import DTYPES
from opd.zero_checkpoint import consolidated, is_zero_checkpoint

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
    _check_target(out_dir)
    dtype_name = str(dtype).removeprefix("torch.")
    _check_dtype(dtype_name)
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


def _check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: must be one of {', '.join(DTYPES)}")


def _check_target(out_dir: Path) -> None:
    """Raises ValueError where there is something else than an earlier export."""
    for path in (out_dir, *out_dir.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"out_dir={out_dir}: {path} is a file; choose a folder")
    if out_dir.exists() and not (out_dir / "config.json").is_file() and any(out_dir.iterdir()):
        raise ValueError(
            f"out_dir={out_dir}: holds files but no config.json, so it is no earlier export; choose another folder"
        )


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
        "custom_pipelines": CUSTOM_PIPELINES,
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


# -- python -m opd.export ----------------------------------------------------------------------------------------------

CARD_ARGUMENTS = ("license", "base_model", "datasets", "languages")
RUN_ARGUMENTS = ("run_dir", "step", "out_dir", "dtype", *CARD_ARGUMENTS)
PUSH_ARGUMENTS = ("push", "private", "revision")
EVAL_DATASET = "eval_dataset."


def export_checkpoint(
    run_dir: str | os.PathLike,
    step: int | None = None,
    out_dir: str | os.PathLike | None = None,
    card: Mapping[str, Any] | None = None,
    dtype: str | None = None,
) -> Path:
    """Exports a checkpoint of a run in one process, without Ray; returns the folder.

    step     of a checkpoint, by default the newest undamaged one; out_dir by default <run_dir>/export
    card     further facts for `opd.card.write_model_card`, such as license
    dtype    of the written weights, by default the run's export.dtype; float32 writes the master weights as they are

    The model card has the error rates that the run measured with this very checkpoint, and none where it did not.
    Every file of the checkpoint is checked against its checksum; a warning names damaged ones that are passed over.
    Raises ValueError where there is no such run or checkpoint, or `step` is damaged, as `write_model_card` does, and for
    files of the run that cannot be read; all before anything is written. Then for an out_dir that cannot be written.
    """
    run_dir = Path(run_dir).expanduser().resolve()
    config = saved_config(run_dir)
    own_dtype = config["export"]["dtype"]
    _check_dtype(dtype or own_dtype)
    config["export"] = {**config["export"], "dtype": dtype or own_dtype}
    target = Path(out_dir).expanduser() if out_dir else run_dir / "export"
    with _naming_out_dir(target):
        _check_target(target)
    step = choose_step(run_dir, config, step)
    facts = {**run_facts(run_dir, config, step, own_dtype), **(card or {}), "config": config}
    check_card_facts(facts)
    start = resolve_path(config["student"]["path"] or str(run_dir / "init"))
    model, processor = load_model(start), load_processor(start)
    lora = LoraConfig(**config["lora"])
    checkpoint = run_dir / "checkpoints" / f"step-{step:06d}"
    weights = plain_state(_trained_state(checkpoint, model, lora), lora)
    export = config["export"]
    with _naming_out_dir(target):
        save_arkasr(weights, model.config, processor, target, export["dtype"], export["code"])
        write_model_card(target, facts)
    return target


@contextmanager
def _naming_out_dir(target: Path) -> Iterator[None]:
    """Makes what the disk refuses a ValueError that names the key."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"out_dir={target}: it cannot be made or written ({reason}); choose a writable place with room"
        ) from error


def _trained_state(checkpoint: Path, model: torch.nn.Module, lora: LoraConfig) -> dict[str, torch.Tensor]:
    """The student as it was trained, from a checkpoint of either engine. `model` may get adapters."""
    if is_zero_checkpoint(checkpoint):
        return consolidated(checkpoint)
    import torch.distributed.checkpoint as dcp

    choose_trained(model, [], lora)
    # As the engine names them: the model is a member of what is trained.
    state = {"model": {f"model.{name}": tensor for name, tensor in model.state_dict().items()}}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is wanted
            dcp.load(state, checkpoint_id=checkpoint / "state", no_dist=True)
    except (dcp.CheckpointException, RuntimeError) as error:
        raise ValueError(
            f"{checkpoint}: holds no weights of the model that the run started from ({str(error).strip().splitlines()[-1]}); "
            "restore the student.path of the run, as it was then"
        ) from error
    return state["model"]


USAGE = """python -m opd.export ...

run_dir=DIR [step=N] [out_dir=DIR] [dtype=float32|bfloat16|float16]    exports a checkpoint
    license=ID base_model=ORG/NAME datasets=ORG/A,ORG/B languages=en,de eval_dataset.SET=ORG/DATASET:TASK
                                      what the model card says beside what the run knows (`opd.card`)
    push=ORG/NAME [private=true] [revision=BRANCH]    and pushes it, after checks before the export (`opd.hub`)
folder=DIR push=ORG/NAME ...          pushes a finished export"""


def main(argv: list[str]) -> int:
    """Command line, as USAGE says; returns the exit status."""
    if wants_help(argv):
        print(USAGE)
        return 0
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        arguments = _read_arguments(argv)
        repository, revision = arguments.get("push"), arguments.get("revision")
        private = {"true": True, "false": False}[arguments["private"]] if "private" in arguments else None
        if "folder" in arguments:
            check_folder(Path(arguments["folder"]))
        else:
            saved_config(Path(arguments["run_dir"]).expanduser().resolve())
        if repository:
            check_push(repository, private)
        if "folder" in arguments:
            folder = Path(arguments["folder"])
        else:
            step = arguments.get("step")
            folder = export_checkpoint(
                arguments["run_dir"], int(step) if step else None, arguments.get("out_dir"), _card_facts(arguments),
                arguments.get("dtype"),
            )  # fmt: skip
            print(f"export: {folder}")
        if repository:
            print(f"push: {push(folder, repository, private, revision)}")
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _read_arguments(argv: list[str]) -> dict[str, str]:
    sets = [name for name in (argument.partition("=")[0] for argument in argv) if name.startswith(EVAL_DATASET)]
    arguments = key_values(argv, (*RUN_ARGUMENTS, f"{EVAL_DATASET}SET", "folder", *PUSH_ARGUMENTS, *sets))
    if empty := [name for name, value in arguments.items() if not value]:
        raise ValueError(f"{empty[0]}= is empty: give it a value, or leave it out")
    if "folder" in arguments:
        if other := [name for name in arguments if name not in ("folder", *PUSH_ARGUMENTS)]:
            raise ValueError(f"{other[0]}= does not go with folder=, which pushes an export as it is: leave one out")
        if "push" not in arguments:
            raise ValueError("push=ORG/NAME is missing: where the folder goes")
    elif "run_dir" not in arguments:
        raise ValueError("run_dir=... is missing: the run directory to export from (or folder=..., an export to push)")
    if "push" not in arguments and (other := [name for name in PUSH_ARGUMENTS if name in arguments]):
        raise ValueError(f"{other[0]}= is of no use without push=ORG/NAME: add it, or leave {other[0]}= out")
    if not arguments.get("step", "0").isdigit():
        raise ValueError(f"step={arguments['step']}: must be a whole number, the step of a checkpoint")
    if arguments.get("private", "true") not in ("true", "false"):
        raise ValueError(f"private={arguments['private']}: must be true or false")
    return arguments


def _card_facts(arguments: Mapping[str, str]) -> dict[str, Any]:
    facts: dict[str, Any] = {name: arguments[name] for name in CARD_ARGUMENTS if name in arguments}
    for name in {"datasets", "languages"} & facts.keys():
        facts[name] = facts[name].split(",")
    sets = {name: value for name, value in arguments.items() if name.startswith(EVAL_DATASET)}
    facts["eval_datasets"] = {name.removeprefix(EVAL_DATASET): value for name, value in sets.items()}
    return facts


__all__ = ["export_checkpoint", "load_model", "load_processor", "push", "save_arkasr", "write_model_card"]

if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
