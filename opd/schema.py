"""Every key of the configuration: its type, its default and its one line of meaning. `opd.config` reads and writes it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def key(default: Any, meaning: str) -> Any:
    """A config key: its default and the one line that `print_config=true` shows."""
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata={"meaning": meaning})
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class StudentConfig:
    path: str | None = key(
        None, "arkasr folder or Hub id to start from; null with `init` for a fresh model; stage:NAME"
    )
    init: dict[str, Any] = key({}, "sizes of a fresh, randomly initialised model (see recipes/tiny_teacher.yaml)")
    dtype: str = key("float32", "compute type: float32 | bfloat16; weights and optimizer state stay float32")
    attn_implementation: str = key("sdpa", "attention: sdpa | eager | flash_attention_2")
    freeze: list[str] = key([], "parts that are not trained: any of encoder, adapter, decoder")
    activation_checkpointing: bool = key(
        False, "true: layers are computed again in the backward pass, a third more time for much less memory"
    )


@dataclass(frozen=True)
class LoraConfig:
    rank: int = key(0, "rank of the adapters that train in place of the decoder's own weights; 0 = no LoRA")
    alpha: int = key(32, "an adapter's product is scaled by alpha / rank")
    dropout: float = key(0.0, "on an adapter's input, in training")
    target_modules: list[str] = key(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "linear layers of the decoder that get an adapter",
    )


ROUTE_KEYS = ("match", "num_workers")  # what a route says beside keys of TeacherConfig


@dataclass(frozen=True)
class TeacherConfig:
    kind: str = key(
        "arkasr", "what the teacher is: arkasr | qwen3_asr | hf (any native speech-to-text model of transformers)"
    )
    path: str | None = key(
        None, "folder or Hub id of the teacher; not used by stage sft; stage:NAME = made by that stage"
    )
    python_path: str | None = key(
        None, "interpreter of the teacher's own environment (make teacher-env); null = this one"
    )
    language: str = key(
        "manifest", "told to the teacher: manifest (each utterance's) | auto (it detects it) | one for all"
    )
    prompt: dict[str, Any] = key(
        {}, "kind hf: how it is prompted, by one of text, chat, transcription (opd/teachers/hf.py)"
    )
    routes: dict[str, Any] = key(
        {}, "several teachers: name -> {match: {language or manifest field: values}, num_workers, keys as above}"
    )
    dtype: str = key("float32", "the teacher's weights and compute: float32 | bfloat16 | float16")
    attn_implementation: str = key("sdpa", "attention: sdpa | eager | flash_attention_2")
    min_coverage: float = key(0.9, "smallest share of response positions that must map into the teacher's vocabulary")
    gate_max_wer: float | None = key(
        None, "stage opd: utterances whose teacher transcript has a higher WER against their `text` are left out"
    )
    cache_dir: str | None = key(
        None, "folder where teacher transcripts, and scores of fixed texts, are kept and reused by other runs"
    )

    def by_route(self) -> dict[str, TeacherConfig]:
        """Each route's teacher, with what the route does not say taken from here; without routes this one, named ""."""
        base = dataclasses.replace(self, routes={})
        teachers = {
            name: dataclasses.replace(base, **{k: v for k, v in route.items() if k not in ROUTE_KEYS})
            for name, route in self.routes.items()
        }
        return teachers or {"": base}


