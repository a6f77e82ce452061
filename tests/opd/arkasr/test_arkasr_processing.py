"""The processor: features equal Whisper's, prompts are ARK-ASR's, files are read right, and what it refuses."""

from __future__ import annotations

import builtins
import wave

import numpy as np
import pytest
import soundfile
import torch
from transformers import WhisperFeatureExtractor

from opd.arkasr import (
    ArkasrProcessor,
    audio_arkasr,
    blocked_token_ids,
    load_processor,
    num_audio_tokens,
    processing_arkasr,
)
from opd.arkasr.audio_arkasr import read_audio, resample

INSTRUCTION = {"type": "text", "text": "Please transcribe this audio."}


@pytest.fixture(scope="module")
def processor(tiny_dir):
    return load_processor(tiny_dir)


def tone(num_samples: int, frequency: float = 440.0, rate: int = 16000) -> np.ndarray:
    """A tone that fades in, after a stretch of digital silence."""
    time = np.arange(num_samples) / rate
    signal = 0.5 * np.sin(2 * np.pi * frequency * time) * np.linspace(0, 1, num_samples)
    signal[: num_samples // 4] = 0
    return signal.astype(np.float32)


def conversation(**audio) -> list[dict]:
    return [{"role": "user", "content": [{"type": "audio", **audio}, INSTRUCTION]}]


# -- features ----------------------------------------------------------------------------------------------------------


def test_features_equal_whispers_on_each_clip_alone(processor, monkeypatch):
    rng = np.random.default_rng(0)
    sizes = (201, 319, 320, 1600, 16001, 48000, 7000)
    clips = [tone(n, 200 + 90 * i) + rng.normal(0, 1e-3, n).astype(np.float32) for i, n in enumerate(sizes)]
    clips.append(np.zeros(4000, dtype=np.float32))
    monkeypatch.setattr(audio_arkasr, "BLOCK_SAMPLES", 20000)  # several blocks
    audios, mask = processor.features(clips)
    assert audios.dtype == torch.float32
    for i, clip in enumerate(clips):
        alone = processor.feature_extractor(clip, sampling_rate=16000, padding="longest", return_tensors="pt")
        expected = alone.input_features[0]
        length = expected.shape[1]
        assert length == mask[i].sum() == len(clip) // 160
        torch.testing.assert_close(audios[i, :, :length], expected, atol=1e-5, rtol=0)
        assert (audios[i, :, length:] == 0).all()
        assert mask[i].tolist() == [1] * length + [0] * (mask.shape[1] - length)


def test_features_have_128_bins_for_large_checkpoints(processor):
    large = ArkasrProcessor(WhisperFeatureExtractor(feature_size=128), processor.tokenizer)
    expected = large.feature_extractor(tone(9000), sampling_rate=16000, padding="longest", return_tensors="pt")
    torch.testing.assert_close(large.features([tone(9000)])[0], expected.input_features, atol=1e-5, rtol=0)


def test_features_cut_nothing(processor):
    audios, mask = processor.features([tone(480_160)])
    assert audios.shape == (1, 80, 3001)
    assert mask.sum() == 3001


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (tone(200), "200 samples are too few"),
        (np.zeros((2, 1000), dtype=np.float32), "mono"),
        (np.zeros(1000, dtype=np.int16), "int16"),
        (np.full(1000, np.nan, dtype=np.float32), "not finite"),
    ],
)
def test_bad_waveforms_are_refused(processor, clip, message):
    with pytest.raises(ValueError, match=message) as error:
        processor.features([tone(400), clip])
    assert "waveform 1" in str(error.value)
    with pytest.raises(ValueError, match="empty"):
        processor.features([])


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 8, 16, 300, 3000])
def test_prompt_ids_are_the_tokenised_prompt(processor, num_frames):
    slots = "<|audio|>" * num_audio_tokens(num_frames)
    text = f"<|user|><|begin_of_audio|>{slots}<|end_of_audio|>Please transcribe this audio.<|assistant|>"
    assert processor.prompt_ids(num_frames) == processor.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_build_inputs_pads_text_left_and_audio_right(processor):
    short, long = tone(3200), tone(16000)
    inputs = processor.build_inputs([short, long])
    rows = [processor.prompt_ids(20), processor.prompt_ids(100)]
    missing = len(rows[1]) - len(rows[0])
    assert missing == num_audio_tokens(100) - num_audio_tokens(20) > 0
    assert inputs["input_ids"].tolist() == [[processor.tokenizer.pad_token_id] * missing + rows[0], rows[1]]
    assert inputs["attention_mask"].tolist() == [[0] * missing + [1] * len(rows[0]), [1] * len(rows[1])]
    assert inputs["audio_mask"].sum(1).tolist() == [20, 100]


