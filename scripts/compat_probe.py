"""What scripts/compat.py runs in each environment: python compat_probe.py EXPORT AUDIO_DIR OUT.json

It needs torch, transformers and soundfile only. AUDIO_DIR has clip-*.wav and long.wav; OUT gets transcripts by check.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline

INSTRUCTION = {"type": "text", "text": "Please transcribe this audio."}
BATCH_SIZE = 4


def conversation(path: Path) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "audio", "path": str(path)}, INSTRUCTION]}]


def bad_words(tokenizer: Any) -> list[list[int]]:
    """As on the published model card: special and <...> tokens, except the end."""
    marks = [i for text, i in tokenizer.get_added_vocab().items() if text.startswith("<") and text.endswith(">")]
    return [[i] for i in sorted({*tokenizer.all_special_ids, *marks} - {tokenizer.eos_token_id})]


class Checkpoint:
    """The export as a user loads it."""

    def __init__(self, folder: str, **options: Any) -> None:
        self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, fix_mistral_regex=True)
        self.model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()

    def transcribe(self, paths: list[Path], **options: Any) -> list[str]:
        inputs = self.processor.apply_chat_template(
            [conversation(path) for path in paths], add_generation_prompt=True, return_tensors="pt", padding_side="left"
        )
        inputs["audios"] = inputs["audios"].to(self.model.dtype)
        options = {"do_sample": False, "max_new_tokens": 64, "bad_words_ids": bad_words(self.tokenizer), **options}
        with torch.no_grad():
            ids = self.model.generate(**inputs, pad_token_id=self.tokenizer.pad_token_id, **options)
        return self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def encoder_calls(self, paths: list[Path]) -> int:
        """How often a generation encodes the audio: once, as later steps find it in the cache."""
        calls: list[None] = []
        hook = self.model.audio_encoder.register_forward_hook(lambda *_: calls.append(None))
        self.transcribe(paths)
        hook.remove()
        return len(calls)


def main(export: str, audio_dir: str, out: str) -> None:
    torch.set_num_threads(1)
    clips, long = sorted(Path(audio_dir).glob("clip-*.wav")), str(Path(audio_dir, "long.wav"))
    paths = [str(path) for path in clips]
    sdpa = Checkpoint(export, dtype=torch.float32, attn_implementation="sdpa")
    blocked = sdpa.processor.blocked_token_ids(sdpa.model.config.vocab_size)
    torch.manual_seed(0)
    sampled = sdpa.transcribe(clips, do_sample=True, temperature=0.5)
    pipe = pipeline("automatic-speech-recognition", model=export, trust_remote_code=True)
    checks = {
        "greedy, left-padded batch": sdpa.transcribe(clips),
        "greedy, one by one": [text for path in clips for text in sdpa.transcribe([path])],
        "greedy, without cache": sdpa.transcribe(clips, use_cache=False),
        "greedy, suppress_tokens": sdpa.transcribe(clips, bad_words_ids=None, suppress_tokens=blocked),
        "greedy, eager": Checkpoint(export, dtype=torch.float32, attn_implementation="eager").transcribe(clips),
        "greedy, dtype auto": Checkpoint(export, dtype="auto").transcribe(clips),
        "beam search": sdpa.transcribe(clips, num_beams=3),
        "pipeline, one by one": [pipe(path)["text"] for path in paths],
        "pipeline, batch": [result["text"] for result in pipe(paths, batch_size=BATCH_SIZE)],
        "pipeline, 70 s": [pipe(long, chunk_length_s=2.6, batch_size=BATCH_SIZE)["text"]],
    }
    facts = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "sampled": sampled,
        "encoder_calls": sdpa.encoder_calls(clips),
        "checks": checks,
    }
    Path(out).write_text(json.dumps(facts, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
