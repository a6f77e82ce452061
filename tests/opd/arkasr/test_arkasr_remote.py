"""An export is loaded by plain transformers, in a process that does not have this project, from its own code."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

from opd.arkasr import load_model, load_processor
from opd.export import save_arkasr

# Runs isolated (-I): neither the working directory nor PYTHONPATH is on its path.
PROGRAM = """
import json, sys
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
folder, audio, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
parts = [{"type": "audio", "path": audio}, {"type": "text", "text": "Please transcribe this audio."}]
inputs = processor.apply_chat_template([{"role": "user", "content": parts}])
blocked = processor.blocked_token_ids(model.config.vocab_size)
with torch.no_grad():
    torch.save(model(**inputs).logits, out)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, suppress_tokens=blocked)
new = ids[0, inputs["input_ids"].shape[1]:]
print(json.dumps({
    "model": type(model).__module__, "processor": type(processor).__module__, "project": "opd" in sys.modules,
    "text": processor.clean_text(new), "raw": tokenizer.decode(new), "ids": new.tolist(),
    "eos": tokenizer.eos_token_id, "special": tokenizer.all_special_ids, "dtype": str(model.dtype),
}))
"""


@pytest.fixture(scope="module")
def from_remote_code(tiny_dir, tmp_path_factory):
    """(what the other process printed, its logits, the model, the processor, the prompt's inputs)."""
    folder = tmp_path_factory.mktemp("remote")
    model, processor = load_model(tiny_dir), load_processor(tiny_dir)
    save_arkasr(model.state_dict(), model.config, processor, folder / "export", dtype="float32")
    samples = (0.3 * np.sin(np.arange(12_000) ** 1.2 / 40)).astype(np.float32)
    soundfile.write(folder / "a.wav", samples, 16000, subtype="FLOAT")
    (folder / "empty").mkdir()
    caches = {"HF_HOME": str(folder / "hf"), "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | caches
    command = [sys.executable, "-I", "-c", PROGRAM, *(str(folder / n) for n in ("export", "a.wav", "logits.pt"))]
    done = subprocess.run(command, cwd=folder / "empty", env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    return facts, torch.load(folder / "logits.pt"), model, processor, processor.build_inputs([samples])


def test_it_is_the_remote_code_that_runs(from_remote_code):
    facts = from_remote_code[0]
    assert facts["model"].startswith("transformers_modules.")
    assert facts["processor"].startswith("transformers_modules.")
    assert not facts["project"]
    assert facts["dtype"] == "torch.float32"


def test_logits_are_equal(from_remote_code):
    _, logits, model, _, inputs = from_remote_code
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**inputs).logits, atol=1e-6, rtol=1e-6)


def test_text_is_equal(from_remote_code):
    facts, _, model, processor, inputs = from_remote_code
    blocked = processor.blocked_token_ids(model.config.vocab_size)
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, suppress_tokens=blocked)
    new = ids[0, inputs["input_ids"].shape[1] :]
    assert facts["ids"] == new.tolist()
    assert not set(facts["ids"]) & set(blocked)
    assert facts["text"] == processor.clean_text(new)
    assert facts["raw"] == processor.tokenizer.decode(new)
    assert facts["eos"] == processor.tokenizer.eos_token_id
    assert facts["special"] == processor.tokenizer.all_special_ids
