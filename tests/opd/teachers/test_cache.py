"""Kept transcripts and scores are those of the teacher, and are found again by the same teacher, audio and text only."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_teachers import ARKASR, STUDENT, permute_vocabulary

from data.manifest import read_manifest
from opd.arkasr import load_model, load_processor
from opd.config import config_from_dict
from opd.rollout.forced import forced
from opd.support import NUM_EXTRA
from opd.teachers import fingerprints, make_teacher
from opd.teachers.cache import CachedTeacher, KeptTexts
from opd.teachers.fingerprints import file_digest, fingerprint, replace_file
from opd.types import Batch, Rollout
from opd.vocab import blocked_mask


@pytest.fixture
def utterances(speech: dict[str, Path]) -> Batch:
    return read_manifest(speech["eval"])[:4]


def test_transcripts_are_kept(make_config: Callable, utterances: Batch, tmp_path: Path) -> None:
    config = make_config("arkasr", cache_dir=str(tmp_path / "kept"))
    plain = make_teacher(make_config("arkasr"), str(STUDENT))
    first, second = (make_teacher(config, str(STUDENT)) for _ in range(2))
    assert isinstance(second, CachedTeacher)
    missing = dataclasses.replace(utterances[0], id="missing", audio=str(tmp_path / "missing.wav"))
    batch = [*utterances[:3], missing]
    written = first.transcribe(batch)
    assert [t.text for t in written] == [t.text for t in plain.transcribe(batch)]
    assert written[3].error is not None
    assert all(t.finished and not t.looped and t.avg_logprob < 0 and t.num_tokens > 1 for t in written[:3])
    again = second.transcribe([utterances[3], *batch])
    assert again[1:4] == written[:3]
    assert (second.hits, second.misses) == (3, 2), "bad audio is looked at again"
    # Another prompt, another segment or a changed file is another utterance.
    other = make_teacher(config | {"rollout": config["rollout"] | {"max_new_tokens": 2}}, str(STUDENT))
    assert not any(t.finished for t in other.transcribe(utterances[:1]))
    second.transcribe([dataclasses.replace(utterances[0], end_time=0.5)])
    assert (second.hits, second.misses) == (3, 3)


def damage(folder: Path) -> list[Path]:
    """Cuts every kept file short, as a loss of power may leave them: to nothing, to a part, to another thing."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for number, path in enumerate(files):
        path.write_bytes([b"", path.read_bytes()[:20], b'{"other": 1}'][number % 3])
    return files


def test_a_damaged_transcript_counts_as_none(make_config: Callable, utterances: Batch, tmp_path: Path) -> None:
    config = make_config("arkasr", cache_dir=str(tmp_path))
    written = make_teacher(config, str(STUDENT)).transcribe(utterances[:3])
    assert len(damage(tmp_path)) == 3
    again = make_teacher(config, str(STUDENT))
    assert again.transcribe(utterances[:3]) == written
    assert (again.hits, again.misses) == (0, 3)
    assert again.transcribe(utterances[:3]) == written
    assert (again.hits, again.misses) == (3, 3), "they were written anew"


def test_a_run_finds_what_its_teachers_have_written(utterances: Batch, tmp_path: Path) -> None:
    routed = [dataclasses.replace(u, extra={"room": str(i % 2)}) for i, u in enumerate(utterances)]
    values = {
        "recipe": "test", "stage": "opd", "student": {"path": str(STUDENT)}, "data": {"train_manifest": "none"},
        "teacher": {
            "path": str(ARKASR),
            "routes": {"quiet": {"match": {"room": "0"}, "cache_dir": str(tmp_path)}, "loud": {}},
        },
    }  # fmt: skip
    config = config_from_dict(values)
    section = dataclasses.asdict(config.teacher.by_route()["quiet"])
    written = make_teacher(config.to_dict() | {"teacher": section}, str(STUDENT)).transcribe(routed[:3])
    assert all(t.text for t in written)
    assert KeptTexts(config)(routed) == {routed[0].id: written[0].text, routed[2].id: written[2].text}
    assert KeptTexts(config)(utterances) == {}, "without the field they are the other teacher's, which keeps nothing"


