"""The speech recognition pipeline: what goes in, batches, long recordings, and what it refuses."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import pipeline

from opd.arkasr import cut_at_silences, load_model, load_processor
from opd.arkasr.audio_arkasr import resample
from opd.arkasr.pipeline_arkasr import ArkasrPipeline

SAMPLING_RATE = 16000
WINDOW = 2.6  # seconds; an utterance is longer than half of it, so a window holds just one
NUM_UTTERANCES = 42
TEACHER = Path(__file__).resolve().parents[3] / "seeds" / "tiny_teacher"


@pytest.fixture(scope="module")
def pipe() -> ArkasrPipeline:
    """Without remote code; with it: test_arkasr_remote.py."""
    processor = load_processor(TEACHER)
    return pipeline(
        "automatic-speech-recognition",
        model=load_model(TEACHER),
        processor=processor,
        tokenizer=processor.tokenizer,
        pipeline_class=ArkasrPipeline,
        device="cpu",
    )


@pytest.fixture(scope="module")
def utterances(pipe, compat):
    """Some 70 s of speech with known text: what the tiny teacher recognises alone, so that only joints can go wrong."""
    spoken = compat.spoken_digits(NUM_UTTERANCES + 4, seed=3)
    alone = [result["text"] for result in pipe([u.samples for u in spoken], batch_size=8)]
    known = [u for u, text in zip(spoken, alone, strict=True) if text == u.text]
    assert len(known) >= NUM_UTTERANCES
    return known[:NUM_UTTERANCES]


def test_all_forms_of_a_clip_give_one_text(pipe, utterances, served, tmp_path):
    samples, text = utterances[0]
    path = tmp_path / "a.wav"
    soundfile.write(path, samples, SAMPLING_RATE, subtype="FLOAT")
    array = {"array": samples, "sampling_rate": SAMPLING_RATE}
    for given in (
        str(path),
        path,
        path.read_bytes(),
        samples,
        samples.astype(np.float64),
        torch.from_numpy(samples),
        array,
        {"raw": samples, "sampling_rate": SAMPLING_RATE},
        {"path": str(path)},
        {"audio": str(path), "text": "not looked at"},
        {"audio": array, "id": 3},
        {"path": None, "bytes": path.read_bytes()},
        {"path": "moved.wav", **array},
    ):
        assert pipe(given) == {"text": text}
    assert set(array) == {"array", "sampling_rate"}, "the input was changed"
    downloaded, address, content = served
    assert pipe(address) == pipe({"url": address}) == pipe(content) == pipe(downloaded)


def test_rates_of_arrays(pipe, utterances):
    samples, text = utterances[0]
    double = resample(samples, SAMPLING_RATE, 32000)
    assert pipe({"array": double, "sampling_rate": 32000}) == pipe(double, sampling_rate=32000) == {"text": text}
    assert pipe({"audio": {"array": double, "sampling_rate": 32000}}) == {"text": text}
    assert pipe({"array": samples, "sampling_rate": SAMPLING_RATE}, sampling_rate=32000) == {"text": text}
    assert pipe(double) != {"text": text}


@pytest.mark.parametrize("batch_size", [3, 8, 16])
def test_a_batch_gives_what_single_clips_give(pipe, waveforms, utterances, batch_size):
    clips = [*waveforms, *(u.samples for u in utterances[:2])]
    singles = [pipe(clip) for clip in clips]
    assert len({single["text"] for single in singles}) >= 6
    assert pipe(clips, batch_size=batch_size) == singles
    assert list(pipe((clip for clip in clips), batch_size=batch_size)) == singles
    assert pipe([]) == []


def test_a_list_of_long_and_short_clips_is_put_together_right(pipe, utterances):
    long = np.concatenate([u.samples for u in utterances[:3]])
    expected = [{"text": " ".join(u.text for u in utterances[:3])}, {"text": utterances[3].text}]
    for batch_size in (1, 2, 3, 8):
        results = pipe([long, utterances[3].samples] * 2, batch_size=batch_size, chunk_length_s=WINDOW)
        assert results == expected * 2


@pytest.mark.parametrize("batch_size", [1, 5])
def test_no_word_is_lost_or_doubled_at_the_joints_of_windows(pipe, utterances, batch_size):
    recording = np.concatenate([u.samples for u in utterances])
    assert len(recording) > 65 * SAMPLING_RATE
    ends = np.cumsum([len(u.samples) for u in utterances])
    cuts = [stop for _, stop in cut_at_silences(recording, SAMPLING_RATE, WINDOW)]
    assert len(cuts) == len(ends)
    assert np.abs(np.array(cuts) - ends).max() <= 0.08 * SAMPLING_RATE, "a pause has 0.1 s on either side of a joint"
    text = pipe(recording, chunk_length_s=WINDOW, batch_size=batch_size)["text"]
    assert text == " ".join(u.text for u in utterances)


def test_windows_have_30_s_by_default(pipe, utterances, monkeypatch):
    recording = np.concatenate([u.samples for u in utterances])
    windows = list(pipe.preprocess(recording))
    assert [len(w["samples"]) for w in windows] == [b - a for a, b in cut_at_silences(recording, SAMPLING_RATE, 30)]
    assert [w["is_last"] for w in windows] == [False] * (len(windows) - 1) + [True]
    assert len(windows) == 3
    assert np.array_equal(np.concatenate([w["samples"] for w in windows]), recording)


def test_options_of_generation(pipe, utterances):
    clip, text = utterances[0]
    assert len(text.split()) >= 4
    assert pipe(clip, max_new_tokens=2) == pipe(clip, generate_kwargs={"max_new_tokens": 2})
    assert len(pipe(clip, max_new_tokens=2)["text"].split()) <= 2
    assert pipe(clip, generate_kwargs={"num_beams": 3})["text"] == text
    words = text.split()
    banned = [pipe.tokenizer(form, add_special_tokens=False)["input_ids"] for form in (words[0], " " + words[0])]
    assert words[0] not in pipe(clip, generate_kwargs={"bad_words_ids": banned})["text"].split()
    draws = []
    for _ in range(2):
        torch.manual_seed(1)
        draws.append(pipe(clip, generate_kwargs={"do_sample": True, "temperature": 5.0}))
    assert draws[0] == draws[1] != {"text": text}
    assert pipe(clip) == {"text": text}, "options of one call stay with it"


def test_control_tokens_are_never_written(pipe, utterances):
    noise = np.random.default_rng(0).standard_normal(16000).astype(np.float32) * 0.1
    ids = [
        pipe.forward(window, do_sample=True, temperature=50.0, max_new_tokens=60)["ids"]
        for window in pipe.preprocess(noise)
    ]
    blocked = set(pipe.processor.blocked_token_ids(pipe.model.config.vocab_size))
    assert len(blocked) >= 8
    assert len(ids[0]) > 3
    assert not blocked & set(ids[0][:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"return_timestamps": True}, "return_timestamps"),
        ({"return_timestamps": "word"}, "return_timestamps"),
        ({"stride_length_s": 2}, "stride_length_s"),
        ({"num_beams": 2}, "num_beams .* generate_kwargs"),
        ({"max_new_tokens": 3, "generate_kwargs": {"max_new_tokens": 4}}, "give it once"),
        ({"generate_kwargs": {"num_return_sequences": 2, "num_beams": 2}}, "one text per clip"),
        ({"generate_kwargs": {"return_dict_in_generate": True}}, "one text per clip"),
        ({"chunk_length_s": 0}, "max_seconds=0"),
        ({"sampling_rate": 0}, "sampling_rate=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(pipe, waveforms, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(waveforms[0], **options)


def wav_without_samples() -> bytes:
    content = io.BytesIO()
    soundfile.write(content, np.zeros(0, dtype=np.float32), 16_000, format="WAV")
    return content.getvalue()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere.wav", "no such audio file"),
        (b"no audio", "cannot be read as audio"),
        (wav_without_samples(), "^audio: is empty: remove it$"),
        ({"sampling_rate": 16000}, "none of array"),
        ({"array": np.zeros(8000, dtype=np.float32), "sampling_rate": 0}, "sampling_rate=0"),
        (np.zeros((2, 8000), dtype=np.float32), "mono"),
        (np.zeros(8000, dtype=np.int16), "int16"),
        (np.zeros(100, dtype=np.float32), "100 samples are too few"),
        (np.zeros(0, dtype=np.float32), "0 samples are too few"),
        (np.full(8000, np.nan, dtype=np.float32), "not finite"),
        (3, "mono floats"),
    ],
)
def test_bad_audio_is_refused(pipe, given, message):
    with pytest.raises(ValueError, match=message):
        pipe(given)
