"""python -m opd.memory recipe=NAME [section.key=value ...]

How much memory a run takes at most, by arithmetic alone: no model file is read, nothing is started. A table for a
student rank and for a teacher worker, phase by phase, and the sum on one GPU. `python -m bench.memory` holds the
student's side against measured peaks.

What is counted for a student rank: the tensors that live through a phase, at the moment in it when they are most.
Lengths are the longest that the recipe allows, so a run with shorter audio takes less. GB are 1e9 bytes.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass

from data.command_line import wants_help
from opd.config import load_config
from opd.encoding import serves_update
from opd.model_sizes import NOTHING, LayerSizes, Made, StudentSizes, TeacherSizes, student_sizes, teacher_sizes
from opd.parts import named_parts
from opd.rollout.drafts import MAX_WIDTH
from opd.rollout.speculative import TOPK_CHUNK
from opd.schema import Config
from opd.teachers.causal import CHUNK_SIZE
from opd.trainable import BUCKET_NUMEL

GB = 1e9
FLOAT32 = 4
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
SPARE_SLOTS = 64  # of a row in the rollout's KV cache, at most
PROMPT_TEXT_TOKENS = 24  # of a prompt, around its audio
CUDA_CONTEXT = 1.0 * GB  # of one process, with its libraries; typical, not measured here

Items = dict[str, float]  # what -> bytes
Phases = dict[str, Items]


@dataclass(frozen=True)
class Lengths:
    """How much is processed together: rows of a rollout, rows of a micro-batch, and the lengths of a row."""

    rollout_rows: int
    drafted_rows: int  # of them, those of a training step: an evaluation has no drafts
    micro_rows: int
    num_micros: int  # micro-batches of a step
    frames: int  # encoder frames of a row
    prompt: int  # prompt tokens of a row, audio tokens included
    response: int
    draft: int = 0  # draft tokens that a forward of the rollout checks in a row

    @property
    def tokens(self) -> int:
        return self.prompt + self.response


def longest(config: Config, merge_factor: int) -> Lengths:
    """The longest that the recipe allows: data.max_seconds of audio and rollout.max_new_tokens."""
    share = math.ceil(config.train.batch_size / config.num_ranks)
    frames = math.ceil(50 * config.data.max_seconds)
    response = config.rollout.max_new_tokens
    prompt = frames // merge_factor + PROMPT_TEXT_TOKENS
    micro_rows = config.train.micro_batch_size
    if config.train.micro_batch_tokens:
        micro_rows = max(1, config.train.micro_batch_tokens // (prompt + response))
    written = config.stage == "opd" and config.rollout.source == "student"
    evaluated = config.eval.batch_size if config.data.eval_manifests else 0
    return Lengths(
        rollout_rows=max(share if written else 0, evaluated),
        drafted_rows=share if written else 0,
        micro_rows=min(share, micro_rows),
        num_micros=math.ceil(share / micro_rows),
        frames=frames,
        prompt=prompt,
        response=response,
        draft=min(MAX_WIDTH, response - 1) if written and config.rollout.draft != "none" else 0,
    )


# -- one student rank ----------------------------------------------------------------------------------------------------


def student_memory(config: Config, sizes: StudentSizes, lengths: Lengths) -> Phases:
    """Bytes of a student rank in each phase of a step after the first, on its device."""
    ranks, compute = config.num_ranks, BYTES[config.student.dtype]
    on_device = not (config.optim.offload and config.cluster.use_gpu)
    state = 2 * FLOAT32 * sizes.num_trained / ranks
    held = {
        "weights, float32": FLOAT32 * sizes.num_parameters / ranks,
        "optimizer state": state if on_device else 0.0,
    }
    kept_frames = bool(lengths.drafted_rows) and serves_update(config, lengths.drafted_rows)
    if kept_frames:
        held["encoder's frames"] = compute * lengths.drafted_rows * lengths.frames * sizes.encoder.width
    gradients = FLOAT32 * sizes.num_trained / ranks
    # What foreach AdamW makes: the square roots of all second moments that it steps together.
    stepped = sizes.num_trained / ranks
    if config.optim.offload:
        stepped = min(stepped, max(BUCKET_NUMEL, sizes.vocab_size * sizes.decoder.width) / ranks)
    step = FLOAT32 * stepped + (0.0 if on_device else 2 * FLOAT32 * stepped)
    graph = {"encoder's activations": encoder_bytes(config, sizes, lengths)} if kept_frames else {}
    return {
        "rollout": held | graph | _rollout(config, sizes, lengths, compute),
        "update": held | _update(config, sizes, lengths, compute, gradients),
        "optimizer step": held | {"gradients": gradients, "the step's own": step},
    }


def _update(config: Config, sizes: StudentSizes, lengths: Lengths, compute: int, gradients: float) -> Items:
    """Forward and backward of a micro-batch, at whichever moment most is held."""
    earlier = gradients if lengths.num_micros > 1 else 0.0
    layer = compute * sizes.largest_layer
    root = compute * sizes.root
    activations, one_layer = activation_bytes(config, sizes, lengths)
    in_loss, head_gradient = loss_bytes(config, sizes, lengths)
    moments = [
        {"gradients": earlier, "gathered weights": root + layer, "activations": activations, "loss": in_loss},
        # A layer that is computed again, while the output matrix's gradient waits for the embedding's.
        {
            "gradients": earlier + layer, "gathered weights": root + 2 * layer, "loss": head_gradient,
            "activations": activations + (one_layer if config.student.activation_checkpointing else 0.0),
        },
        # The root's gradients come last: those of its gathered weights, and what they are reduced in.
        {
            "gradients": gradients + (compute + FLOAT32) * sizes.root_trained, "gathered weights": root,
            "activations": 0.0, "loss": head_gradient,
        },
    ]  # fmt: skip
    return max(moments, key=lambda items: sum(items.values()))


def activation_bytes(config: Config, sizes: StudentSizes, lengths: Lengths) -> tuple[float, float]:
    """What autograd saves in the forward of one micro-batch, and what one layer adds while it is computed again."""
    compute = BYTES[config.student.dtype]
    frames, tokens = lengths.micro_rows * lengths.frames, lengths.micro_rows * lengths.tokens
    frozen = config.student.freeze
    own_decoder = "decoder" not in frozen and not config.lora.rank
    reaches_decoder = "decoder" not in frozen or not {"encoder", "adapter"} <= set(frozen)
    encoder_layer = _encoder_layer(sizes.encoder, compute) * frames if "encoder" not in frozen else 0.0
    decoder_layer = (
        _decoder_layer(config, sizes.decoder, compute, lengths.tokens, own_decoder) * tokens if reaches_decoder else 0.0
    )
    kept_decoder = decoder_layer
    if config.student.activation_checkpointing:
        kept_decoder = compute * sizes.decoder.width * tokens if decoder_layer else 0.0
    ends = 0.0
    if encoder_layer or "adapter" not in frozen:
        audio_tokens = frames // sizes.merge_factor
        ends += compute * (2 * frames * sizes.encoder.width + audio_tokens * 4 * sizes.decoder.width)
    if decoder_layer:
        ends += tokens * sizes.decoder.width * (FLOAT32 + compute)
    kept = encoder_bytes(config, sizes, lengths) + kept_decoder * sizes.num_decoder_layers + ends
    return kept, max(encoder_layer, decoder_layer)


def encoder_bytes(config: Config, sizes: StudentSizes, lengths: Lengths) -> float:
    """What autograd saves in the encoder for one micro-batch; nothing where it is frozen."""
    if "encoder" in config.student.freeze:
        return 0.0
    compute, frames, width = BYTES[config.student.dtype], lengths.micro_rows * lengths.frames, sizes.encoder.width
    layer = compute * width if config.student.activation_checkpointing else _encoder_layer(sizes.encoder, compute)
    # Beside the layers' share mel, and both convolutions with their activations.
    return frames * (layer * sizes.num_encoder_layers + compute * (2 * sizes.num_mel_bins + 5 * width))


def _encoder_layer(layer: LayerSizes, compute: int) -> float:
    """Saved per frame: two norms' inputs and outputs, query, key, value, what is attended to, twice (once in the order of
    the heads), and the MLP's two sides."""
    return compute * (9 * layer.width + 2 * layer.inner) + 4 * FLOAT32