def test_conversations_give_what_build_inputs_gives(processor):
    clips = [tone(3200), tone(16000)]
    expected = processor.build_inputs(clips)
    inputs = processor.apply_chat_template([conversation(array=clip) for clip in clips])
    assert set(inputs) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(inputs[name], tensor), name
    arrays = processor.apply_chat_template(conversation(array=clips[1]), return_tensors="np")
    assert isinstance(arrays["audios"], np.ndarray)
    assert arrays["input_ids"].tolist() == [processor.prompt_ids(100)]


def test_prompt_text_and_options(processor):
    clip = tone(3200)
    text = "<|user|><|begin_of_audio|><|audio|><|audio|><|end_of_audio|>Please transcribe this audio."
    assert processor.apply_chat_template(conversation(array=clip), tokenize=False) == text + "<|assistant|>"
    assert processor.apply_chat_template(
        [conversation(array=clip)], tokenize=False, add_generation_prompt=False
    ) == [text]  # fmt: skip
    answered = [{"role": "system", "content": "Be exact."}, *conversation(array=clip)]
    answered.append({"role": "assistant", "content": "one two"})
    rendered = processor.apply_chat_template(answered, tokenize=False, add_generation_prompt=False)
    assert rendered == f"<|system|>Be exact.{text}<|assistant|>one two<|im_end|>"

    padded = processor.apply_chat_template(
        conversation(array=clip), text_kwargs={"padding": "max_length", "max_length": 40, "padding_side": "right"},
        audio_padding="max_length", audio_max_length=4800, audio_dtype="bfloat16",
    )  # fmt: skip
    assert padded["attention_mask"].tolist() == [[1] * len(processor.prompt_ids(20)) + [0] * (40 - 2 - 10 + 1)]
    assert padded["audios"].shape == (1, 80, 30)
    assert padded["audios"].dtype == torch.bfloat16
    assert padded["audio_mask"].sum() == 20


def test_call_takes_ready_prompts(processor):
    clip = tone(3200)
    text = processor.apply_chat_template(conversation(array=clip), tokenize=False)
    inputs, expected = processor(text, audios=[clip]), processor.build_inputs([clip])
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    with pytest.raises(ValueError, match="images"):
        processor(text, images=[])


def test_length_limit_is_the_same_for_frames_and_slots(processor, monkeypatch):
    clip = tone(480_160)
    warnings = []
    monkeypatch.setattr(processing_arkasr.logger, "warning", warnings.append)
    for options, frames in (({}, 3000), ({"audio_max_length": 480_160}, 3001), ({"audio_max_length": 16_000}, 100)):
        inputs = processor.apply_chat_template(conversation(array=clip), **options)
        assert inputs["audio_mask"].sum() == inputs["audios"].shape[2] == frames
        slots = (inputs["input_ids"] == processor.audio_token_id).sum()
        assert slots == num_audio_tokens(frames)
    assert len(warnings) == 1, "cutting is announced where it was not asked for, and only there"
    assert "30.0 s is cut to 30 s" in warnings[0]


# -- reading -----------------------------------------------------------------------------------------------------------


def write_wav(path, samples, rate, subtype="PCM_16"):
    soundfile.write(path, samples, rate, subtype=subtype)
    return str(path)


@pytest.mark.parametrize("key", ["path", "audio", "url"])
def test_files_and_segments(processor, tmp_path, key):
    signal = tone(16000)
    path = write_wav(tmp_path / "a.wav", signal, 16000, "FLOAT")
    for times, part in (
        ({}, signal),
        ({"begin_time": -1, "end_time": -1}, signal),
        ({"begin_time": 0.25}, signal[4000:]),
        ({"begin_time": 0.25, "end_time": 0.75}, signal[4000:12000]),
        ({"end_time": 0.75}, signal[:12000]),
    ):
        read = processor.apply_chat_template(conversation(**{key: path}, **times))
        assert torch.equal(read["audios"], processor.features([part])[0]), times
        given = processor.apply_chat_template(conversation(array=signal, **times))
        assert torch.equal(read["audios"], given["audios"]), times


@pytest.mark.parametrize(("subtype", "error"), [("PCM_U8", 2e-2), ("PCM_16", 1e-4), ("PCM_24", 1e-6), ("PCM_32", 1e-6)])
def test_wav_without_soundfile(tmp_path, monkeypatch, subtype, error):
    left = tone(8000)
    path = write_wav(tmp_path / "a.wav", np.stack([left, np.zeros_like(left)], axis=1), 16000, subtype)
    float_path = write_wav(tmp_path / "f.wav", left, 16000, "FLOAT")
    expected = read_audio(path, 16000, 0.1, 0.2)
    real_import = builtins.__import__

    def without_soundfile(name, *args, **kwargs):
        if name == "soundfile":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_soundfile)
    read = read_audio(path, 16000, 0.1, 0.2)
    assert len(read) == 3200
    np.testing.assert_allclose(read, expected, atol=1e-7)
    np.testing.assert_allclose(read, left[1600:4800] / 2, atol=error)
    with pytest.raises(ValueError, match="install soundfile"):
        read_audio(float_path, 16000)


