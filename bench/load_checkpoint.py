"""Does a checkpoint of the published size load, and survive? python -m bench.load_checkpoint [config=06b] [dtype=bfloat16]

Writes random bfloat16 weights for config=06b or 3b (or the path of another config.json) in the published form: shards of
at most 5 GB, with the copy of the embedding in lm_head. Then loads them strictly as `dtype`, exports them again, and
compares every tensor bit for bit. Each part runs in a process of its own, so that its peak memory is its own. Needs room
for two checkpoints in the temporary folder (or in_dir=...): 5.2 GB for 06b, 16 GB for 3b.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import WhisperFeatureExtractor

from bench.command import command
from data.command_line import key_values, wants_help
from opd.arkasr import ArkasrConfig, ArkasrForConditionalGeneration, ArkasrProcessor, load_model
from opd.export import save_arkasr
from opd.seed import AUDIO_TOKEN, train_tokenizer
from opd.types import DTYPES

FIXTURES = Path(__file__).resolve().parent.parent / "tests" / "opd" / "arkasr" / "fixtures"
SHARD_BYTES = 5_000_000_000
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def tiny_processor(num_mel_bins: int) -> ArkasrProcessor:
    """A processor that fits any ARK-ASR config but for audio_token_id: its tokenizer knows a few words only."""
    return ArkasrProcessor(WhisperFeatureExtractor(feature_size=num_mel_bins), train_tokenizer(["one two"], 512))


def write(config_path: Path, folder: Path, dtype: str) -> dict[str, float]:
    """Random weights in bfloat16, sharded, with an index; returns the number of tensors and bytes. `dtype` is not read."""
    fields = json.loads(config_path.read_text(encoding="utf-8"))
    processor = tiny_processor(fields["whisper_config"]["num_mel_bins"])
    fields["audio_token_id"] = processor.tokenizer.get_vocab()[AUDIO_TOKEN]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    with torch.device("meta"):
        state = ArkasrForConditionalGeneration(ArkasrConfig.from_pretrained(folder)).state_dict()
    generator = torch.Generator().manual_seed(0)
    shards: list[dict[str, torch.Tensor]] = [{}]
    weight_map, num_bytes = {}, 0
    for name in sorted(state, key=lambda name: name == LM_HEAD):  # the copy comes last, when the embedding is there
        size = 2 * state[name].numel()
        if shards[-1] and sum(2 * t.numel() for t in shards[-1].values()) + size > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = torch.empty(state[name].shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        if name == LM_HEAD:
            shards[-1][name] = next(shard[EMBEDDING] for shard in shards if EMBEDDING in shard).clone()
        num_bytes += size
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return {"tensors": len(weight_map), "different": 0}


def load(_: Path, folder: Path, dtype: str) -> dict[str, float]:
    model = load_model(folder, dtype=DTYPES[dtype])
    # Loaded weights may be pages of the file that have not been read yet: use each one once.
    return {"tensors": len(model.state_dict()), "different": sum(not p.isfinite().all() for p in model.parameters())}


def export(_: Path, folder: Path, dtype: str) -> dict[str, float]:
    """Loads and exports as `dtype`; returns the number of tensors that are not what they were, in bits."""
    model = load_model(folder, dtype=DTYPES[dtype])
    processor = tiny_processor(model.config.whisper_config.num_mel_bins)
    save_arkasr(model.state_dict(), model.config, processor, folder.with_name("export"), dtype=dtype)
    del model
    before, after = dict(stored_tensors(folder)), dict(stored_tensors(folder.with_name("export")))
    kinds = {"float32": torch.int32, "bfloat16": torch.int16, "float16": torch.int16}
    changed = before.keys() ^ after.keys() ^ {LM_HEAD}
    for name in before.keys() & after.keys():
        old, new = before[name]().to(DTYPES[dtype]), after[name]()
        if old.dtype != new.dtype or not torch.equal(old.view(kinds[dtype]), new.view(kinds[dtype])):
            changed.add(name)
    return {"tensors": len(after), "different": len(changed)}


def stored_tensors(folder: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """(name, reader) of every tensor in a folder's safetensors files."""
    for file in sorted(folder.glob("*.safetensors")):
        content = safe_open(file, "pt")
        for name in content.keys():  # noqa: SIM118  safe_open is no mapping
            yield name, lambda content=content, name=name: content.get_tensor(name)  # type: ignore[misc]


def measured(part: Callable[..., dict[str, float]], arguments: tuple, pipe: Any) -> None:
    """Runs `part` and sends its result with its seconds and peak memory: own pages, and with the file's pages."""
    transformers.utils.logging.disable_progress_bar()
    process, done = psutil.Process(), threading.Event()
    peak = {"own": 0, "all": 0}

    def watch() -> None:
        while not done.wait(0.01):
            memory = process.memory_info()
            peak["own"] = max(peak["own"], memory.rss - memory.shared)
            peak["all"] = max(peak["all"], memory.rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    result = part(*arguments)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    pipe.send({"seconds": seconds, **peak, **result})


@command
def main(argv: list[str]) -> int:
    if wants_help(argv):
        print(__doc__)
        return 0
    arguments = {"config": "06b", "dtype": "bfloat16", "in_dir": tempfile.gettempdir()}
    arguments |= key_values(argv, arguments)
    name, dtype = arguments["config"], arguments["dtype"]
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype}: must be one of {', '.join(DTYPES)}")
    config_path = FIXTURES / f"ark_asr_{name}.json" if name in ("06b", "3b") else Path(name).resolve()
    context = multiprocessing.get_context("spawn")
    wrong = 0
    with tempfile.TemporaryDirectory(dir=arguments["in_dir"]) as temporary:
        print(
            "| part | tensors | different | seconds | peak GiB | peak GiB with pages of files |\n|---|---|---|---|---|---|"
        )
        for part in (write, load, export):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=measured, args=(part, (config_path, Path(temporary) / "m", dtype), theirs))
            process.start()
            theirs.close()  # so that a part that dies is an end of file here, not a wait without end
            row = ours.recv()
            process.join()
            wrong += row["different"]
            counts = f"{row['tensors']} | {row['different']} | {row['seconds']:.1f}"
            print(f"| {part.__name__} | {counts} | {row['own'] / 2**30:.2f} | {row['all'] / 2**30:.2f} |", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main(None))