def test_scores_of_fixed_texts_are_kept(make_config: Callable, utterances: Batch, tmp_path: Path) -> None:
    config = make_config("arkasr", cache_dir=str(tmp_path), loss={"support": "teacher"})
    config["rollout"]["source"] = "manifest"
    processor, student = load_processor(STUDENT), load_model(STUDENT)
    tokenizer = processor.tokenizer
    rows = [[*tokenizer(str(u.text))["input_ids"], tokenizer.eos_token_id] for u in utterances]
    plain = make_teacher(config | {"teacher": config["teacher"] | {"cache_dir": None}}, str(STUDENT))
    kept = make_teacher(config, str(STUDENT))
    inputs = processor.build_inputs(plain.collator.collate(utterances)[0])
    rollout = forced(
        student, inputs, rows, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
        blocked_V=blocked_mask([], student.config.vocab_size), top_k=8,
    ).to_dict()  # fmt: skip
    expected, counts = plain.score_and_count(utterances, rollout)
    two = [1, 3]
    kept.score([utterances[i] for i in two], {name: tensor[two] for name, tensor in rollout.items()})
    for found, found_counts in (kept.score_and_count(utterances, rollout) for _ in range(2)):
        assert found_counts == counts
        assert found.keys() == expected.keys()
        mask_BT = rollout["response_mask_BT"]
        for name, value in found.items():
            assert value.shape == expected[name].shape, name
            wanted = expected[name]
            if name == "candidate_logprobs_BTC":  # the student's top-k is no part of a kept score
                value, wanted = value[..., -NUM_EXTRA:], wanted[..., -NUM_EXTRA:]
            torch.testing.assert_close(value[mask_BT], wanted[mask_BT], rtol=0, atol=1e-4)
    assert (kept.hits, kept.misses) == (2 + 4, 2 + 2)
    assert len(damage(tmp_path)) == 4
    mended = kept.score(utterances, rollout)
    assert (kept.hits, kept.misses) == (6, 4 + 4), "damaged files count as none"
    torch.testing.assert_close(mended["entropy_BT"][mask_BT], expected["entropy_BT"][mask_BT], rtol=0, atol=1e-4)
    changed = dict(rollout) | {"response_ids_BT": rollout["response_ids_BT"].clone()}
    changed["response_ids_BT"][0, 0] += 1
    kept.score(utterances, changed)
    assert (kept.hits, kept.misses) == (6 + 3, 8 + 1), "another text is another score"


def test_a_student_with_other_ids_gets_scores_of_its_own(
    make_config: Callable, utterances: Batch, tmp_path: Path
) -> None:
    """The same ids, which mean other tokens: of the first student's scores none may be taken for them."""
    config = make_config("arkasr", cache_dir=str(tmp_path / "kept"), loss={"support": "teacher"})
    config["rollout"]["source"] = "manifest"
    other = permute_vocabulary(STUDENT, tmp_path / "other")
    ids_BT = torch.tensor([load_processor(STUDENT).tokenizer(str(u.text))["input_ids"][:2] for u in utterances])
    B, T = ids_BT.shape
    rollout = Rollout(
        response_ids_BT=ids_BT, response_mask_BT=torch.ones(B, T).bool(), topk_ids_BTK=torch.zeros(B, T, 2).long(),
        logprobs_BT=torch.zeros(B, T), finished_B=torch.zeros(B).bool(), loop_start_B=torch.full((B,), T),
        bad_audio_B=torch.zeros(B).bool(),
    ).to_dict()  # fmt: skip
    make_teacher(config, str(STUDENT)).score(utterances, rollout)
    kept, plain = (
        make_teacher(config | {"teacher": config["teacher"] | {"cache_dir": folder}}, str(other))
        for folder in (config["teacher"]["cache_dir"], None)
    )
    found, expected = kept.score(utterances, rollout), plain.score(utterances, rollout)
    assert (kept.hits, kept.misses) == (0, len(utterances))
    assert torch.equal(found["topk_ids_BTK"], expected["topk_ids_BTK"])
    texts = kept.transcribe(utterances)
    again = make_teacher(config, str(STUDENT))
    assert again.transcribe(utterances) == texts
    assert again.hits == len(utterances), "transcripts are those of any student"


