"""Values that cannot be run are refused here, before anything is started: one line that names the key and the fix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.config import Config

DTYPES = ("float32", "bfloat16", "float16")
_CHOICES = {
    "stage": ("sft", "opd"), "engine": ("fsdp2",), "resume": ("auto", "never"), "schedule": ("sync",),
    "student.dtype": DTYPES[:2], "teacher.kind": ("arkasr", "qwen3_asr"), "teacher.dtype": DTYPES, "export.dtype": DTYPES,
    "data.on_bad_audio": ("stop", "skip"), "loss.support": ("union", "student", "teacher"),
    "loss.kind": ("forward_kl", "reverse_kl", "jsd", "sampled_kl", "full_kl"),
    "optim.lr_schedule": ("cosine", "constant"), "wandb.mode": ("online", "offline", "disabled"),
    "student.attn_implementation": ("sdpa", "eager", "flash_attention_2"),
    "teacher.attn_implementation": ("sdpa", "eager", "flash_attention_2"),
}  # fmt: skip
_POSITIVE = (
    "data.max_seconds", "rollout.max_new_tokens", "rollout.max_repeats", "loss.top_k", "loss.temperature",
    "loss.chunk_size", "optim.lr", "optim.eps", "train.num_steps", "train.batch_size", "train.micro_batch_size",
    "train.log_every", "checkpoint.checkpoint_every", "checkpoint.keep_last", "eval.batch_size", "cluster.num_nodes",
    "cluster.ranks_per_node", "cluster.num_teachers",
    "cluster.gpus_per_rank", "cluster.threads_per_rank", "cluster.threads_per_teacher",
    "cluster.placement_timeout_s", "cluster.start_timeout_s", "cluster.call_timeout_s", "cluster.collective_timeout_s",
)  # fmt: skip
_NOT_NEGATIVE = (
    "rollout.temperature", "loss.ctc_weight", "optim.weight_decay", "optim.max_grad_norm", "optim.warmup_steps",
    "eval.eval_every", "eval.max_utterances", "eval.num_samples", "eval.patience", "data.sorted_epochs",
    "cluster.cpus_per_rank", "cluster.cpus_per_teacher", "cluster.gpus_per_teacher", "seed",
)  # fmt: skip
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
            raise ValueError(f"{dotted}={_get(config, dotted)}: must be one of {', '.join(choices)}")
    for dotted in _POSITIVE:
        if not _get(config, dotted) > 0:
            raise ValueError(f"{dotted}={_get(config, dotted)}: must be above 0")
    for dotted in _NOT_NEGATIVE:
        if not _get(config, dotted) >= 0:
            raise ValueError(f"{dotted}={_get(config, dotted)}: must not be negative")
    for dotted in _SHARES:
        if not 0 <= _get(config, dotted) <= 1:
            raise ValueError(f"{dotted}={_get(config, dotted)}: must be between 0 and 1")
    _validate_parts(config)
    _validate_division(config)


def _validate_parts(config: Config) -> None:
    if len(config.stages) > 1 or (config.stages and config.stages != [config.stage]):
        raise ValueError(f"stages={config.stages}: run one stage at a time with stage=sft or stage=opd")
    unknown = set(config.student.freeze) - {"encoder", "adapter", "decoder"}
    if unknown:
        raise ValueError(f"student.freeze={config.student.freeze}: parts are encoder, adapter, decoder")
    if len(config.student.freeze) == 3:
        raise ValueError("student.freeze: encoder, adapter and decoder are all frozen, nothing is left to train")
    if (config.student.path is None) == (not config.student.init):
        raise ValueError(
            "student: give either student.path (a model to start from) or student.init (sizes of a new one)"
        )
    if config.stage == "opd" and not config.teacher.path:
        raise ValueError("teacher.path is missing: stage opd needs a teacher")
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


def _validate_division(config: Config) -> None:
    batch, ranks, micro = config.train.batch_size, config.num_ranks, config.train.micro_batch_size
    if batch % ranks:
        nearest = max(ranks, batch // ranks * ranks)
        raise ValueError(
            f"train.batch_size={batch} does not divide over {ranks} ranks "
            f"(cluster.num_nodes x cluster.ranks_per_node): set train.batch_size={nearest}"
        )
    if (batch // ranks) % micro:
        fitting = max(m for m in range(1, micro + 1) if (batch // ranks) % m == 0)
        raise ValueError(
            f"train.micro_batch_size={micro} does not divide the {batch // ranks} utterances of a rank: "
            f"set train.micro_batch_size={fitting}"
        )
