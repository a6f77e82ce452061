"""Sizes of student and teacher without their weights: from a folder's config.json, from `student.init`, or published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from opd.arkasr import ArkasrConfig, ArkasrForConditionalGeneration
from opd.config import resolve_path
from opd.resolve import STAGE_PREFIX
from opd.schema import Config, LoraConfig, StudentConfig, TeacherConfig
from opd.trainable import MIN_GROUP_NUMEL, choose_trained

# Fields of ArkasrConfig; the encoder is Whisper large-v3's, the class's default.
PUBLISHED_STUDENTS: dict[str, dict[str, int]] = {
    "ARK-ASR-0.6B": {
        "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
        "intermediate_size": 4864, "vocab_size": 163_958,
    },
    "ARK-ASR-3B": {
        "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
        "intermediate_size": 11_008, "vocab_size": 151_936,
    },
}  # fmt: skip


@dataclass(frozen=True)
class LayerSizes:
    """One transformer layer: its width, that of the MLP, of all queries and of all keys."""

    width: int
    inner: int
    query_width: int
    key_width: int


@dataclass(frozen=True)
class StudentSizes:
    """Parameters by what happens to them; a group is what FSDP2 gathers at a time."""

    num_parameters: int
    num_trained: int
    root: int  # parameters of the root group
    root_trained: int
    largest_layer: int  # parameters of the largest group below it; 0 where all are in the root
    encoder: LayerSizes
    decoder: LayerSizes
    num_encoder_layers: int
    num_decoder_layers: int
    num_mel_bins: int
    merge_factor: int
    vocab_size: int


@dataclass(frozen=True)
class TeacherSizes:
    """A teacher that is only run. Its audio front end holds `front_end` elements for each second of audio."""

    num_parameters: int
    decoder: LayerSizes
    num_decoder_layers: int
    encoder: LayerSizes
    vocab_size: int
    frames_per_second: float  # encoder frames
    tokens_per_second: float  # audio tokens in the decoder
    front_end: int
    front_end_seconds: float = float("inf")  # of audio that the front end takes at a time


# Parameters as published; the rest is what the class says of these checkpoints: three 2-D convolutions of 480 channels
# over 128 mel bins, 500 windows of a second at a time, then 13 encoder frames, one audio token each, for a second.
_QWEN3_FRONT_END: dict[str, Any] = {
    "frames_per_second": 13.0, "tokens_per_second": 13.0, "front_end": 2 * 480 * 64 * 50, "front_end_seconds": 500.0,
}  # fmt: skip
PUBLISHED_TEACHERS = {
    "Qwen3-ASR-0.6B-hf": TeacherSizes(
        782_426_112, LayerSizes(1024, 3072, 2048, 1024), 28, LayerSizes(896, 3584, 896, 896), 151_936, **_QWEN3_FRONT_END
    ),
    "Qwen3-ASR-1.7B-hf": TeacherSizes(
        2_038_052_480, LayerSizes(2048, 6144, 2048, 1024), 28, LayerSizes(1024, 4096, 1024, 1024), 151_936, **_QWEN3_FRONT_END
    ),
}  # fmt: skip


# Stage name -> the student that it trains: where the sizes of `stage:NAME` are found before that stage has run.
Made = Mapping[str, StudentConfig]
NOTHING: Made = {}


def student_sizes(config: Config, made: Made = NOTHING) -> StudentSizes:
    """Sizes of the student that a config trains, adapters included. Raises ValueError where nothing tells them."""
    return sizes_of(student_config(config.student, made), config.student.freeze, config.lora)


def student_config(student: StudentConfig, made: Made = NOTHING) -> ArkasrConfig:
    if student.init:
        fields = dict(student.init)
        return ArkasrConfig(whisper_config=dict(fields.pop("whisper")), audio_token_id=None, **fields)
    assert student.path, "validation has seen to it that there is a path or sizes"
    return _arkasr_config("student.path", student.path, made)


def _arkasr_config(key: str, path: str, made: Made) -> ArkasrConfig:
    if path.startswith(STAGE_PREFIX):
        name = path.removeprefix(STAGE_PREFIX)
        if name not in made:
            raise ValueError(
                f"{key}={path}: no stage {name} comes before this one; give the folder of its export instead"
            )
        return student_config(made[name], {other: one for other, one in made.items() if other != name})
    folder = Path(resolve_path(path))
    if (folder / "config.json").is_file():
        return ArkasrConfig.from_pretrained(folder)
    if Path(path).name in PUBLISHED_STUDENTS:
        return ArkasrConfig(**PUBLISHED_STUDENTS[Path(path).name])  # type: ignore[arg-type]
    raise ValueError(
        f"{key}={path}: no folder with a config.json, and no published checkpoint whose sizes are known "
        f"({', '.join(PUBLISHED_STUDENTS)}); give a local folder of it"
    )


def sizes_of(arkasr: ArkasrConfig, freeze: list[str], lora: LoraConfig) -> StudentSizes:
    """Counted on a model without storage, so that every parameter is one that is really there."""
    with torch.device("meta"):
        model = ArkasrForConditionalGeneration(arkasr)
        choose_trained(model, freeze, lora)
    layers = [
        sum(p.numel() for p in layer.parameters())
        for layer in [*model.audio_encoder.whisper.layers, *model.model.layers]
    ]
    grouped = [numel for numel in layers if numel >= MIN_GROUP_NUMEL]
    in_groups = {
        id(p)
        for layer in [*model.audio_encoder.whisper.layers, *model.model.layers]
        if sum(p.numel() for p in layer.parameters()) >= MIN_GROUP_NUMEL
        for p in layer.parameters()
    }
    parameters = list(model.parameters())
    root = [p for p in parameters if id(p) not in in_groups]
    whisper = arkasr.whisper_config
    return StudentSizes(
        num_parameters=sum(p.numel() for p in parameters),
        num_trained=sum(p.numel() for p in parameters if p.requires_grad),
        root=sum(p.numel() for p in root),
        root_trained=sum(p.numel() for p in root if p.requires_grad),
        largest_layer=max(grouped, default=0),
        encoder=LayerSizes(whisper.d_model, whisper.encoder_ffn_dim, whisper.d_model, whisper.d_model),
        decoder=_decoder_layer(arkasr.to_dict()),
        num_encoder_layers=whisper.encoder_layers,
        num_decoder_layers=arkasr.num_hidden_layers,
        num_mel_bins=whisper.num_mel_bins,
        merge_factor=arkasr.merge_factor,
        vocab_size=arkasr.vocab_size,
    )


def _decoder_layer(fields: dict[str, Any]) -> LayerSizes:
    heads = fields["num_attention_heads"]
    head_dim = fields.get("head_dim") or fields["hidden_size"] // heads
    keys = fields.get("num_key_value_heads") or heads
    return LayerSizes(fields["hidden_size"], fields["intermediate_size"], heads * head_dim, keys * head_dim)


def teacher_sizes(teacher: TeacherConfig, made: Made = NOTHING) -> TeacherSizes:
    """Sizes of one teacher. Raises ValueError where nothing tells them."""
    assert teacher.path, "validation has seen to it that there is a path"
    if teacher.kind == "arkasr":
        arkasr = _arkasr_config("teacher.path", teacher.path, made)
        own = sizes_of(arkasr, [], LoraConfig())
        return TeacherSizes(
            own.num_parameters, own.decoder, own.num_decoder_layers, own.encoder, own.vocab_size,
            50.0, 50.0 / own.merge_factor, 100 * own.encoder.width * 2,
        )  # fmt: skip
    name = Path(teacher.path).name
    if name in PUBLISHED_TEACHERS:
        return PUBLISHED_TEACHERS[name]
    folder = Path(resolve_path(teacher.path))
    if teacher.kind == "qwen3_asr" and (folder / "config.json").is_file():
        return _read_qwen3(folder)
    raise ValueError(
        f"teacher.path={teacher.path}: its sizes are not known; known are arkasr folders, Qwen3-ASR folders, "
        f"{', '.join(PUBLISHED_TEACHERS)}"
    )


def _read_qwen3(folder: Path) -> TeacherSizes:
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text, audio = fields["text_config"], fields["audio_config"]
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    bytes_each = 4 if fields.get("dtype", fields.get("torch_dtype")) == "float32" else 2
    encoder = LayerSizes(audio["d_model"], audio["encoder_ffn_dim"], audio["d_model"], audio["d_model"])
    front_end = 2 * audio["downsample_hidden_size"] * (audio["num_mel_bins"] // 2) * 50
    return TeacherSizes(
        stored // bytes_each, _decoder_layer(text), text["num_hidden_layers"], encoder, text["vocab_size"],
        **(_QWEN3_FRONT_END | {"front_end": front_end}),
    )  # fmt: skip
