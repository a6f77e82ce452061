"""The model card of an export: README.md with the metadata that the Hub shows, and files in .eval_results/."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from data.sound import HUGGINGFACE_PREFIX
from opd.text import resolve_language

PIPELINE_TAG = "automatic-speech-recognition"
# How the snippets name the model. `opd.hub.push` puts the repository in their place.
LOCAL_PATH, TRUST_CODE = 'path = "."  # this folder', "trust_remote_code=True"
EVAL_RESULTS_DIR, EVAL_RESULTS_PREFIX = ".eval_results", "opd-"
NOT_IN_TABLES = ("eval", "config", "license", "base_model", "datasets", "languages", "eval_datasets")
OF_THIS_MACHINE = ("run_dir", "export_dir")  # in the facts or in the config: of no meaning anywhere else


def write_model_card(out_dir: str | os.PathLike, facts: Mapping[str, Any]) -> Path:
    """Writes README.md (metadata, how to use the folder, `facts` as tables) and .eval_results/; returns README.md's path.

    `facts` are nested mappings of plain values, and None for what is not known:

    eval           {set: {"before" | "after" | "teacher": {"wer": ..., "cer": ...} or None}}, rates as fractions: the table
                   of results, and "after" the metadata's `model-index`, in %; with "normaliser" and "num_utterances" in
                   a result, these are told too
    config         the run's configuration: the settings at the end, and what the metadata says of start and teacher
    license        identifier of the Hub's list, such as apache-2.0; without one the Hub shows the licence as unknown
    base_model     Hub id of the model that the student started from; by default student.path where that is a Hub id
    datasets       Hub ids of what it was trained on
    languages      codes or English names; by default data.default_language
    eval_datasets  {set: "ORG/DATASET:TASK"}: the set is that task of that benchmark on the Hub
    anything else  a row of the table of facts

    The card is for the public: of a local path it tells the last part only, and nothing of OF_THIS_MACHINE. Numbers are
    rounded among the facts, and exact among the settings.

    `.eval_results/opd-<set>.yaml` is the Hub's own format (https://huggingface.co/docs/hub/eval-results). It names a
    benchmark data set of the Hub and a task of its eval.yaml, and the Hub lists the value on that leaderboard. A manifest
    is no such data set, so a file is written for the sets in eval_datasets only: whoever gives the id vouches that the
    manifest holds the whole task. The value is the WER in %; the notes name the normaliser and the number of utterances.

    Raises ValueError for ids that are none, two sets of one task, and a set of eval_datasets that was not measured.
    """
    out_dir = Path(out_dir)
    benchmarks = _benchmarks(facts)
    card = ModelCard(f"---\n{_metadata(facts, benchmarks).to_yaml()}\n---\n\n{_text(facts)}\n")
    path = out_dir / "README.md"
    path.write_text(str(card), encoding="utf-8")
    _write_eval_results(out_dir / EVAL_RESULTS_DIR, facts, benchmarks)
    return path


def check_card_facts(facts: Mapping[str, Any]) -> None:
    """Raises the ValueError that `write_model_card` would raise."""
    _metadata(facts, _benchmarks(facts))


# -- metadata ------------------------------------------------------------------------------------------------------------


def _metadata(facts: Mapping[str, Any], benchmarks: Mapping[str, tuple[str, str]]) -> ModelCardData:
    config = facts.get("config") or {}
    start = _at(config, "student", "path")
    base_model = facts.get("base_model") or (start if _is_hub_id(start) else None)
    datasets = list(facts.get("datasets") or [])
    for key, ids in (("base_model", [base_model] if base_model else []), ("datasets", datasets)):
        if wrong := [name for name in ids if not _is_hub_id(name)]:
            raise ValueError(f"{key}={wrong[0]}: must be a Hub id, written owner/name")
    results = _eval_results(facts, benchmarks)
    return ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=datasets or None,
        eval_results=results or None,
        language=_language_codes(facts) or None,
        library_name="transformers",
        license=facts.get("license"),
        metrics=sorted({result.metric_type for result in results}, reverse=True) or None,
        model_name=f"ARK-ASR {facts.get('recipe', 'student')}" if results else None,
        pipeline_tag=PIPELINE_TAG,
        tags=["arkasr", *(["on-policy-distillation"] if facts.get("stage", "opd") == "opd" else [])],
    )


def _eval_results(facts: Mapping[str, Any], benchmarks: Mapping[str, tuple[str, str]]) -> list[EvalResult]:
    """WER and CER of each set, in %."""
    results = []
    for name, result in _measured(facts).items():
        dataset, task = benchmarks.get(name, (name, None))
        for metric in ("wer", "cer"):
            if math.isfinite(result.get(metric, math.nan)):
                results.append(
                    EvalResult(
                        task_type=PIPELINE_TAG,
                        task_name="Automatic Speech Recognition",
                        dataset_type=dataset,
                        dataset_name=name,
                        dataset_config=task,  # else two tasks of one data set would be merged into one entry
                        dataset_split=None if task else _split(facts.get("config") or {}, name),
                        metric_type=metric,
                        metric_name=metric.upper(),
                        metric_value=_percent(result[metric]),
                        metric_args={"normaliser": result["normaliser"]} if result.get("normaliser") else None,
                    )
                )
    return results


def _split(config: Mapping[str, Any], name: str) -> str:
    """`validation` for the set whose WER chose the checkpoint, else `test`."""
    best_by = _at(config, "eval", "best_by") or next(iter(_at(config, "data", "eval_manifests") or {}), None)
    return "validation" if _at(config, "eval", "patience") and name == best_by else "test"


def _benchmarks(facts: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """{set: (Hub id of the data set, task)} of facts["eval_datasets"]."""
    measured = _measured(facts)
    found: dict[str, tuple[str, str]] = {}
    for name, text in (facts.get("eval_datasets") or {}).items():
        dataset, _, task = text.partition(":")
        where = f"eval_dataset.{name}={text}"
        if not _is_hub_id(dataset) or not re.fullmatch(r"[\w.-]+", task):
            raise ValueError(f"{where}: must be written owner/name:task, with a task of the data set's eval.yaml")
        if name not in measured or not math.isfinite(measured[name].get("wer", math.nan)):
            raise ValueError(
                f"{where}: this checkpoint has no WER on a set {name}; it has one on {', '.join(measured) or 'none'}"
            )
        if limit := _at(facts.get("config") or {}, "eval", "max_utterances"):
            raise ValueError(
                f"{where}: eval.max_utterances={limit}, so only a part of the set was measured, which is no result of "
                "the benchmark; leave this argument out"
            )
        if same := [other for other, known in found.items() if known == (dataset, task)]:
            raise ValueError(f"{where}: eval_dataset.{same[0]} is the same task; give it to one of the two sets")
        found[name] = (dataset, task)
    return found


def _write_eval_results(folder: Path, facts: Mapping[str, Any], benchmarks: Mapping[str, tuple[str, str]]) -> None:
    for earlier in folder.glob(f"{EVAL_RESULTS_PREFIX}*.yaml"):
        earlier.unlink()
    for name, (dataset, task) in benchmarks.items():
        result = _measured(facts)[name]
        notes = ["WER in %"]
        if result.get("normaliser"):
            notes.append(f"normaliser {result['normaliser']}")
        if result.get("num_utterances"):
            notes.append(f"{result['num_utterances']} utterances")
        entry = EvalResultEntry(dataset, task, _percent(result["wer"]), notes=", ".join(notes))
        folder.mkdir(exist_ok=True)
        path = folder / f"{EVAL_RESULTS_PREFIX}{re.sub(r'[^A-Za-z0-9_.-]', '-', name)}.yaml"
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False), encoding="utf-8")


def _measured(facts: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{set: result of the exported weights}, without the sets that have none."""
    return {name: results["after"] for name, results in (facts.get("eval") or {}).items() if results.get("after")}


