"""What `apply_chat_template` takes, honours and refuses: options, sources of audio, and the methods scripts call."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

from opd.arkasr import load_processor, num_audio_tokens
from opd.arkasr.audio_arkasr import resample

INSTRUCTION = {"type": "text", "text": "Please transcribe this audio."}


@pytest.fixture(scope="module")
def processor(tiny_dir):
    return load_processor(tiny_dir)


def tone(num_samples: int, rate: int = 16000) -> np.ndarray:
    """A tone that fades in, after a stretch of digital silence."""
    signal = 0.5 * np.sin(2 * np.pi * 440 * np.arange(num_samples) / rate) * np.linspace(0, 1, num_samples)
    signal[: num_samples // 4] = 0
    return signal.astype(np.float32)


def conversation(**audio) -> list[dict]:
    return [{"role": "user", "content": [{"type": "audio", **audio}, INSTRUCTION]}]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": "x"}, "chat_template"),
        ({"audio_pad_to_multiple_of": 0}, "audio_pad_to_multiple_of=0"),
        ({"sampling_rate": 0}, "sampling_rate=0"),
        ({"sampling_rate": 16000.5}, "sampling_rate=16000.5"),
        ({"return_tensors": "tf"}, "'pt' or 'np'"),
        ({"return_dict": False}, "dictionary"),
        ({"return_tensors": "np", "audio_dtype": "bfloat16"}, "no bfloat16"),
        ({"return_tensors": None}, "'pt' or 'np'"),
        ({"audio_dtype": "int16"}, "floating-point"),
        ({"audio_torch_dtype": "bfloat"}, "floating-point"),
        ({"audio_padding": "do_not_pad"}, "audio_padding"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"tools": [{"name": "x"}]}, "tools"),
        ({"text_kwargs": {"truncation": True}}, "max_length=None"),
        ({"text_kwargs": {"padding": "max_length"}}, "max_length=None"),
        ({"text_kwargs": {"max_length": 50}}, "max_length=50"),
        ({"text_kwargs": {"stride": 3}}, "stride"),
        ({"text_kwargs": {"padding": "widest"}}, "widest"),
        ({"text_kwargs": {"padding": "max_length", "max_length": 5}}, "cannot be cut"),
        ({"truncation": True, "max_length": 5}, "cannot be cut"),
        ({"padding_side": "middle"}, "padding_side"),
        ({"padding_side": "left", "text_kwargs": {"padding_side": "right"}}, "another value"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(processor, change, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(conversation(array=tone(3200)), **change)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "no audio"}], "0 audio parts"),
        ([{"role": "user", "content": [{"type": "text"}]}], "with a string"),
        (conversation(array=tone(400)) * 2, "2 audio parts"),
        ([{"role": "tool", "content": "x"}], "role 'tool'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "type 'image'"),
        ([*conversation(array=tone(400)), {"role": "assistant", "content": "x"}], "add_generation_prompt=False"),
        (conversation(), "has none"),
        (conversation(array=tone(400), path="x.wav"), "has path, array"),
        (conversation(array=tone(400), sample_rate=8000), "unknown sample_rate"),
        (conversation(array=tone(400), base64="x"), "has array, base64"),
        (conversation(base64="no base64!"), "encode it anew"),
        (conversation(base64=3), "encode it anew"),
        (conversation(base64="aGVsbG8="), "conversation 0: cannot be read as audio"),
        (conversation(array=tone(400), sampling_rate="fast"), "sampling_rate='fast'"),
        (conversation(array=tone(400), begin_time=1.0), "begins at 1 s"),
        (conversation(array=tone(400), begin_time=1.0, end_time=0.5), "not after begin_time"),
        (conversation(url="ftp://example.org/a.wav"), "only files and"),
        (conversation(url="http://127.0.0.1:9/a.wav"), "cannot be downloaded"),
        (conversation(path="/nowhere/a.wav"), "no such audio file"),
        ([{"role": "user", "content": [{"type": "audio", "array": tone(400)}, {"type": "text", "text": "<|audio|>"}]}],
         "marks audio"),
    ],
)  # fmt: skip
def test_conversations_that_cannot_be_honoured_are_refused(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template([messages])


def test_no_conversation_is_refused(processor):
    for nothing in ([], "one two"):
        with pytest.raises(ValueError, match="needs a list of messages"):
            processor.apply_chat_template(nothing)


# -- options that are honoured -----------------------------------------------------------------------------------------


def test_the_rate_of_arrays_is_said_once_or_in_each_part(processor):
    slow, fast = tone(8000, rate=8000), tone(24000, rate=24000)
    inputs = processor.apply_chat_template(
        [conversation(array=slow), conversation(array=fast, sampling_rate=24000)], sampling_rate=8000
    )
    expected = processor.build_inputs([resample(slow, 8000, 16000), resample(fast, 24000, 16000)])
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({"audio_pad_to_multiple_of": 4000}, 50),
        ({"audio_pad_to_multiple_of": 320}, 40),
        ({"audio_padding": True, "audio_pad_to_multiple_of": None}, 40),
        ({"audio_padding": "max_length", "audio_max_length": 9000, "audio_pad_to_multiple_of": 4000}, 75),
        ({"audio_padding": "max_length"}, 3000),
    ],
)
def test_audio_is_padded_in_samples(processor, options, frames):
    clips = [tone(3200), tone(6400)]
    inputs = processor.apply_chat_template([conversation(array=clip) for clip in clips], **options)
    plain = processor.build_inputs(clips)
    assert inputs["audios"].shape == (2, 80, frames)
    assert inputs["audio_mask"].sum(1).tolist() == [20, 40]
    assert torch.equal(inputs["audios"][:, :, :40], plain["audios"])
    assert (inputs["audios"][:, :, 40:] == 0).all()
    assert torch.equal(inputs["input_ids"], plain["input_ids"])


@pytest.mark.parametrize("where", ["call", "text_kwargs"])
@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"padding": "longest"}, 0),
        ({"padding": True, "truncation": False}, 0),
        ({"padding": "longest", "truncation": True, "max_length": 14}, 0),
        ({"padding": "max_length", "max_length": 40}, 26),
        ({"pad_to_multiple_of": 10}, 6),
        ({"add_special_tokens": True}, 0),  # this tokenizer has none to add
    ],
)
def test_text_options(processor, options, more, where):
    clips = [tone(3200), tone(6400)]
    given = options if where == "call" else {"text_kwargs": options}
    inputs = processor.apply_chat_template([conversation(array=clip) for clip in clips], **given)
    rows = [processor.prompt_ids(20), processor.prompt_ids(40)]
    length = len(rows[1]) + more
    assert inputs["input_ids"].shape == (2, length)
    for row, ids, mask in zip(rows, inputs["input_ids"], inputs["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == row
        assert mask.tolist() == [0] * (length - len(row)) + [1] * len(row)


def test_added_special_tokens_are_added(processor):
    from tokenizers.processors import TemplateProcessing

    with_bos = load_processor(processor.tokenizer.name_or_path)
    pad = processor.tokenizer.pad_token
    with_bos.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{pad} $A", special_tokens=[(pad, processor.tokenizer.pad_token_id)]
    )
    rows = [
        with_bos.apply_chat_template(conversation(array=tone(3200)), add_special_tokens=added)["input_ids"][0].tolist()
        for added in (False, True)
    ]
    assert rows == [processor.prompt_ids(20), [processor.tokenizer.pad_token_id, *processor.prompt_ids(20)]]


def test_padding_can_be_left_out_where_there_is_none(processor):
    pair = [conversation(array=tone(3200)), conversation(array=tone(3300))]
    unpadded = processor.apply_chat_template(pair, padding=False)
    assert torch.equal(unpadded["input_ids"], torch.tensor([processor.prompt_ids(20)] * 2))
    with pytest.raises(ValueError, match="differ in length"):
        processor.apply_chat_template([*pair, conversation(array=tone(6400))], text_kwargs={"padding": "do_not_pad"})


@pytest.mark.parametrize("dtype", ["float16", "torch.bfloat16", torch.float64])
@pytest.mark.parametrize("name", ["audio_dtype", "audio_torch_dtype"])
def test_audio_dtype(processor, name, dtype):
    inputs = processor.apply_chat_template(conversation(array=tone(3200)), **{name: dtype})
    assert str(inputs["audios"].dtype).endswith(str(dtype).removeprefix("torch."))


def test_text_is_rendered_whatever_tensors_are_asked_for(processor):
    messages = conversation(array=tone(3200))
    plain = processor.apply_chat_template(messages, tokenize=False)
    assert (
        processor.apply_chat_template(messages, None, tokenize=False, return_tensors=None, return_dict=False) == plain
    )
    assert processor.tokenizer(plain, add_special_tokens=False)["input_ids"] == processor.prompt_ids(20)


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["path", "audio", "url", "base64", "data_url", "bytes"])
def test_audio_from_an_address_or_bytes(processor, served, key):
    signal, address, content = served
    encoded = base64.b64encode(content).decode()
    part = {"data_url": {"base64": f"data:audio/flac;base64,{encoded}"}, "base64": {"base64": encoded[:76] + "\n" + encoded[76:]},
            "bytes": {"audio": content}}.get(key, {key: address})  # fmt: skip
    inputs = processor.apply_chat_template(conversation(**part, begin_time=0.25, end_time=0.75))
    assert torch.equal(inputs["audios"], processor.features([signal[4000:12000]])[0])


def test_an_address_without_audio_is_refused(processor, served):
    with pytest.raises(ValueError, match="none.wav: cannot be downloaded .*404"):
        processor.apply_chat_template(conversation(url=served[1].replace("a.flac", "none.wav")))


def test_what_scripts_for_the_published_code_call(processor, served):
    signal, address, _ = served
    long = tone(480_160)
    conversations = [conversation(path=address, begin_time=0.5), conversation(array=long)]
    templates, audios = processor._build_templates_and_audios(
        conversations=conversations, sampling_rate=16000, add_generation_prompt=True
    )
    counts = processor._calculate_audio_token_counts_per_sample(
        audios_raw=audios, sampling_rate=16000, audio_max_length=480_000, audio_pad_to_multiple_of=None
    )
    assert [len(audio) for audio in audios] == [len(signal) - 8000, 480_160]
    frames = (len(signal) - 8000) // 160
    assert counts == [num_audio_tokens(frames), 375]
    assert processor._calculate_audio_token_counts_per_sample(audios, audio_max_length=8000) == [6, 6]
    with pytest.raises(ValueError, match="sampling_rate=8000"):
        processor._calculate_audio_token_counts_per_sample(audios, sampling_rate=8000)
    # What such scripts do with them: the placeholders go between the marks.
    for template, count, num_frames in zip(templates, counts, (frames, 3000), strict=True):
        head, rest = template.split(processor.bos_audio_token)
        tail = rest.split(processor.eos_audio_token)[1]
        assert head == processor.user_token
        assert tail.endswith(processor.assistant_token)
        text = head + processor.bos_audio_token + processor.audio_token * count + processor.eos_audio_token + tail
        assert processor.tokenizer(text, add_special_tokens=False)["input_ids"] == processor.prompt_ids(num_frames)
    half_rate = processor._load_audio_file(address, 8000, 0.25, 0.5)
    np.testing.assert_allclose(half_rate, resample(signal[4000:12000], 16000, 8000), atol=1e-4)
    assert processor.assistant_end_token == "<|im_end|>"