@dataclass(frozen=True)
class DataConfig:
    train_manifest: str | None = key(
        None, "JSONL manifest, or synthetic:NAME or recordings:NAME for a set that is made here"
    )
    train_manifests: dict[str, Any] = key(
        {}, "several instead, name -> {path, weight}: an utterance comes from one in proportion to its weight (1)"
    )
    eval_manifests: dict[str, str] = key({}, "name -> manifest of each evaluation set (references needed)")
    recordings: str | None = key(
        None, "folder or tar with {digit}_{speaker}_{index}.wav, which the sets recordings:NAME are made of"
    )
    held_out_speakers: list[str] = key([], "recordings:NAME: speakers that no training set has, only held_out_speakers")
    default_language: str | None = key(None, "language of lines that carry none")
    default_languages: dict[str, str] = key(
        {}, "the same for single manifests: name in train_manifests or eval_manifests -> language"
    )
    max_seconds: float = key(30.0, "longest audio; longer is bad audio, never cut silently")
    on_bad_audio: str = key("stop", "unreadable, too short or too long audio: stop | skip")
    max_bad_share: float = key(0.02, "with skip: the run stops when more than this share of the utterances seen is bad")
    num_threads: int = key(
        2, "threads of a student rank that read the next batch's audio meanwhile; 0 = when it is used"
    )
    read_timeout_s: float = key(
        120.0, "longest wait for the audio of a batch; then the run ends, naming the file; seconds"
    )
    group_by_length: bool = key(
        True, "spread a step's utterances so that ranks have equal work and neighbours equal length; the batch stays"
    )
    sorted_epochs: int = key(0, "first epochs that run through the utterances from short to long")
    log_batches: bool = key(False, "true: the ids of each step's utterances go into batches.jsonl of the run directory")

    def language_of(self, name: str) -> str | None:
        """Language of the lines of a manifest, by its name, that carry none."""
        return self.default_languages.get(name, self.default_language)


@dataclass(frozen=True)
class TdConfig:
    min_avg_logprob: float = key(-1.0, "least mean log-probability of a teacher transcript's tokens, nats")
    max_chars_per_second: float = key(30.0, "a transcript with more characters a second of audio is left out")
    min_chars_per_second: float = key(0.0, "a transcript with fewer characters a second of audio is left out")
    max_wer: float | None = key(None, "where the manifest has a reference: a transcript with a higher WER is left out")


@dataclass(frozen=True)
class RolloutConfig:
    source: str = key("student", "who writes the responses: student | manifest (its `text`: off-policy distillation)")
    draft: str = key(
        "auto",
        "draft of a response, of which a forward checks many tokens: auto (the first there is) | reference (the "
        "manifest's `text`) | earlier (the utterance's last rollout) | ctc (what the encoder hears, where its CTC head is "
        "kept) | none; it changes the speed, not the responses",
    )
    temperature: float = key(0.0, "0 = greedy; above 0 the student samples at this temperature")
    max_new_tokens: int = key(256, "length limit of a response; one cut here has no EOS position")
    max_repeats: int = key(8, "an n-gram repeated more often than this in a row is a loop")
    train_on_loops: bool = key(False, "false: positions from the start of a loop on are left out of the loss")
    cuda_graphs: bool = key(
        True, "true: on CUDA the short forwards of a rollout run as graphs; it changes the speed, not the responses"
    )


@dataclass(frozen=True)
class LossConfig:
    kind: str = key("forward_kl", "forward_kl | reverse_kl | jsd | sampled_kl | full_kl")
    top_k: int = key(32, "K, the ids that student and teacher each bring to the support")
    support: str = key("union", "ids the divergence runs over: union | student | teacher")
    temperature: float = key(1.0, "divides the logits of both sides before normalising")
    beta: float = key(0.5, "jsd: weight of the teacher in the mixture")
    renormalize: bool = key(False, "true: the paper's form, softmax over the support and no tail bucket")
    max_importance: float = key(5.0, "sampled_kl: cap of the importance weight of a stale rollout")
    chunk_size: int = key(256, "positions whose logits over the vocabulary are held at a time")
    ctc_weight: float = key(0.0, "stage sft: weight of the CTC aid on the encoder (a head that is not exported)")


@dataclass(frozen=True)
class OptimConfig:
    lr: float = key(1e-5, "peak learning rate")
    betas: list[float] = key([0.9, 0.98], "AdamW betas")
    eps: float = key(1e-8, "AdamW epsilon")
    weight_decay: float = key(0.01, "on matrices only; norms and biases never decay")
    max_grad_norm: float = key(1.0, "gradient norm is clipped to this; 0 = no clipping")
    offload: bool = key(False, "true: AdamW's state is kept in the host's memory and visits the device for its step")
    lr_schedule: str = key("cosine", "cosine | constant, after the warm-up")
    warmup_steps: int = key(100, "steps of linear warm-up")
    min_lr_ratio: float = key(0.05, "cosine: final learning rate as a share of the peak")


