"""Makes a smaller student of a larger model by leaving layers out; a little fine-tuning brings back most of what that costs.

    python scripts/drop_layers.py --model FOLDER --out FOLDER --encoder 0 2 --decoder 0 1

The layers that stay are named by their numbers. Everything else (adapter, embeddings, tokenizer) is taken over, so teacher and
student share a vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from opd.arkasr import load_model, load_processor
from opd.export import save_arkasr


def drop_layers(model: torch.nn.Module, encoder: list[int], decoder: list[int]) -> None:
    """Keeps these layers of an ARK-ASR model, in place. Raises ValueError for numbers that it does not have."""
    whisper = model.audio_encoder.whisper
    for what, layers, kept in (("encoder", whisper.layers, encoder), ("decoder", model.model.layers, decoder)):
        if not kept or sorted(set(kept)) != kept or kept[0] < 0 or kept[-1] >= len(layers):
            raise ValueError(f"--{what} {kept}: name layers from 0 to {len(layers) - 1}, each once, in rising order")
    whisper.layers = torch.nn.ModuleList(whisper.layers[index] for index in encoder)
    model.model.layers = torch.nn.ModuleList(model.model.layers[index] for index in decoder)
    config = model.config
    config.whisper_config.encoder_layers = len(encoder)
    config.num_hidden_layers = len(decoder)
    config.layer_types = [config.layer_types[index] for index in decoder]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python scripts/drop_layers.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True, help="an arkasr folder or Hub id")
    parser.add_argument("--out", required=True, type=Path, help="folder of the student; must not exist")
    parser.add_argument("--encoder", required=True, type=int, nargs="+", help="encoder layers that stay")
    parser.add_argument("--decoder", required=True, type=int, nargs="+", help="decoder layers that stay")
    options = parser.parse_args(argv)
    try:
        if options.out.exists():
            raise ValueError(f"--out {options.out}: it exists; choose a new folder")
        model = load_model(options.model, dtype=torch.float32)
        drop_layers(model, options.encoder, options.decoder)
        state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
        save_arkasr(state, model.config, load_processor(options.model), options.out, dtype="float16", with_code=False)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{options.out}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
