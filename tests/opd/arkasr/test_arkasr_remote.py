"""An export is loaded by plain transformers, in a process that does not have this project, from its own code."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import GenerationConfig

from opd.arkasr import load_model, load_processor
from opd.export import save_arkasr

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = Path(__file__).parent / "fixtures" / "ark_asr_3b_processor"

PROGRAM = """
import json, sys
folder, audio, out, project = sys.argv[1:]
if project:
    sys.path.insert(0, project)
    import opd.arkasr
else:
    sys.modules["opd"] = None  # an import of it fails
import torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
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
    "model": type(model).__module__, "processor": type(processor).__module__,
    "text": processor.clean_text(new), "raw": tokenizer.decode(new), "ids": new.tolist(),
    "eos": tokenizer.eos_token_id, "special": tokenizer.all_special_ids, "dtype": str(model.dtype),
}))
"""


@pytest.fixture(scope="module", params=["", str(ROOT)], ids=["without the project", "beside the project"])
def from_remote_code(request, tiny_dir, tmp_path_factory, run_isolated):
    """(what the other process printed, its logits, the model, the processor, the prompt's inputs)."""
    folder = tmp_path_factory.mktemp("remote")
    model, processor = load_model(tiny_dir), load_processor(tiny_dir)
    save_arkasr(model.state_dict(), model.config, processor, folder / "export", dtype="float32")
    samples = (0.3 * np.sin(np.arange(12_000) ** 1.2 / 40)).astype(np.float32)
    soundfile.write(folder / "a.wav", samples, 16000, subtype="FLOAT")
    facts = run_isolated(PROGRAM, folder / "export", folder / "a.wav", folder / "logits.pt", request.param)
    return facts, torch.load(folder / "logits.pt"), model, processor, processor.build_inputs([samples])


def test_it_is_the_remote_code_that_runs(from_remote_code):
    facts = from_remote_code[0]
    assert facts["model"].startswith("transformers_modules.")
    assert facts["processor"].startswith("transformers_modules.")
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


# -- the checks of `make compat`, in this environment ----------------------------------------------------------------------


def test_all_ways_to_transcribe_say_what_was_spoken(compat, teacher_export, tmp_path):
    texts = compat.write_speech(tmp_path, num_long=4)
    facts = compat.run_probe(Path(sys.executable), teacher_export, tmp_path, tmp_path / "own.json")
    assert len(facts["checks"]) >= 10
    assert facts["checks"]["pipeline, 70 s"] == [" ".join(texts[compat.NUM_CLIPS :])]
    assert compat.differences(facts, facts, texts) == []
    facts["no_figures"] = compat.run_bench(Path(sys.executable), tmp_path / "bench.json")
    assert compat.report(facts, {"other": facts}, texts) == 0


def test_another_transcript_is_reported(compat, capsys):
    texts = ["one two"] * compat.NUM_CLIPS + ["three", "four"]
    spoken = {"greedy": ["one two"] * compat.NUM_CLIPS, "pipeline, 70 s": ["three four"]}
    own = {"transformers": "1", "checks": spoken, "sampled": ["one"] * compat.NUM_CLIPS, "encoder_calls": 1}
    own["no_figures"] = []
    assert compat.report(own, {"2": own}, texts) == 0
    for name, transcripts in (("greedy", ["one two"] * 7 + ["one"]), ("pipeline, 70 s", ["three"])):
        other = {**own, "checks": {**spoken, name: transcripts}}
        capsys.readouterr()
        assert compat.report(own, {"2": other}, texts) == 1
        assert f"error: 2: {name}: {json.dumps(transcripts)}" in capsys.readouterr().err
        assert compat.report(other, {}, texts) == 1, "wrong everywhere is wrong"
    for sampled in (["one"] * 7, [""] * compat.NUM_CLIPS, ["uno"] * compat.NUM_CLIPS):
        assert compat.differences(own, {**own, "sampled": sampled}, texts) == ["sampled"]
    assert compat.report(own, {"2": {**own, "encoder_calls": 5}}, texts) == 1
    assert "error: 2: audio encoded once: 5" in capsys.readouterr().err
    assert compat.report(own, {"2": {**own, "no_figures": ["rollout_tiny"]}}, texts) == 1
    assert 'error: 2: bench.gpu, tiny: ["rollout_tiny"]' in capsys.readouterr().err


def test_a_probe_that_fails_is_an_error(compat, tmp_path):
    with pytest.raises(ValueError, match="the probe failed with status 1"):
        compat.run_probe(Path("/bin/false"), tmp_path, tmp_path, tmp_path / "out.json")
    with pytest.raises(ValueError, match=r"bench\.gpu failed with status 1"):
        compat.run_bench(Path("/bin/false"), tmp_path / "out.json")


# -- types, and small files as the published checkpoints have them -----------------------------------------------------------

TEXT = "<|user|><|begin_of_audio|><|audio|><|end_of_audio|>Please transcribe this audio.<|assistant|>one zero<|im_end|>"
OTHER_PROGRAM = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, pipeline
folder, audio, published, text = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
parts = [{"type": "audio", "path": audio}, {"type": "text", "text": "Please transcribe this audio."}]
inputs = processor.apply_chat_template([{"role": "user", "content": parts}])
types = []
for dtype in ("auto", "float16", torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
    ids = model.generate(**inputs, max_new_tokens=20, suppress_tokens=processor.blocked_token_ids(model.vocab_size))
    types.append([str(model.dtype), processor.clean_text(ids[0, inputs["input_ids"].shape[1]:])])
pipe = pipeline("automatic-speech-recognition", model=folder, trust_remote_code=True, dtype="auto")
types.append([str(pipe.model.dtype), pipe(audio)["text"]])
settings = []
for options in ({}, {"fix_mistral_regex": True}):
    processor = AutoProcessor.from_pretrained(published, trust_remote_code=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(published, trust_remote_code=True, **options)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    settings.append({
        "ids": ids, "blocked": processor.blocked_token_ids(400), "dtype": processor.audio_dtype,
        "bins": processor.feature_extractor.feature_size, "plain": tokenizer.decode(ids, skip_special_tokens=True),
    })
print(json.dumps({"types": types, "settings": settings}))
"""


@pytest.fixture(scope="module")
def published(teacher_export, tmp_path_factory):
    """The export, with the published 3B's processor, preprocessor, tokenizer and generation settings."""
    folder = tmp_path_factory.mktemp("published") / "model"
    shutil.copytree(teacher_export, folder)
    for path in PUBLISHED.iterdir():
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def other_facts(teacher_export, published, run_isolated, compat, tmp_path_factory):
    """What another process finds in both folders, and the text that is spoken there."""
    folder = tmp_path_factory.mktemp("speech")
    texts = compat.write_speech(folder, num_long=1)
    return run_isolated(OTHER_PROGRAM, teacher_export, folder / "clip-0.wav", published, TEXT) | {"text": texts[0]}


def test_stored_type_is_kept_with_dtype_auto(other_facts):
    expected = [f"torch.{dtype}" for dtype in ("bfloat16", "float16", "float32", "bfloat16")]
    assert other_facts["types"] == [[dtype, other_facts["text"]] for dtype in expected]


def test_published_settings_are_read_by_the_auto_classes(other_facts, teacher_export):
    own = load_processor(teacher_export)
    expected = {
        "ids": own.tokenizer(TEXT, add_special_tokens=False)["input_ids"],
        "blocked": own.blocked_token_ids(400),
        "dtype": "bfloat16",
        "bins": 128,
        "plain": "<|audio|>Please transcribe this audio.one zero",
    }
    assert other_facts["settings"] == [expected, expected]


def test_published_settings_are_read_here(published, teacher_export):
    processor, own = load_processor(published), load_processor(teacher_export)
    assert (processor.audio_token, processor.merge_factor, processor.audio_dtype) == ("<|audio|>", 4, "bfloat16")
    assert processor.feature_extractor.feature_size == 128
    assert processor.prompt_ids(300) == own.prompt_ids(300)
    assert processor.blocked_token_ids(400) == own.blocked_token_ids(400)
    clip = (0.1 * np.sin(np.arange(8000) / 9)).astype(np.float32)
    parts = [{"type": "audio", "array": clip}, {"type": "text", "text": "Please transcribe this audio."}]
    inputs = processor.apply_chat_template([{"role": "user", "content": parts}])
    assert inputs["audios"].dtype == torch.bfloat16
    assert inputs["audios"].shape == (1, 128, 50)
    assert inputs["input_ids"].tolist() == [own.prompt_ids(50)], "the stored chat template is not the prompt"
    generation = GenerationConfig.from_pretrained(published)
    assert (generation.eos_token_id, generation.pad_token_id, generation.bad_words_ids) == (151645, 151643, None)
    ours, theirs = (json.loads((f / "generation_config.json").read_text()) for f in (teacher_export, published))
    assert ours.keys() == theirs.keys()