def test_unreadable_file_is_refused(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(b"this is text")
    with pytest.raises(ValueError, match="cannot be read as audio"):
        read_audio(path, 16000)
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
    with pytest.raises(ValueError, match=r"a\.wav: is empty: remove it"):
        read_audio(path, 16000)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000, 96000])
def test_resampling_keeps_tones_in_place_and_removes_what_does_not_fit(rate):
    time, new_time = np.arange(rate) / rate, np.arange(16000) / 16000
    out = resample(np.sin(2 * np.pi * 1000 * time + 0.3).astype(np.float32), rate, 16000)
    assert out.dtype == np.float32
    assert len(out) == 16000
    inner = slice(1000, -1000)
    np.testing.assert_allclose(out[inner], np.sin(2 * np.pi * 1000 * new_time + 0.3)[inner], atol=1e-3)
    if rate > 16000:
        high = resample(np.sin(2 * np.pi * 9000 * time).astype(np.float32), rate, 16000)
        assert np.abs(high[inner]).max() < 1e-3


def test_resampled_array_and_odd_rates(processor):
    signal = tone(48000, rate=48000)
    read = processor.apply_chat_template(conversation(array=signal, sampling_rate=48000))
    assert torch.equal(read["audios"], processor.features([resample(signal, 48000, 16000)])[0])
    assert read["audio_mask"].sum() == 100
    with pytest.raises(ValueError, match="resample the file first"):
        resample(signal, 44099, 16000)


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("one two<|im_end|> three", "one two"),
        (" one<|user|>two<|im_end|>", "one"),
        ("<|text|> one  two\n", "one two"),
        ("no<|text|>one<|assistant|>x<|text|>y", "one"),
        ("<|bicodec_semantic_12|>one<|bicodec_global_3|> two<|start_content|><|end_global_token|>", "one two"),
        (", . - ?one, two!", "one, two!"),
        ("", ""),
    ],
)
def test_clean_text(processor, raw, clean):
    assert processor.clean_text(raw) == clean


def test_clean_text_of_ids(processor):
    ids = processor.tokenizer("three one<|im_end|>two", add_special_tokens=False)["input_ids"]
    assert processor.clean_text(ids) == processor.clean_text(torch.tensor(ids)) == "three one"
    assert processor.clean_text([]) == ""


def test_blocked_ids_are_all_control_tokens_but_the_end(processor):
    tokenizer = processor.tokenizer
    names = ["<|endoftext|>", "<|im_start|>", "<|audio|>", "<|user|>", "<|begin_of_audio|>", "<|end_of_audio|>",
             "<|assistant|>", "<|system|>"]  # fmt: skip
    expected = sorted([*tokenizer.convert_tokens_to_ids(names), *range(len(tokenizer), 384)])
    assert tokenizer.convert_tokens_to_ids("<|audio|>") not in tokenizer.all_special_ids
    assert blocked_token_ids(tokenizer, 384, tokenizer.eos_token_id) == expected
    assert processor.blocked_token_ids(384) == expected
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    two_ends = blocked_token_ids(tokenizer, 384, [tokenizer.eos_token_id, user])
    assert two_ends == [i for i in expected if i != user]


def test_added_words_are_not_blocked(tiny_dir):
    tokenizer = load_processor(tiny_dir).tokenizer
    tokenizer.add_tokens(["hello", "<tool_call>"])
    blocked = blocked_token_ids(tokenizer, 384, tokenizer.eos_token_id)
    assert tokenizer.convert_tokens_to_ids("hello") not in blocked
    assert tokenizer.convert_tokens_to_ids("<tool_call>") in blocked


# -- loading -----------------------------------------------------------------------------------------------------------


def test_a_tokenizer_without_the_markers_is_refused(processor):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match=r"<\|audio\|>, <\|im_end\|>"):
        ArkasrProcessor(processor.feature_extractor, plain)
    with pytest.raises(ValueError, match="dither"):
        ArkasrProcessor(WhisperFeatureExtractor(feature_size=80, dither=0.1), processor.tokenizer)


def test_processor_round_trip(processor, tmp_path):
    changed = ArkasrProcessor(processor.feature_extractor, processor.tokenizer, merge_factor=2, audio_dtype="bfloat16")
    changed.save_pretrained(tmp_path)
    again = load_processor(tmp_path)
    assert (again.merge_factor, again.audio_dtype, again.audio_token) == (2, "bfloat16", "<|audio|>")
    assert again.feature_extractor.to_dict() == processor.feature_extractor.to_dict()
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.tokenizer.all_special_ids == processor.tokenizer.all_special_ids
    assert again.prompt_ids(100) == changed.prompt_ids(100) != processor.prompt_ids(100)
    assert again.apply_chat_template(conversation(array=tone(400)))["audios"].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="push_to_hub"):
        changed.save_pretrained(tmp_path, push_to_hub=True)
