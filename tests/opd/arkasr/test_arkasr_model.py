"""How the model behaves: rotary positions, Whisper's own layers, padding, generation. Its arithmetic: test_arkasr_oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from opd.arkasr import ArkasrConfig, ArkasrForConditionalGeneration, load_model, load_processor, num_audio_tokens
from opd.arkasr.modeling_arkasr import place_audio
from opd.arkasr.modeling_audio import (
    FLOAT16_LIMIT,
    EncoderLayer,
    WhisperRopeEncoder,
    apply_rope,
    attention_mask,
    rope_tables,
)


@pytest.fixture(scope="module")
def model(tiny_dir):
    return load_model(tiny_dir)


@pytest.fixture(scope="module")
def processor(tiny_dir):
    return load_processor(tiny_dir)


def waveform(seconds: float, seed: int) -> np.ndarray:
    """A gliding tone with overtones and a little noise; it ends loud, so that its last frames matter."""
    time = np.arange(round(seconds * 16000)) / 16000
    phase = 2 * np.pi * (150 + 40 * seed) * time * (1 + time / 4)
    noise = np.random.default_rng(seed).standard_normal(len(time))
    return (sum(np.sin(k * phase) / k for k in range(1, 6)) * 0.2 + noise * 0.01).astype(np.float32)


def tiny_config(**changes) -> ArkasrConfig:
    whisper = {
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 96,
        "num_mel_bins": 80,
    }
    whisper |= changes.pop("whisper", {})
    fields = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
                  "intermediate_size": 40, "vocab_size": 100, "audio_token_id": 99}  # fmt: skip
    return ArkasrConfig(whisper_config=whisper, **(fields | changes))


# -- config ------------------------------------------------------------------------------------------------------------


def test_config_reads_both_forms_of_rope_theta():
    assert ArkasrConfig(rope_theta=5e5).rope_parameters["rope_theta"] == 5e5
    nested = ArkasrConfig(rope_parameters={"rope_type": "default", "rope_theta": 3e4})
    assert nested.rope_theta == nested.rope_parameters["rope_theta"] == 3e4
    assert ArkasrConfig().rope_theta == 1e6
    with pytest.raises(ValueError, match="disagree"):
        ArkasrConfig(rope_theta=1e4, rope_parameters={"rope_type": "default", "rope_theta": 1e6})


def test_config_round_trip(tmp_path):
    config = tiny_config(rope_theta=1e5, merge_factor=2, mlp_adapter_act="relu")
    config.save_pretrained(tmp_path)
    again = ArkasrConfig.from_pretrained(tmp_path)
    assert isinstance(again.whisper_config, WhisperConfig)
    assert again.whisper_config.encoder_ffn_dim == 96
    assert (again.rope_theta, again.merge_factor, again.mlp_adapter_act) == (1e5, 2, "relu")
    changed = {k for k, v in again.to_dict().items() if v != config.to_dict().get(k)} - {"_name_or_path"}
    assert changed == set()


def test_unknown_adapter_is_refused():
    with pytest.raises(ValueError, match="adapter_type"):
        tiny_config(adapter_type="conv")


def test_layerdrop_and_odd_heads_are_refused():
    with pytest.raises(ValueError, match="encoder_layerdrop"):
        ArkasrForConditionalGeneration(tiny_config(whisper={"encoder_layerdrop": 0.1}))
    with pytest.raises(ValueError, match="multiple of 4"):
        ArkasrForConditionalGeneration(tiny_config(whisper={"encoder_attention_heads": 32}))


# -- encoder -----------------------------------------------------------------------------------------------------------


def test_rope_is_a_rotation_of_neighbouring_dims():
    head_dim, length = 64, 1600  # beyond Whisper's 1500 positions
    x = torch.randn(2, 3, length, head_dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = apply_rope(x, *rope_tables(length, head_dim, x.device, torch.float64))
    pairs = x[..., :32].numpy()[..., 0::2] + 1j * x[..., :32].numpy()[..., 1::2]
    frequencies = 10000.0 ** (-2 * np.arange(16) / 32)
    expected = pairs * np.exp(1j * np.arange(length)[:, None] * frequencies)
    # float32 tables: the angle of position 1600 carries a rounding error of 1e-4
    np.testing.assert_allclose(turned[..., :32:2], expected.real, atol=5e-4)
    np.testing.assert_allclose(turned[..., 1:32:2], expected.imag, atol=5e-4)
    assert torch.equal(turned[..., 32:], x[..., 32:])


def test_without_rope_the_encoder_is_whispers():
    config = tiny_config(use_rope=False, whisper={"max_source_positions": 50})
    torch.manual_seed(0)
    ours = WhisperRopeEncoder(config).eval()
    theirs = WhisperEncoder(config.whisper_config).eval()
    theirs.layer_norm = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    audios = torch.randn(2, 80, 100)
    with torch.no_grad():
        expected = theirs(audios).last_hidden_state
        torch.testing.assert_close(ours(audios, None)[0], expected, atol=1e-5, rtol=1e-5)
        with pytest.raises(ValueError, match="position table has 50"):
            ours(torch.randn(1, 80, 101), None)


def test_order_of_frames_matters_and_reaches_far(model):
    audios = torch.randn(1, 80, 80, generator=torch.Generator().manual_seed(0))
    changed = audios.clone()
    changed[:, :, -1] += 1.0
    with torch.no_grad():
        first = model.audio_encoder(audios)[0, 0], model.audio_encoder(changed)[0, 0]
    assert (first[0] - first[1]).abs().max() > 1e-6  # full attention: the first token hears the last frame


@pytest.mark.parametrize("longest", [41, 64])
def test_encoder_does_not_see_its_batch_mates(model, longest):
    lengths = [longest, 30, 17, 8, 3, 1]
    audios = 3 * torch.randn(len(lengths), 80, longest, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        batched = model.audio_encoder(audios, mask)  # padding holds large noise, which must not matter
        frames, frame_mask = model.audio_encoder.encode_frames(audios, mask)
        for i, length in enumerate(lengths):
            alone = model.audio_encoder(audios[i : i + 1, :, :length])[0]
            assert len(alone) == num_audio_tokens(length)
            torch.testing.assert_close(batched[i, : len(alone)], alone, atol=1e-5, rtol=1e-5)
            assert (batched[i, len(alone) :] == 0).all()
            assert frame_mask[i].sum() == (length + 1) // 2
            frames_alone, _ = model.audio_encoder.encode_frames(audios[i : i + 1, :, :length])
            torch.testing.assert_close(frames[i, : frames_alone.shape[1]], frames_alone[0], atol=1e-5, rtol=1e-5)
            assert (frames[i, frames_alone.shape[1] :] == 0).all()


def test_a_row_of_padding_only_is_finite(model):
    mask = torch.zeros(2, 20, dtype=torch.long)
    mask[0] = 1
    audios = torch.randn(2, 80, 20)
    audios.requires_grad_()
    rows = model.audio_encoder(audios, mask)
    rows.sum().backward()
    assert torch.isfinite(rows).all()
    assert torch.isfinite(audios.grad).all()
    # Not every version of torch turns a softmax over nothing into zeros: no row may be hidden from itself altogether.
    assert (
        torch.isfinite(attention_mask(torch.tensor([[True, False], [False, False]]), torch.float32, None)).any(-1).all()
    )


def test_float16_layer_output_is_clamped():
    layer = EncoderLayer(tiny_config()).half().eval()
    with torch.no_grad():
        out = layer(torch.full((1, 4, 64), 65504.0, dtype=torch.float16), None, None)
    assert out.max() == FLOAT16_LIMIT == 64504


def test_wrong_audio_shapes_are_refused(model):
    with pytest.raises(ValueError, match="80 mel bins"):
        model.audio_encoder(torch.zeros(1, 128, 10))
    with pytest.raises(ValueError, match="audio_mask"):
        model.audio_encoder(torch.zeros(2, 80, 10), torch.ones(2, 9))


# -- joining -----------------------------------------------------------------------------------------------------------


def test_audio_rows_go_to_the_slots_of_their_own_sample():
    embeds = -torch.ones(2, 5, 1)
    slots = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 1, 0, 0]], dtype=torch.bool)
    rows = torch.tensor([[[10.0], [11.0]], [[20.0], [21.0]]])
    placed = place_audio(embeds, slots, rows)[..., 0]
    # three slots for two rows: the third is zero; extra rows of a sample are never given to the next one
    assert placed.tolist() == [[-1, 10, 11, 0, -1], [20, -1, 21, -1, -1]]
    one_slot = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    assert place_audio(embeds, one_slot, rows)[..., 0].tolist() == [[10, -1, -1, -1, -1], [-1, -1, -1, -1, 20]]


def test_logits_do_not_depend_on_batch_or_padding_side(model, processor):
    clips = [waveform(0.31, 0), waveform(1.0, 1), waveform(0.02, 2), waveform(0.77, 3)]
    batch = processor.build_inputs(clips)
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**batch).logits
        for i, clip in enumerate(clips):
            one = processor.build_inputs([clip])
            alone = model(**one).logits[0]
            torch.testing.assert_close(logits[i, length - len(alone) :], alone, atol=1e-5, rtol=1e-5)
            right = {"attention_mask": batch["attention_mask"][[i]].flip(1)}
            pad = torch.full((1, length - len(alone)), processor.tokenizer.pad_token_id)
            right["input_ids"] = torch.cat([one["input_ids"], pad], 1)
            right |= {"audios": one["audios"], "audio_mask": one["audio_mask"]}
            torch.testing.assert_close(model(**right).logits[0, : len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_audio_changes_the_logits(model, processor):
    inputs = processor.build_inputs([waveform(0.5, 0)])
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
        other = model(**(inputs | {"audios": inputs["audios"].flip(2)})).logits[0, -1]
    assert (logits - other).abs().max() > 1e-4


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generation_in_a_batch_equals_generation_alone(model, processor, options):
    clips = [waveform(0.3, 0), waveform(1.1, 1), waveform(0.7, 2)]
    options = options | {"max_new_tokens": 6, "min_new_tokens": 6}
    batch = processor.build_inputs(clips)
    together = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
    assert len({tuple(row) for row in together.tolist()}) > 1, (
        "all clips give the same ids: the test would prove nothing"
    )
    for i, clip in enumerate(clips):
        one = processor.build_inputs([clip])
        assert model.generate(**one, **options)[0, one["input_ids"].shape[1] :].tolist() == together[i].tolist()


def test_generation_without_cache_and_by_hand_agree(model, processor):
    batch = processor.build_inputs([waveform(0.3, 0), waveform(0.9, 1)])
    length = batch["input_ids"].shape[1]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**batch, **options)[:, length:]
    assert torch.equal(model.generate(**batch, **options, use_cache=False)[:, length:], cached)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():  # as rollouts decode: positions are left to the model
        out = model(**batch, use_cache=True, logits_to_keep=1)
        for step in range(5):
            logits = out.logits[:, -1]
            logits[:, model.config.eos_token_id] = float("-inf")
            ids = logits.argmax(-1, keepdim=True)
            assert torch.equal(ids[:, 0], cached[:, step])
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            out = model(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)


def test_generation_encodes_the_audio_once(model, processor):
    calls = []
    handle = model.audio_encoder.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**processor.build_inputs([waveform(0.3, 0)]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    handle.remove()
    assert len(calls) == 1


def test_positions_count_real_tokens_only(model, processor):
    batch = processor.build_inputs([waveform(0.3, 0), waveform(0.9, 1)])
    mask = batch["attention_mask"]
    mask = torch.cat([mask, torch.tensor([[1, 1], [1, 0]])], dim=1)
    ids = torch.cat([batch["input_ids"], torch.zeros(2, 2, dtype=torch.long)], dim=1)
    seen = []
    handle = model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        out = model(**(batch | {"input_ids": ids, "attention_mask": mask}))
        mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], dim=1)
        model(input_ids=ids[:, -1:], attention_mask=mask, past_key_values=out.past_key_values)
    handle.remove()
    for row in range(2):
        real = mask[row, :-1].bool()
        assert seen[0]["position_ids"][row][real].tolist() == list(range(int(real.sum())))
        assert seen[1]["position_ids"][row].tolist() == [int(real.sum())]


def test_the_placeholder_id_is_never_embedded():
    model = ArkasrForConditionalGeneration(tiny_config(vocab_size=99)).eval()  # the placeholder is id 99
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[5, 99, 6]]), audios=torch.zeros(1, 80, 9))
    assert out.logits.shape == (1, 3, 99)


def test_sampling_is_seeded(model, processor):
    inputs = processor.build_inputs([waveform(0.5, 0)])
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(model.generate(**inputs, do_sample=True, max_new_tokens=8, min_new_tokens=8))
    assert torch.equal(*draws)


def test_audio_frames_replace_audios(model, processor):
    batch = processor.build_inputs([waveform(0.3, 0), waveform(0.9, 1)])
    frames = model.audio_encoder.encode_frames(batch["audios"], batch["audio_mask"])
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(model(**text, audio_frames=frames).logits, model(**batch).logits)


def test_logits_to_keep(model, processor):
    batch = processor.build_inputs([waveform(0.3, 0), waveform(0.9, 1)])
    with torch.no_grad():
        every = model(**batch).logits
        torch.testing.assert_close(model(**batch, logits_to_keep=3).logits, every[:, -3:])
        picked = torch.tensor([1, 5])
        torch.testing.assert_close(model(**batch, logits_to_keep=picked).logits, every[:, picked])


def test_all_parameters_but_the_unused_table_learn(tiny_dir, processor):
    model = load_model(tiny_dir).train()
    model.gradient_checkpointing_enable()
    batch = processor.build_inputs([waveform(0.3, 0), waveform(0.9, 1)])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels, use_cache=False).loss
    loss.backward()
    logits = model(**batch).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert still == {"audio_encoder.whisper.embed_positions.weight"}


def test_bfloat16_model_takes_float32_audio(tiny_dir, processor):
    model = load_model(tiny_dir, dtype=torch.bfloat16)
    batch = processor.build_inputs([waveform(0.3, 0), waveform(0.9, 1)])
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


def test_eager_and_sdpa_agree(tiny_dir, model, processor):
    eager = load_model(tiny_dir, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    batch = processor.build_inputs([waveform(0.3, 0), waveform(0.9, 1)])
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(eager(**batch).logits[real], model(**batch).logits[real], atol=1e-5, rtol=1e-5)


def test_audio_that_does_not_belong_is_refused(model, processor):
    batch = processor.build_inputs([waveform(0.3, 0), waveform(0.9, 1)])
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with pytest.raises(ValueError, match="there are no audios"):
        model(**text)
    with pytest.raises(ValueError, match="1 clips for 2 rows"):
        model(**text, audios=batch["audios"][:1])
    with pytest.raises(ValueError, match="input_ids"):
        model(inputs_embeds=torch.zeros(2, 3, 64), audios=batch["audios"])
    frames = model.audio_encoder.encode_frames(batch["audios"], batch["audio_mask"])
    with pytest.raises(ValueError, match="two forms"):
        model(**batch, audio_frames=frames)


def test_spec_aug_is_refused_in_training_only():
    model = ArkasrForConditionalGeneration(tiny_config(spec_aug=True)).eval()
    assert model.audio_encoder(torch.zeros(1, 80, 10)).shape == (1, 1, 48)
    with pytest.raises(ValueError, match="spec_aug"):
        model.train().audio_encoder(torch.zeros(1, 80, 10))


def test_text_alone_needs_no_audio(model):
    with torch.no_grad():
        assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 384)