def _decoder_layer(config: Config, layer: LayerSizes, compute: int, length: int, own: bool) -> float:
    """Saved per token. `own`: the layer's own weights train; else no input is kept for their sake."""
    lora = config.lora
    targets = set(lora.target_modules) if lora.rank else set()
    widths = {"o_proj": layer.query_width, "down_proj": layer.inner}
    # A norm works in float32 and saves its input in it; under a smaller compute type that is a copy.
    norms = 2 * layer.width * FLOAT32 + (2 * layer.width * compute if own else 0)
    into_attention, into_mlp = {"q_proj", "k_proj", "v_proj"} & targets, {"gate_proj", "up_proj"} & targets
    inputs = compute * layer.width * ((own or bool(into_attention)) + (own or bool(into_mlp)))
    attention = compute * 4 * layer.query_width  # keys and values repeated for every query head
    mask = compute * length
    mlp = compute * layer.inner * (4 if own or "down_proj" in targets else 3)
    adapters = compute * lora.rank * len(targets)
    if lora.rank and lora.dropout:
        adapters += sum((compute + 1) * widths.get(name, layer.width) for name in targets)
    return norms + inputs + attention + mask + mlp + adapters


def loss_bytes(config: Config, sizes: StudentSizes, lengths: Lengths) -> tuple[float, float]:
    """What the loss holds while it runs, and the output matrix's gradient that is left of it for the backward pass."""
    compute = BYTES[config.student.dtype]
    positions = lengths.micro_rows * lengths.response
    # All hidden states, then those at trained positions and their gradient.
    states = compute * sizes.decoder.width * (lengths.micro_rows * lengths.tokens + 2 * positions)
    chunk = FLOAT32 * min(positions, config.loss.chunk_size) * sizes.vocab_size
    if config.loss.kind == "full_kl":
        chunk += FLOAT32 * (positions + min(positions, config.loss.chunk_size)) * sizes.vocab_size
    matrix = sizes.vocab_size * sizes.decoder.width
    trains_matrix = "decoder" not in config.student.freeze and not config.lora.rank
    waiting = compute * matrix if trains_matrix else 0.0
    waiting += compute * sizes.decoder.width * lengths.micro_rows * lengths.tokens
    return states + chunk + (FLOAT32 * matrix if trains_matrix else 0.0), waiting