def _percent(rate: float) -> float:
    return round(100 * rate, 2)


def _language_codes(facts: Mapping[str, Any]) -> list[str]:
    """ISO 639-1 codes in alphabetical order."""
    if facts.get("languages"):
        return sorted({resolve_language(language).iso for language in facts["languages"]})
    default = _at(facts.get("config") or {}, "data", "default_language")
    try:
        return [resolve_language(default).iso] if default else []
    except ValueError:  # a run on audio alone never asks what its default language means
        return []


def _is_hub_id(name: str | None) -> bool:
    if name is None or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _at(values: Mapping[str, Any], section: str, key: str) -> Any:
    return (values.get(section) or {}).get(key)


# -- text ----------------------------------------------------------------------------------------------------------------

USAGE = f"""## Use

```python
from transformers import pipeline

{LOCAL_PATH}
transcribe = pipeline("automatic-speech-recognition", model=path, {TRUST_CODE})
print(transcribe("speech.wav")["text"])
```

The same step by step:

```python
import torch
from transformers import AutoModelForCausalLM, AutoProcessor

{LOCAL_PATH}
model = AutoModelForCausalLM.from_pretrained(path, {TRUST_CODE}).eval()
processor = AutoProcessor.from_pretrained(path, {TRUST_CODE})
conversation = [{{"role": "user", "content": [
    {{"type": "audio", "path": "speech.wav"}},
    {{"type": "text", "text": "Please transcribe this audio."}},
]}}]
inputs = processor.apply_chat_template(conversation)
with torch.no_grad():
    ids = model.generate(
        **inputs, max_new_tokens=256, do_sample=False,
        suppress_tokens=processor.blocked_token_ids(model.config.vocab_size),  # control tokens are not text
    )
print(processor.clean_text(ids[0, inputs["input_ids"].shape[1]:]))
```"""


