"""The calls of the published model cards, on an export: nothing but the two paths is changed."""

from __future__ import annotations

import soundfile

# As on the 3B's card.
NEWER = """
def transcribe_as_on_the_newer_card(model_path, audio_path):
    device, dtype = torch.device("cpu"), torch.float32
    processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True, fix_mistral_regex=True)
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=True, fix_mistral_regex=True)
    model = AutoModelForCausalLM.from_pretrained(
        model_path, trust_remote_code=True, torch_dtype=dtype, attn_implementation="sdpa"
    ).to(device).eval()
    conversation = [{"role": "user", "content": [
        {"type": "audio", "path": audio_path},
        {"type": "text", "text": "Please transcribe this audio."},
    ]}]
    inputs = processor.apply_chat_template(
        conversation,
        add_generation_prompt=True,
        return_tensors="pt",
        sampling_rate=16000,
        audio_padding="longest",
        text_kwargs={"padding": "longest"},
        audio_max_length=30 * 16000,
    )
    inputs = inputs.to(device)
    if "audios" in inputs:
        inputs["audios"] = inputs["audios"].to(dtype=dtype)
    blocked = set(tokenizer.all_special_ids)
    blocked |= {i for name, i in tokenizer.get_added_vocab().items() if name.startswith("<") and name.endswith(">")}
    blocked.discard(tokenizer.eos_token_id)
    with torch.no_grad():
        outputs = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=256,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bad_words_ids=[[i] for i in sorted(blocked)],
        )
    new_ids = outputs[:, inputs.input_ids.shape[1]:]
    return tokenizer.batch_decode(new_ids, skip_special_tokens=True)[0].strip()
"""

# As on the 0.6B's earlier card.
OLDER = """
def transcribe_as_on_the_older_card(model_path, audio_path):
    processor = AutoProcessor.from_pretrained(model_path, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(model_path, trust_remote_code=True, torch_dtype="auto").eval()
    conversation = [{"role": "user", "content": [
        {"type": "audio", "path": audio_path, "begin_time": -1, "end_time": -1},
        {"type": "text", "text": "Please transcribe this audio."},
    ]}]
    inputs = processor.apply_chat_template(conversation, add_generation_prompt=True, return_tensors="pt")
    inputs["audios"] = inputs["audios"].to(model.dtype)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|user|>", "<|assistant|>"])
    outputs = model.generate(**inputs.to(model.device), max_new_tokens=256, do_sample=False, eos_token_id=ends)
    return tokenizer.decode(outputs[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
"""

PROGRAM = f"""
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
sys.modules["opd"] = None  # an import of it fails
{NEWER}
{OLDER}
model_path, *audio_paths = sys.argv[1:]
print(json.dumps([
    [transcribe(model_path, audio_path) for audio_path in audio_paths]
    for transcribe in (transcribe_as_on_the_newer_card, transcribe_as_on_the_older_card)
]))
"""


def test_snippets_of_the_published_cards(teacher_export, run_isolated, compat, served, tmp_path):
    """From a file and from an address, as the project README of the original has it."""
    texts = compat.write_speech(tmp_path, num_long=1)
    samples, address, _ = served
    soundfile.write(tmp_path / "served.wav", samples, 16000, subtype="FLOAT")
    paths = [tmp_path / "clip-0.wav", tmp_path / "clip-1.wav", tmp_path / "served.wav", address]
    for transcripts in run_isolated(PROGRAM, teacher_export, *paths):
        assert transcripts[:2] == texts[:2]
        assert transcripts[2] == transcripts[3] != ""
