"""Values that cannot be run are refused here, before anything is started: one line that names the key and the fix."""

from __future__ import annotations

import dataclasses
import math
from types import NoneType
from typing import TYPE_CHECKING, Any

from data.sound import is_stream
from opd.normalisers import NORMALISERS

if TYPE_CHECKING:
    from opd.schema import Config, TeacherConfig

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = ("sdpa", "eager", "flash_attention_2")
TEACHER_KINDS = ("arkasr", "qwen3_asr", "hf")
STAGES = ("sft", "td", "opd")
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PROMPT_FORMS = {"text": str, "chat": list, "transcription": dict}
_ROUTE_FORMS: dict[str, tuple[tuple[type, ...], str]] = {  # keys of a route that OmegaConf knows no type of
    "path": ((str, NoneType), "the folder or the Hub id of a teacher"),
    "python_path": ((str, NoneType), "the path of a Python interpreter, such as .venv-teacher/bin/python, or null"),
    "cache_dir": ((str, NoneType), "a folder, or null"),
    "prompt": ((dict,), "a mapping with one of text, chat, transcription (opd/teachers/hf.py shows each form)"),
    "min_coverage": ((int, float), "a number between 0 and 1, such as 0.9"),
    "gate_max_wer": ((int, float, NoneType), "a WER from 0 on (0.2 is 20 %), or null"),
    "num_workers": ((int,), "a whole number above 0"),
}
_CHOICES = {
    "stage": STAGES, "rollout.source": ("student", "manifest"), "rollout.draft": ("auto", "reference", "earlier", "ctc", "none"),
    "engine": ("fsdp2", "deepspeed"), "zero.stage": (1, 2, 3), "resume": ("auto", "never"), "schedule": ("sync", "one_step_off"),
    "student.dtype": DTYPES[:2], "teacher.kind": TEACHER_KINDS, "teacher.dtype": DTYPES, "export.dtype": DTYPES,
    "data.on_bad_audio": ("stop", "skip"), "loss.support": ("union", "student", "teacher"),
    "loss.kind": ("forward_kl", "reverse_kl", "jsd", "sampled_kl", "full_kl"),
    "eval.normaliser": ("auto", *NORMALISERS),
    "optim.lr_schedule": ("cosine", "constant"), "wandb.mode": ("online", "offline", "disabled"),
    "student.attn_implementation": ATTENTION,
    "teacher.attn_implementation": ATTENTION,
}  # fmt: skip
_POSITIVE = (
    "checkpoint.grace_s", "data.max_seconds", "data.read_timeout_s",
    "td.max_chars_per_second", "rollout.max_new_tokens", "rollout.max_repeats", "loss.top_k", "loss.temperature",
    "loss.max_importance", "loss.chunk_size", "lora.alpha", "optim.lr", "optim.eps", "train.num_steps", "train.batch_size",
    "train.micro_batch_size", "train.log_every", "checkpoint.checkpoint_every", "checkpoint.keep_last", "eval.batch_size",
    "cluster.num_nodes", "cluster.ranks_per_node", "cluster.num_teachers",
    "cluster.gpus_per_rank", "cluster.threads_per_rank", "cluster.threads_per_teacher",
    "cluster.placement_timeout_s", "cluster.start_timeout_s", "cluster.call_timeout_s", "cluster.collective_timeout_s",
)  # fmt: skip
_NOT_NEGATIVE = (
    "rollout.temperature", "loss.ctc_weight", "optim.weight_decay", "optim.max_grad_norm", "optim.warmup_steps",
    "eval.eval_every", "td.min_chars_per_second", "eval.max_utterances", "eval.num_samples", "eval.patience", "data.sorted_epochs",
    "data.num_threads", "train.micro_batch_tokens", "train.max_restarts", "lora.rank",
    "cluster.cpus_per_rank", "cluster.cpus_per_teacher", "cluster.gpus_per_teacher", "seed",
)  # fmt: skip
_AT_MOST = {
    "td.min_avg_logprob": 0, "data.num_threads": 256, "cluster.threads_per_rank": 1024, "cluster.threads_per_teacher": 1024,
}  # fmt: skip
_SHARES = ("teacher.min_coverage", "data.max_bad_share", "loss.beta", "optim.min_lr_ratio")