def _rollout(config: Config, sizes: StudentSizes, lengths: Lengths, compute: int) -> Items:
    if not lengths.rollout_rows:
        return {}
    rows = lengths.rollout_rows
    encoder = compute * rows * lengths.frames * _widest(sizes.encoder, front_end=6 * sizes.encoder.width)
    # The frames and the audio rows are there when the decoder begins.
    decoder = compute * rows * (lengths.prompt + lengths.draft) * _widest(sizes.decoder)
    positions = max(rows, lengths.drafted_rows * (lengths.draft + 1))
    cache = compute * rows * (lengths.tokens + SPARE_SLOTS) * 2 * sizes.decoder.key_width * sizes.num_decoder_layers
    return {
        "gathered weights": compute * sizes.num_parameters,
        "KV cache": cache,
        "activations": max(encoder, decoder),
        "logits": _rollout_logits(positions, sizes.vocab_size, compute),
    }


def _rollout_logits(positions: int, vocab_size: int, compute: int) -> float:
    """Logits of a forward, those that wait for their top-k, and what finding it takes: float32, log-softmax."""
    chosen = max(positions, min(TOPK_CHUNK, positions * 2))
    return vocab_size * (compute * (positions + chosen) + 2 * FLOAT32 * chosen)


def _widest(layer: LayerSizes, front_end: int = 0) -> int:
    """Elements per position that are held at once in a forward without gradient, at the widest place of a layer."""
    return max(2 * layer.width + 3 * layer.inner, 3 * layer.width + 4 * layer.query_width, front_end)


# -- one teacher worker ----------------------------------------------------------------------------------------------------


def teacher_memory(config: Config, sizes: TeacherSizes, micro_rows: int) -> Phases:
    """Bytes of a teacher worker while it scores a micro-batch of `micro_rows` and while it transcribes (evaluation, gate, td)."""
    each = BYTES[config.teacher.dtype]
    weights = {f"weights, {config.teacher.dtype}": float(each * sizes.num_parameters)}
    seconds, response = config.data.max_seconds, config.rollout.max_new_tokens
    prompt = math.ceil(seconds * sizes.tokens_per_second) + PROMPT_TEXT_TOKENS

    def forward(rows: int, tokens: int) -> float:
        heard = min(rows * seconds, sizes.front_end_seconds)
        frames = math.ceil(rows * seconds * sizes.frames_per_second)
        return each * max(
            heard * sizes.front_end, frames * _widest(sizes.encoder), rows * tokens * _widest(sizes.decoder)
        )

    positions = micro_rows * response
    scored = min(CHUNK_SIZE, positions) * sizes.vocab_size * (each + 4 * FLOAT32)
    if config.loss.kind == "full_kl":
        scored += FLOAT32 * positions * sizes.vocab_size
    phases = {"scoring": weights | {"activations": forward(micro_rows, prompt + response), "logits": float(scored)}}
    if config.stage == "td" or config.teacher.gate_max_wer is not None or (
        config.eval.teacher and config.data.eval_manifests
    ):  # fmt: skip
        rows = config.eval.batch_size
        cache = 2 * each * rows * (prompt + response) * sizes.decoder.key_width * sizes.num_decoder_layers
        phases["transcribing"] = weights | {
            "activations": forward(rows, prompt),
            "KV cache": float(cache),
            "logits": float(rows * sizes.vocab_size * (each + 4 * FLOAT32)),
        }
    return phases