@dataclass(frozen=True)
class ZeroConfig:
    stage: int = key(
        2, "engine deepspeed: 1 = optimizer state is spread over the ranks | 2 = gradients too | 3 = weights too"
    )
    offload_params: bool = key(False, "engine deepspeed, stage 3: true keeps the weights in the host's memory")


@dataclass(frozen=True)
class TrainConfig:
    num_steps: int = key(1000, "optimizer steps")
    batch_size: int = key(32, "utterances of a step over all ranks (the global batch)")
    micro_batch_size: int = key(8, "utterances of one forward and backward on one rank")
    micro_batch_tokens: int = key(
        0, "instead: padded positions (audio, prompt, response) of one forward and backward on one rank; 0 = not used"
    )
    reuse_encoder: bool = key(
        True, "the update goes on from the rollout's encoder output, where a rank's batch is one micro-batch"
    )
    max_restarts: int = key(
        3, "times that dead or silent workers are replaced; the run goes on from its last checkpoint"
    )
    log_every: int = key(10, "steps between progress lines on a plain terminal")


@dataclass(frozen=True)
class CheckpointConfig:
    checkpoint_every: int = key(100, "steps between checkpoints; the last step is always saved")
    grace_s: float = key(25.0, "SIGTERM: the step is finished and saved if that takes no longer; seconds")
    background: bool = key(True, "the ranks go on once their state is copied, and write the copy meanwhile")
    keep_last: int = key(2, "newest checkpoints kept, beside the best by evaluation")


@dataclass(frozen=True)
class EvalConfig:
    eval_every: int = key(0, "steps between evaluations; 0 = before the first and after the last step only")
    batch_size: int = key(64, "utterances decoded together on one rank")
    max_utterances: int = key(0, "first utterances of each set that are used; 0 = all")
    num_samples: int = key(8, "transcripts shown per evaluation")
    normaliser: str = key(
        "auto", "rules that texts pass before scoring: auto (by language) | a name of opd/normalisers.py"
    )
    best_by: str = key("", "set whose WER picks the best checkpoint and stops early; empty = the first set")
    patience: int = key(0, "evaluations without a better WER before the run stops early; 0 = never")
    teacher: bool = key(True, "stage opd: also transcribe the sets with the teacher, once")


@dataclass(frozen=True)
class ExportConfig:
    dtype: str = key("bfloat16", "type of the exported weights: float32 | bfloat16 | float16")
    ctc_head: bool = key(
        True, "stages sft and td: keep the CTC head, trained or found at student.path, for drafts of later rollouts"
    )
    code: bool = key(True, "put the arkasr remote code into the export")
    push: str | None = key(None, "Hub repository the export is pushed to at the end (needs a token)")
    private: bool | None = key(None, "whether the repository is made private; null = the account's default")
    revision: str | None = key(None, "branch of the repository that is written; null = main")
    license: str | None = key(None, "licence that the model card names, such as apache-2.0")


@dataclass(frozen=True)
class WandbConfig:
    mode: str = key("online", "online | offline | disabled; online without an API key falls back to offline")
    project: str = key("open-asr-opd", "W&B project")


