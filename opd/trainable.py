"""Which parameters of an ARK-ASR are trained: frozen parts, and LoRA adapters in place of the decoder's own weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from opd.schema import LoraConfig

ADAPTER = "default"  # peft's name of a model's only adapter
MIN_GROUP_NUMEL = 1_000_000  # a layer with fewer parameters is not worth a collective of its own under FSDP2
BUCKET_NUMEL = 64_000_000  # parameters that are stepped at a time where AdamW's state is offloaded: 0.5 GB of it
BASE = ".base_layer."  # what peft puts between the name of a layer and that of its own weight


def choose_trained(model: nn.Module, freeze: list[str], lora: LoraConfig) -> None:
    """Takes the gradient from the frozen parts and, with a LoRA rank, puts adapters into the decoder.

    Under LoRA every weight of the decoder is frozen, its embedding, norms and output layer included; encoder and MLP
    adapter train as they do without, unless they are frozen. Trained then: `requires_grad`.
    """
    freeze_parts(model, freeze)
    if lora.rank:
        from peft import LoraConfig as PeftLoraConfig
        from peft import inject_adapter_in_model

        freeze_parts(model, ["decoder"])
        adapters = PeftLoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=list(lora.target_modules)
        )
        inject_adapter_in_model(adapters, model.model)


def freeze_parts(model: nn.Module, parts: list[str]) -> None:
    """Takes the gradient from parts of an ARK-ASR model: encoder (Whisper), adapter (norm + MLP), decoder (Qwen2)."""
    members = {
        "encoder": [model.audio_encoder.whisper],
        "adapter": [model.audio_encoder.layer_norm, model.audio_encoder.adapting],
        "decoder": [model.model, model.lm_head],
    }
    for part in parts:
        for member in members[part]:
            member.requires_grad_(False)
    # Stored with every checkpoint but read by nothing: it must neither decay nor count as trained.
    model.audio_encoder.whisper.embed_positions.requires_grad_(False)


def plain_state(trained: Mapping[str, torch.Tensor], lora: LoraConfig) -> dict[str, torch.Tensor]:
    """The model's own state dict, as it is exported, from that of the student as it is trained.

    trained   the model's tensors begin with `model.`; what else is trained (a CTC head) is left out

    Every LoRA adapter is added to its layer's weight.
    """
    state_dict = {n.removeprefix("model."): tensor for n, tensor in trained.items() if n.startswith("model.")}
    merged = {}
    for name, tensor in state_dict.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        if name.endswith(f"{BASE}weight"):
            layer = name.removesuffix(f"{BASE}weight")
            down, up = (state_dict[f"{layer}.lora_{side}.{ADAPTER}.weight"] for side in "AB")
            tensor = tensor + (up @ down) * (lora.alpha / lora.rank)
        merged[name.replace(BASE, ".")] = tensor
    return merged


def lora_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that peft put in; each has `merge`, `merged_adapters` and `get_delta_weight`."""
    from peft.tuners.lora import LoraLayer

    return [module for module in model.modules() if isinstance(module, LoraLayer)]