def test_a_score_without_audio_is_not_kept(make_config: Callable, utterances: Batch, tmp_path: Path) -> None:
    config = make_config("arkasr", cache_dir=str(tmp_path / "kept"), loss={"support": "teacher"})
    config["rollout"]["source"], config["data"]["on_bad_audio"] = "manifest", "skip"
    kept = make_teacher(config, str(STUDENT))
    batch = [utterances[0], dataclasses.replace(utterances[1], audio=str(tmp_path / "missing.wav"))]
    ids_BT = torch.tensor([[5, 6], [7, 8]])
    rollout = Rollout(
        ids_BT, torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2, 8, dtype=torch.int64), torch.zeros(2, 2),
        torch.zeros(2, dtype=torch.bool), torch.full((2,), 2), torch.zeros(2, dtype=torch.bool),
    ).to_dict()  # fmt: skip
    for misses in (2, 3):
        score, counts = kept.score_and_count(batch, rollout)
        assert [entry[0] for entry in counts["bad_audio"]] == [utterances[1].id]
        assert (counts["positions"], counts["responses"]) == (2, 1)
        assert score["aligned_mask_BT"].tolist() == [[True, True], [False, False]]
        assert kept.misses == misses, "the other one was kept"
    both, counts = kept.score_and_count(batch[1:], {name: value[1:] for name, value in rollout.items()})
    assert not both["aligned_mask_BT"].any()
    assert counts["positions"] == 0


def test_under_the_union_nothing_is_kept(make_config: Callable, tmp_path: Path) -> None:
    config = make_config("arkasr", cache_dir=str(tmp_path))
    config["rollout"]["source"] = "manifest"
    assert not make_teacher(config, str(STUDENT)).keeps_scores


def test_a_fingerprint_is_of_the_weights_not_of_the_place(tmp_path: Path) -> None:
    copy = shutil.copytree(ARKASR, tmp_path / "copy")
    assert fingerprint(str(copy)) == fingerprint(str(ARKASR))
    weights = load_file(copy / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] + 1
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(str(copy)) != fingerprint(str(ARKASR))
    assert fingerprint("owner/not-here") == "hub:owner/not-here"


def test_a_fingerprint_reads_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two checkpoints of one size that differ somewhere in the middle only; their digests are kept for the next run."""
    monkeypatch.setattr(fingerprints, "LARGE", 1 << 20)
    content = bytearray(3 << 20)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(content)
        content[len(content) // 2] ^= 1
    kept_in = tmp_path / "kept"
    first = [fingerprint(str(folder), kept_in) for folder in folders]
    assert len(set(first)) == 2
    fingerprints._digest.cache_clear()  # another process
    assert len(kept := list(kept_in.iterdir())) == 2
    assert [fingerprint(str(folder), kept_in) for folder in folders] == first
    fingerprints._digest.cache_clear()
    for path in kept:
        path.write_text("cut off")
    assert [fingerprint(str(folder), kept_in) for folder in folders] == first, "a damaged digest counts as none"


def test_a_digest_is_read_again_when_its_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    before, mtime_ns = file_digest(file), file.stat().st_mtime_ns
    time.sleep(0.02)  # the clock of a file system ticks in milliseconds
    file.write_bytes(b"two")
    os.utime(file, ns=(mtime_ns, mtime_ns))
    assert file_digest(file) != before


def test_writers_of_one_place_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """Two containers may both have a process of the same number."""
    seen = []

    def write(temp: Path) -> None:
        seen.append(temp)
        temp.write_text("inner")
        if len(seen) == 1:
            replace_file(tmp_path / "kept", write)
            assert temp.read_text() == "inner"

    replace_file(tmp_path / "kept", write)
    assert len(set(seen)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