@dataclass(frozen=True)
class ClusterConfig:
    num_nodes: int = key(1, "nodes the student is spread over")
    ranks_per_node: int = key(2, "student ranks (processes) on each node; one per GPU on a GPU host")
    use_gpu: bool = key(False, "true: student ranks and teacher workers run on GPUs, with NCCL between ranks")
    gpus_per_rank: float = key(1.0, "GPUs of a student rank where use_gpu is true; fractions leave room for a teacher")
    cpus_per_rank: float = key(0.5, "CPUs that Ray sets aside for a student rank; fractions are fine")
    threads_per_rank: int = key(1, "torch threads of a student rank")
    num_teachers: int = key(1, "teacher workers; with routes, of each route that does not say num_workers")
    cpus_per_teacher: float = key(0.5, "CPUs that Ray sets aside for a teacher worker; fractions are fine")
    gpus_per_teacher: float = key(1.0, "GPUs of a teacher worker where use_gpu is true; fractions share one")
    threads_per_teacher: int = key(2, "torch threads of a teacher worker")
    network_interface: str | None = key(
        None, "network interface between the ranks (gloo and NCCL), such as eth0; null = as they choose themselves"
    )
    placement_timeout_s: float = key(60.0, "longest wait for Ray to place the workers, seconds")
    start_timeout_s: float = key(600.0, "longest wait for a worker to load its model, seconds")
    call_timeout_s: float = key(1800.0, "longest wait for one call to the workers, seconds")
    collective_timeout_s: float = key(600.0, "longest wait for one collective between ranks, seconds")


@dataclass(frozen=True)
class Config:
    recipe: str = key("???", "name of a file in recipes/, or a path to a .yaml")
    stage: str = key("opd", "sft (references) | td (the teacher's transcripts) | opd (on-policy distillation)")
    stages: list[str] = key([], "a ladder: names of stages, run one after the other; each starts from the one before")
    ladder: dict[str, Any] = key({}, "stage name -> what differs in it, as section: {key: value}; see opd/ladder.py")
    compare: dict[str, Any] = key({}, "arms that are measured against each other; see opd/compare.py")
    engine: str = key("fsdp2", "how the student is spread over the ranks: fsdp2 | deepspeed (ZeRO)")
    run_dir: str | None = key(None, "where everything of this run goes; default runs/<recipe>-<time>")
    resume: str = key("auto", "auto: go on from the newest complete checkpoint | never")
    seed: int = key(0, "seed of everything random")
    schedule: str = key(
        "sync", "sync: rollout, score, update | one_step_off: the next rollout is scored while this one trains"
    )
    student: StudentConfig = field(default_factory=StudentConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    data: DataConfig = field(default_factory=DataConfig)
    td: TdConfig = field(default_factory=TdConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    @property
    def recipe_name(self) -> str:
        return Path(self.recipe).stem

    @property
    def num_ranks(self) -> int:
        return self.cluster.num_nodes * self.cluster.ranks_per_node

    @property
    def num_teachers(self) -> int:
        """Teacher workers over all routes."""
        routes: list[dict[str, Any]] = list(self.teacher.routes.values()) or [{}]
        return sum(route.get("num_workers") or self.cluster.num_teachers for route in routes)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dictionary, the form that is saved in the run directory."""
        return dataclasses.asdict(self)

    def best_eval_set(self) -> str | None:
        return self.eval.best_by or next(iter(self.data.eval_manifests), None)


def _keys_but(section: str, cls: type, *free: str) -> list[str]:
    return [f"{section}.{f.name}" for f in dataclasses.fields(cls) if f.name not in free]


# What may not change between a run and its continuation: everything that shapes the weights (the number of steps shapes
# the schedule). Where the run is written, how it is watched, what happens to bad audio, how ranks are placed and how
# memory is saved may change; so may the number of ranks and the size of a batch, when the hardware does: the place in the
# data is counted in utterances.
FROZEN_KEYS = [
    "recipe", "stage", "schedule", "seed", "engine", "zero", "lora", "teacher.kind", "teacher.path", "teacher.language",
    "teacher.prompt", "teacher.routes", "teacher.dtype", "teacher.gate_max_wer", "data.train_manifest",
    "data.train_manifests", "data.default_language", "data.default_languages", "data.sorted_epochs",
    "data.group_by_length", "td", "loss", "train.num_steps", "eval.normaliser",
    *_keys_but("student", StudentConfig, "activation_checkpointing"), *_keys_but("optim", OptimConfig, "offload"),
    *_keys_but("rollout", RolloutConfig, "cuda_graphs"),
]  # fmt: skip