def _text(facts: Mapping[str, Any]) -> str:
    sections = ["# ARK-ASR student", _introduction(facts), USAGE]
    if facts.get("eval"):
        sections.append("## Results\n\n" + _results_table(facts["eval"]))
    left_out = (*NOT_IN_TABLES, *OF_THIS_MACHINE)
    plain = {key: value for key, value in facts.items() if key not in left_out and value is not None}
    if plain:
        sections.append("## Facts\n\n" + _table(("fact", "value"), _flatten(plain, _rounded)))
    if settings := {key: value for key, value in (facts.get("config") or {}).items() if key not in OF_THIS_MACHINE}:
        sections.append("## Settings\n\n" + _table(("key", "value"), _flatten(settings)))
    return "\n\n".join(sections)


def _introduction(facts: Mapping[str, Any]) -> str:
    config = facts.get("config") or {}
    sentences = ["A speech recogniser: Whisper encoder, MLP adapter, Qwen2 decoder."]
    if start := facts.get("base_model") or _at(config, "student", "path"):
        sentences.append(f"It started from {_model_name(start)}.")
    teachers = [_model_name(path) for path in _teacher_paths(config)]
    if teachers and facts.get("stage") == "opd":
        noun, verb = ("teacher", "was") if len(teachers) == 1 else ("teachers", "were")
        sentences.append(f"Its {noun} in on-policy distillation {verb} {', '.join(teachers)}.")
    return " ".join(sentences)


def _teacher_paths(config: Mapping[str, Any]) -> list[str]:
    path, routes = _at(config, "teacher", "path"), _at(config, "teacher", "routes") or {}
    paths = [route.get("path", path) for route in routes.values()] or [path]
    return sorted({path for path in paths if path})


def _model_name(path: str) -> str:
    """A link for a Hub id, the last part of a local path."""
    return f"[{path}](https://huggingface.co/{path})" if _is_hub_id(path) else f"`{Path(path).name}`"


def _results_table(evaluation: Mapping[str, Any]) -> str:
    rows = []
    for name, results in evaluation.items():
        cells = [name]
        for who in ("before", "after", "teacher"):
            result = results.get(who)
            cells.append(f"{result['wer']:.2%} / {result['cer']:.2%}" if result else "-")
        rows.append(cells)
    return _table(("set", "WER / CER before", "WER / CER after", "teacher"), rows)


def _flatten(
    values: Mapping[str, Any], number: Callable[[float], float] = float, prefix: str = ""
) -> list[tuple[str, str]]:
    """Rows (dotted key, value); `number` is applied to every float."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += _flatten(value, number, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", str(_public(value, number))))
    return rows


def _public(value: Any, number: Callable[[float], float]) -> Any:
    if isinstance(value, list | tuple):
        return [_public(item, number) for item in value]
    if isinstance(value, str):  # several paths may stand in one text, as those of the teachers do
        return ", ".join(_without_folders(part) for part in value.split(", "))
    return number(value) if isinstance(value, float) else value


def _without_folders(text: str) -> str:
    """The last part of a local path, that of a Hugging Face data set included; any other text as it is."""
    prefix = HUGGINGFACE_PREFIX if text.startswith(HUGGINGFACE_PREFIX) else ""
    path, mark, query = text.removeprefix(prefix).partition("?") if prefix else (text, "", "")
    is_local = path.startswith(("~", "./", "../")) or (path.startswith("/") and path.count("/") > 1)
    return f"{prefix}{Path(path).name}{mark}{query}" if is_local else text


def _rounded(value: float) -> float:
    """Two decimals; below 1, two digits that count."""
    return round(value, 2) if abs(value) >= 1 else float(f"{value:.2g}")


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(lines)