def _get(config: Config, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def validate(config: Config) -> None:
    """Raises ValueError for values that cannot be run, before anything is started."""
    for dotted, choices in _CHOICES.items():
        if _get(config, dotted) not in choices:
            raise ValueError(f"{dotted}={_get(config, dotted)}: must be one of {', '.join(map(str, choices))}")
    _validate_finite(config)
    for dotted in _POSITIVE:
        if not _get(config, dotted) > 0:
            raise ValueError(f"{dotted}={_get(config, dotted)}: must be above 0")
    for dotted in _NOT_NEGATIVE:
        if not _get(config, dotted) >= 0:
            raise ValueError(f"{dotted}={_get(config, dotted)}: must not be negative")
    for dotted, most in _AT_MOST.items():
        if not _get(config, dotted) <= most:
            raise ValueError(f"{dotted}={_get(config, dotted)}: must be at most {most}")
    for dotted in _SHARES:
        if not 0 <= _get(config, dotted) <= 1:
            raise ValueError(f"{dotted}={_get(config, dotted)}: must be between 0 and 1")
    _validate_parts(config)
    _validate_division(config)


def _validate_finite(values: Any, prefix: str = "") -> None:
    """No infinite number and no NaN, in whichever key."""
    for f in dataclasses.fields(values):
        value = getattr(values, f.name)
        if dataclasses.is_dataclass(value):
            _validate_finite(value, f"{prefix}{f.name}.")
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{prefix}{f.name}={value}: must be a finite number")


def doubts(config: Config) -> list[str]:
    """What can be run and is probably not meant, a line each."""
    steps, warmup = config.train.num_steps, config.optim.warmup_steps
    if warmup >= steps:
        return [
            f"warning: optim.warmup_steps={warmup}: the run ends after {steps} steps (train.num_steps), before the learning "
            "rate is at its peak; lower one or raise the other"
        ]
    return []


def _validate_parts(config: Config) -> None:
    unknown = set(config.student.freeze) - {"encoder", "adapter", "decoder"}
    if unknown:
        raise ValueError(f"student.freeze={config.student.freeze}: parts are encoder, adapter, decoder")
    if len(config.student.freeze) == 3:
        raise ValueError("student.freeze: encoder, adapter and decoder are all frozen, nothing is left to train")
    _validate_lora(config)
    _validate_engine(config)
    if (config.student.path is None) == (not config.student.init):
        raise ValueError(
            "student: give either student.path (a model to start from) or student.init (sizes of a new one)"
        )
    _validate_data(config)
    _validate_routes(config.teacher)
    if config.stage != "sft":
        _validate_teachers(config.teacher, config.stage)
    _validate_optional(config)
    if config.rollout.source == "manifest" and (config.rollout.temperature > 0 or config.loss.kind == "sampled_kl"):
        raise ValueError(
            "rollout.source=manifest: its texts are not drawn; set rollout.temperature=0 and another loss than sampled_kl"
        )
    if config.stage == "opd" and config.loss.kind == "sampled_kl" and config.rollout.temperature == 0:
        raise ValueError("loss.kind=sampled_kl needs sampled rollouts: set rollout.temperature above 0")
    if config.loss.kind == "jsd" and not 0 < config.loss.beta < 1:
        raise ValueError(
            f"loss.beta={config.loss.beta:g}: jsd needs a weight between 0 and 1; at either end it is always 0"
        )
    if config.loss.kind == "sampled_kl" and config.loss.renormalize:
        raise ValueError("loss.renormalize=true: sampled_kl has no support to renormalise over; set it to false")
    if config.stage == "opd" and config.loss.ctc_weight > 0:
        raise ValueError("loss.ctc_weight: the CTC aid belongs to stage sft; set it to 0")
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ValueError(f"optim.betas={config.optim.betas}: two numbers from 0 to below 1")
    if config.eval.best_by and config.eval.best_by not in config.data.eval_manifests:
        raise ValueError(f"eval.best_by={config.eval.best_by}: not in data.eval_manifests")


def _validate_data(config: Config) -> None:
    data = config.data
    if bool(data.train_manifest) == bool(data.train_manifests):
        has = "both are given" if data.train_manifest else "neither is given"
        raise ValueError(
            f"data: {has}; give data.train_manifest (one manifest) or data.train_manifests (several, by name), and set the "
            "other to null or {}"
        )
    names = data.train_manifests.keys() | data.eval_manifests.keys()
    for name, language in data.default_languages.items():
        if name not in names or not isinstance(language, str):
            raise ValueError(
                f"data.default_languages.{name}={language}: must be the language of a manifest by its name "
                f"({', '.join(sorted(names)) or 'there is none'})"
            )
    for name, source in data.train_manifests.items():
        where = f"data.train_manifests.{name}"
        if (
            not isinstance(source, dict)
            or not isinstance(source.get("path"), str)
            or source.keys() - {"path", "weight"}
        ):
            raise ValueError(f"{where}: must be {{path: ..., weight: ...}} (without a weight it is 1), not {source}")
        weight = source.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(f"{where}.weight={weight}: must be a number above 0")
        if source["path"].startswith("stage:"):
            raise ValueError(f"{where}.path={source['path']}: only data.train_manifest may name another stage's data")
    if data.train_manifests and (config.stage == "td" or data.sorted_epochs):
        what = "stage=td" if config.stage == "td" else "data.sorted_epochs"
        raise ValueError(f"{what}: works with one manifest; set data.train_manifest instead of data.train_manifests")
    _validate_streams(config)


def _validate_streams(config: Config) -> None:
    """A stream can be trained on; all else needs to know every utterance."""
    data = config.data
    streamed = [name for name in (data.train_manifest, *(s["path"] for s in data.train_manifests.values())) if name]
    streamed = [name for name in streamed if is_stream(name)]
    if not streamed:
        return
    needs = {
        "stage=td": config.stage == "td",
        "data.sorted_epochs": data.sorted_epochs > 0,
        "student.init (its tokenizer is made of all texts)": bool(config.student.init),
    }
    for what, needed in needs.items():
        if needed:
            raise ValueError(
                f"{what}: not with {streamed[0]}, which is a stream; leave stream=true out, or import it first"
            )


def _validate_engine(config: Config) -> None:
    """What an engine cannot do."""
    if config.engine != "deepspeed" and dataclasses.astuple(config.zero) != (2, False):
        raise ValueError(f"zero: these keys are those of engine=deepspeed; leave them out with engine={config.engine}")
    if config.engine == "deepspeed" and config.zero.offload_params and config.zero.stage != 3:
        raise ValueError(
            f"zero.offload_params=true: with zero.stage={config.zero.stage} every rank computes with all weights, so "
            "they must be on its device; set zero.stage=3"
        )


def _validate_lora(config: Config) -> None:
    lora = config.lora
    if not 0 <= lora.dropout < 1:
        raise ValueError(f"lora.dropout={lora.dropout:g}: must be from 0 to below 1")
    if unknown := [name for name in lora.target_modules if name not in LORA_TARGETS]:
        raise ValueError(
            f"lora.target_modules: {unknown[0]} is no layer of the decoder; any of {', '.join(LORA_TARGETS)}"
        )
    if lora.rank and not lora.target_modules:
        raise ValueError("lora.target_modules is empty: name the layers that get an adapter, or set lora.rank=0")
    if lora.rank and "decoder" in config.student.freeze:
        raise ValueError(
            "student.freeze: with lora.rank above 0 the decoder's weights are frozen and its adapters train; "
            "take decoder out of it, or set lora.rank=0"
        )


def _validate_optional(config: Config) -> None:
    """Keys that may be null; both are WER limits, and 0 lets only what is all right pass."""
    limits = {"td.max_wer": config.td.max_wer, "teacher.gate_max_wer": config.teacher.gate_max_wer}
    routes = config.teacher.routes.items()
    limits |= {f"teacher.routes.{name}.gate_max_wer": route.get("gate_max_wer") for name, route in routes}
    for dotted, value in limits.items():
        if value is not None and (isinstance(value, str) or not value >= 0):
            raise ValueError(f"{dotted}={value}: must be a WER from 0 on (0.2 is 20 %), or null")
    gates = [dotted for dotted, value in limits.items() if value is not None and dotted.startswith("teacher.")]
    if gates and config.stage != "opd":
        raise ValueError(
            f"{gates[0]}: belongs to stage opd; stage {config.stage} has td.max_wer or no teacher: set it to null; "
            "in a ladder set ladder.opd.teacher.gate_max_wer instead, in a comparison compare.arms.opd.teacher.gate_max_wer"
        )


def _validate_routes(teacher: TeacherConfig) -> None:
    """Every route has known keys and values of their types, in stage sft too: it takes none, but it reads them."""
    known = {f.name for f in dataclasses.fields(teacher)} - {"routes"} | {"match", "num_workers"}
    for name, route in teacher.routes.items():
        where = f"teacher.routes.{name}"
        if not isinstance(route, dict) or not isinstance(route.get("match", {}), dict):
            raise ValueError(f"{where}: a route is a mapping of keys, and so is its match (field: value or values)")
        if unknown := sorted(route.keys() - known):
            raise ValueError(f"{where}: unknown key {unknown[0]}; a route has {', '.join(sorted(known))}")
        for key, (forms, meaning) in _ROUTE_FORMS.items():
            if key in route and (not isinstance(route[key], forms) or isinstance(route[key], bool)):
                raise ValueError(f"{where}.{key}={route[key]}: must be {meaning}")
        if route.get("num_workers", 1) < 1:
            raise ValueError(f"{where}.num_workers={route['num_workers']}: must be {_ROUTE_FORMS['num_workers'][1]}")


def _validate_teachers(teacher: TeacherConfig, stage: str) -> None:
    """Every teacher has what its kind needs."""
    for name, one in teacher.by_route().items():
        where = f"teacher.routes.{name}" if name else "teacher"
        for field, choices in (("kind", TEACHER_KINDS), ("dtype", DTYPES), ("attn_implementation", ATTENTION)):
            if getattr(one, field) not in choices:
                raise ValueError(f"{where}.{field}={getattr(one, field)}: must be one of {', '.join(choices)}")
        if not one.path:
            raise ValueError(f"{where}.path is missing: stage {stage} needs a teacher")
        if isinstance(one.min_coverage, str) or not 0 <= one.min_coverage <= 1:
            raise ValueError(f"{where}.min_coverage={one.min_coverage}: must be between 0 and 1")
        if not isinstance(one.language, str):
            raise ValueError(f"{where}.language={one.language}: manifest, auto, or a language (in quotes)")
        _validate_prompt(one, where)
        if one.language not in ("manifest", "auto"):
            _validate_language(one, where)


def _validate_language(teacher: TeacherConfig, where: str) -> None:
    """A language for all utterances, which somebody must hear of."""
    from opd.teachers.languages import takes_language  # here, because it brings torch

    if not takes_language(vars(teacher)):
        nobody = "this prompt names no language" if teacher.kind == "hf" else f"kind {teacher.kind} is told no language"
        raise ValueError(
            f"{where}.language={teacher.language}: {nobody}, so this would change nothing; set {where}.language=manifest"
        )


def _validate_prompt(teacher: TeacherConfig, where: str) -> None:
    prompt = teacher.prompt
    if teacher.kind != "hf":
        if prompt:
            raise ValueError(f"{where}.prompt: kind {teacher.kind} has its own prompt; leave the key out")
        return
    forms = [form for form in PROMPT_FORMS if form in prompt]
    unknown = sorted(prompt.keys() - {*PROMPT_FORMS, "languages"})
    if len(forms) != 1 or unknown:
        raise ValueError(
            f"{where}.prompt: kind hf needs one of {', '.join(PROMPT_FORMS)}, and may have languages; it has "
            f"{', '.join(map(str, prompt)) or 'none'} (opd/teachers/hf.py shows each form)"
        )
    languages = prompt.get("languages")
    if languages is not None and not (isinstance(languages, list) and all(isinstance(one, str) for one in languages)):
        raise ValueError(
            f"{where}.prompt.languages={languages}: must be a list of languages (in quotes), such as [English, German]"
        )
    value = prompt[forms[0]]
    if not isinstance(value, PROMPT_FORMS[forms[0]]):
        raise ValueError(f"{where}.prompt.{forms[0]}: must be a {PROMPT_FORMS[forms[0]].__name__}")
    if forms[0] == "text" and value.count("{audio}") != 1:
        raise ValueError(f"{where}.prompt.text: must have the placeholder {{audio}} once, where the audio stands")
    if forms[0] == "chat" and (count := _count_audio(value)) != 1:
        raise ValueError(
            f"{where}.prompt.chat: must have the audio once, as a part {{type: audio}} of a message's content or as {{audio}} "
            f"in its text; it has it {count} times"
        )
    if (
        forms[0] != "transcription"
        and teacher.language == "auto"
        and ("{language}" in str(value) or "{iso}" in str(value))
    ):
        raise ValueError(
            f"{where}.language=auto: this prompt names the language; leave {{language}} and {{iso}} out of {where}.prompt"
        )


def _count_audio(chat: Any) -> int:
    """How often the audio stands in a chat: parts of type audio, and placeholders in texts."""
    if isinstance(chat, dict):
        return int(chat.get("type") == "audio") + sum(_count_audio(value) for value in chat.values())
    if isinstance(chat, list):
        return sum(map(_count_audio, chat))
    return chat.count("{audio}") if isinstance(chat, str) else 0


def _validate_division(config: Config) -> None:
    batch, ranks, micro = config.train.batch_size, config.num_ranks, config.train.micro_batch_size
    if batch % ranks:
        nearest = max(ranks, batch // ranks * ranks)
        raise ValueError(
            f"train.batch_size={batch} does not divide over {ranks} ranks "
            f"(cluster.num_nodes x cluster.ranks_per_node): set train.batch_size={nearest}"
        )
    if (batch // ranks) % micro and not config.train.micro_batch_tokens:
        fitting = max(m for m in range(1, micro + 1) if (batch // ranks) % m == 0)
        raise ValueError(
            f"train.micro_batch_size={micro} does not divide the {batch // ranks} utterances of a rank: "
            f"set train.micro_batch_size={fitting}"
        )