# -- all of it -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Phases of a student rank and of each kind of teacher worker, and which of them share one GPU (or one node)."""

    student: Phases
    teachers: dict[str, Phases]
    teachers_beside: int  # teacher workers beside one student rank on its GPU
    use_gpu: bool
    host_state: float  # optimizer state of a rank that is kept in the host's memory

    @property
    def per_gpu(self) -> float:
        """Bytes at most on one GPU: each process at its peak, since an allocator keeps what it had."""
        context = CUDA_CONTEXT if self.use_gpu else 0.0
        teacher = max((peak(phases) for phases in self.teachers.values()), default=0.0) + context
        student = peak(self.student) + context
        return student + self.teachers_beside * teacher if self.teachers_beside else max(student, teacher)


def peak(phases: Phases) -> float:
    return max(sum(items.values()) for items in phases.values())


def estimate(config: Config, made: Made = NOTHING) -> Estimate:
    """The estimate of one run. Raises ValueError where the sizes of a model are not known.

    made   what `stage:NAME` means: the students of stages before this one
    """
    if config.engine != "fsdp2":
        raise ValueError(f"engine={config.engine}: the estimate is that of engine=fsdp2; ask for it with engine=fsdp2")
    sizes = student_sizes(config, made)
    lengths = longest(config, sizes.merge_factor)
    teachers = {}
    if config.stage != "sft":
        by_name = config.teacher.by_route().items()
        teachers = {name: teacher_memory(config, teacher_sizes(one, made), lengths.micro_rows) for name, one in by_name}
    cluster = config.cluster
    beside = 0
    if teachers and cluster.gpus_per_rank + cluster.gpus_per_teacher <= 1:
        beside = math.ceil(config.num_teachers / config.num_ranks)
    offloaded = config.optim.offload and cluster.use_gpu
    return Estimate(
        student=student_memory(config, sizes, lengths),
        teachers=teachers,
        teachers_beside=beside if cluster.use_gpu else 0,
        use_gpu=cluster.use_gpu,
        host_state=2 * FLOAT32 * sizes.num_trained / config.num_ranks if offloaded else 0.0,
    )


def table(config: Config, found: Estimate) -> str:
    """The estimate as text."""
    lines = _phase_table(f"student rank, one of {config.num_ranks}", found.student)
    for name, phases in found.teachers.items():
        lines += ["", *_phase_table("teacher worker" + (f" {name}" if name else ""), phases)]
    if found.host_state:
        lines += ["", f"in the host's memory: {found.host_state / GB:.2f} GB of optimizer state a rank"]
    if found.use_gpu:
        who = (
            f"a student rank and {found.teachers_beside} teacher worker(s)" if found.teachers_beside else "one process"
        )
        lines += ["", f"one GPU ({who}, {CUDA_CONTEXT / GB:.0f} GB of CUDA context each): {found.per_gpu / GB:.1f} GB"]
    else:
        ranks = config.num_ranks * peak(found.student)
        teachers = sum(peak(phases) for phases in found.teachers.values()) / max(1, len(found.teachers))
        total = ranks + config.num_teachers * teachers
        lines += ["", f"all processes, tensors alone: {total / GB:.2f} GB (each Python process adds about 1 GB)"]
    return "\n".join(lines)


def _phase_table(title: str, phases: Phases) -> list[str]:
    unit, size = ("GB", GB) if peak(phases) >= GB else ("MB", 1e6)
    items = list(dict.fromkeys(name for phase in phases.values() for name in phase))
    rows = {name: [phase.get(name, 0.0) for phase in phases.values()] for name in items}
    rows["sum"] = [sum(phase.values()) for phase in phases.values()]
    lines = [f"{title + ', ' + unit:<32}" + "".join(f"{name:>16}" for name in phases)]
    return lines + [f"  {n:<30}" + "".join(f"{value / size:>16.2f}" for value in values) for n, values in rows.items()]


def main(argv: list[str]) -> int:
    """Command line; returns the exit status."""
    if wants_help(argv):
        print(__doc__)
        return 0
    try:
        for index, part in enumerate(named_parts(load_config(argv))):
            if part.title:
                print(f"{'' if index == 0 else chr(10)}{part.title} ({part.config.stage})")
            made = {name: config.student for name, config in part.before.items()}
            print(table(part.config, estimate(part.config, made)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
