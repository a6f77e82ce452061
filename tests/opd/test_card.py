"""The model card: metadata that the Hub's own library reads back, tables, benchmark results, and snippets that run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries

from opd.card import check_card_facts, write_model_card
from opd.export import load_model, load_processor, save_arkasr

SEED = Path(__file__).resolve().parents[2] / "seeds" / "tiny_student"
BEFORE = {"wer": 1.5, "cer": 1.25, "num_utterances": 40, "normaliser": "opd-basic-1"}
AFTER = {"wer": 0.12344, "cer": 0.05, "num_utterances": 40, "normaliser": "opd-basic-1"}
NO_WORDS = {"wer": float("nan"), "cer": float("nan")}
CONFIG = {
    "student": {"path": "ark/ARK-ASR-0.6B"},
    "teacher": {"path": "/models/big_teacher"},
    "data": {"eval_manifests": {"dev": "dev.jsonl", "clean": "clean.jsonl"}, "default_language": None},
    "eval": {"patience": 3, "best_by": "", "max_utterances": 0},
    "optim": {"lr": 0.001},
}
FACTS = {
    "recipe": "ark06b",
    "stage": "opd",
    "step": 600,
    "eval": {
        "dev": {"before": BEFORE, "after": AFTER, "teacher": {"wer": 0.02, "cer": 0.01}},
        "clean": {"before": None, "after": {"wer": 0.2, "cer": 0.1}},
        "silence": {"before": NO_WORDS, "after": NO_WORDS},
        "old": {"before": BEFORE, "after": None},
    },
    "languages": ["German", "en-US", "English"],
    "config": CONFIG,
}


def load_card(folder: Path, **facts) -> ModelCard:
    return ModelCard.load(write_model_card(folder, {**FACTS, **facts}))


def test_the_metadata_is_what_the_hub_reads(tmp_path):
    def result(name, dataset, wer, cer, **more):
        metrics = [
            {"type": "wer", "value": wer, "name": "WER", **more},
            {"type": "cer", "value": cer, "name": "CER", **more},
        ]
        task = {"type": "automatic-speech-recognition", "name": "Automatic Speech Recognition"}
        return {"task": task, "dataset": {"name": name, **dataset}, "metrics": metrics}

    card = load_card(
        tmp_path, license="apache-2.0", datasets=["lab/a", "lab/b"], eval_datasets={"clean": "org/bench:clean"}
    )
    assert card.data.to_dict() == {
        "base_model": "ark/ARK-ASR-0.6B",
        "base_model_relation": "finetune",
        "datasets": ["lab/a", "lab/b"],
        "language": ["de", "en"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "metrics": ["wer", "cer"],
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["arkasr", "on-policy-distillation"],
        "model-index": [
            {
                "name": "ARK-ASR ark06b",
                "results": [
                    # The first set chose the checkpoint (patience), so it is no test set.
                    result(
                        "dev", {"type": "dev", "split": "validation"}, 12.34, 5.0, args={"normaliser": "opd-basic-1"}
                    ),
                    result("clean", {"type": "org/bench", "config": "clean"}, 20.0, 10.0),
                ],
            }
        ],
    }
    assert str(card) == (tmp_path / "README.md").read_text(encoding="utf-8")


def test_what_is_not_known_is_not_claimed(tmp_path):
    config = CONFIG | {"student": {"path": "/models/seed"}, "eval": {"patience": 0}}
    card = load_card(tmp_path, stage="sft", languages=None, config=config)
    metadata = card.data.to_dict()
    assert not {"base_model", "base_model_relation", "datasets", "language", "license"} & metadata.keys()
    assert metadata["tags"] == ["arkasr"]
    assert [r["dataset"]["split"] for r in metadata["model-index"][0]["results"]] == ["test", "test"]
    assert "It started from `seed`." in card.text
    assert "teacher in" not in card.text
    assert not (tmp_path / ".eval_results").exists()

    bare = ModelCard.load(write_model_card(tmp_path, {})).data.to_dict()
    assert bare.keys() == {"library_name", "pipeline_tag", "tags"}
    for default, codes in (("French", ["fr"]), ("Klingon", None)):
        config = CONFIG | {"data": {"default_language": default}}
        assert load_card(tmp_path, languages=None, config=config, eval=None).data.language == codes


def test_start_and_teacher_are_named(tmp_path):
    text = load_card(tmp_path).text
    assert "It started from [ark/ARK-ASR-0.6B](https://huggingface.co/ark/ARK-ASR-0.6B)." in text
    assert "Its teacher in on-policy distillation was `big_teacher`." in text
    routes = {"a": {"path": "/models/asian"}, "b": {"path": "org/european"}, "c": {"match": {}}, "d": {"match": {}}}
    text = load_card(tmp_path, config=CONFIG | {"teacher": {"path": "/models/other", "routes": routes}}).text
    links = "`asian`, `other`, [org/european](https://huggingface.co/org/european)"
    assert f"Its teachers in on-policy distillation were {links}." in text
    local = CONFIG | {"student": {"path": "/models/seed"}}
    card = load_card(tmp_path, base_model="ark/base", config=local)
    assert card.data.base_model == "ark/base"
    assert "It started from [ark/base]" in card.text


def test_tables(tmp_path):
    facts = {
        "recipe": "tiny",
        "steps": 600,
        "teacher_note": None,
        "license": "mit",
        "eval": {"unseen|voices": {"before": None, "after": AFTER, "teacher": {"wer": 0.02, "cer": 0.01}}},
        "config": {"optim": {"lr": 0.001}},
    }
    text = write_model_card(tmp_path, facts).read_text(encoding="utf-8")
    assert "| unseen\\|voices | - | 12.34% / 5.00% | 2.00% / 1.00% |" in text
    assert "| steps | 600 |" in text
    assert "| optim.lr | 0.001 |" in text
    assert "teacher_note" not in text
    assert "| license |" not in text


def test_no_folder_of_this_machine_is_told(tmp_path):
    home = "/home/someone/private"
    facts = {
        "recipe": "tiny",
        "export_dir": f"{home}/runs/x/export",
        "eval_manifests": {"dev": f"{home}/dev.jsonl"},
        "teacher_data": {"teacher": f"{home}/models/large, org/small"},
        "config": {
            "run_dir": f"{home}/runs/x",
            "student": {"path": f"{home}/models/start"},
            "teacher": {"path": "org/small", "python_path": "~/someone/bin/python", "prompt": {"text": "/no_think"}},
            "data": {"train_manifest": f"hf:{home}/digits?split=train", "several": [f"{home}/a.jsonl", "b/c.jsonl"]},
        },
    }
    text = write_model_card(tmp_path, facts).read_text(encoding="utf-8")
    assert "someone" not in text
    assert "run_dir" not in text
    assert "export_dir" not in text
    for row in (
        "eval_manifests.dev | dev.jsonl", "teacher_data.teacher | large, org/small", "student.path | start",
        "teacher.path | org/small", "teacher.python_path | python", "teacher.prompt.text | /no_think",
        "data.train_manifest | hf:digits?split=train", "data.several | ['a.jsonl', 'b/c.jsonl']",
    ):  # fmt: skip
        assert f"| {row} |" in text


def test_numbers_are_rounded_among_the_facts(tmp_path):
    times = {"total": 19.731047461769776, "ray": 0.0001879499905044213, "none": 0.0, "long": 12345.678}
    text = write_model_card(tmp_path, {"start": times, "config": {"lr": 0.00012345}}).read_text(encoding="utf-8")
    rows = (
        "start.total | 19.73",
        "start.ray | 0.00019",
        "start.none | 0.0",
        "start.long | 12345.68",
        "lr | 0.00012345",
    )
    assert all(f"| {row} |" in text for row in rows)


# -- .eval_results -----------------------------------------------------------------------------------------------------


def test_results_of_benchmarks(tmp_path):
    other = tmp_path / ".eval_results" / "mmlu.yaml"
    other.parent.mkdir()
    other.write_text("- kept\n")
    write_model_card(tmp_path, {**FACTS, "eval_datasets": {"dev": "org/bench:dev", "clean": "org/bench:test.clean"}})
    read = {p.name: yaml.safe_load(p.read_text()) for p in other.parent.glob("opd-*.yaml")}
    assert read == {
        "opd-dev.yaml": [
            {
                "dataset": {"id": "org/bench", "task_id": "dev"},
                "value": 12.34,
                "notes": "WER in %, normaliser opd-basic-1, 40 utterances",
            }
        ],
        "opd-clean.yaml": [
            {"dataset": {"id": "org/bench", "task_id": "test.clean"}, "value": 20.0, "notes": "WER in %"}
        ],
    }
    assert parse_eval_result_entries(read["opd-clean.yaml"])[0].task_id == "test.clean"
    # Two tasks of one data set stay two entries of the metadata.
    results = ModelCard.load(tmp_path / "README.md").data.to_dict()["model-index"][0]["results"]
    assert [r["dataset"]["config"] for r in results] == ["dev", "test.clean"]

    write_model_card(tmp_path, FACTS)
    assert [p.name for p in other.parent.iterdir()] == ["mmlu.yaml"]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"base_model": "./seed"}, "base_model=./seed: must be a Hub id"),
        ({"datasets": ["lab/a", "digits"]}, "datasets=digits: must be a Hub id"),
        ({"languages": ["Klingon"]}, "unknown language 'Klingon'"),
        ({"eval_datasets": {"clean": "org/bench"}}, "eval_dataset.clean=org/bench: must be written owner/name:task"),
        ({"eval_datasets": {"clean": "bench:clean"}}, "must be written owner/name:task"),
        ({"eval_datasets": {"clear": "org/bench:clean"}}, "no WER on a set clear; it has one on dev, clean"),
        ({"eval_datasets": {"old": "org/bench:old"}}, "no WER on a set old"),
        ({"eval_datasets": {"silence": "org/bench:s"}}, "no WER on a set silence"),
        ({"eval_datasets": {"dev": "o/b:t", "clean": "o/b:t"}}, "eval_dataset.dev is the same task"),
        (
            {"eval_datasets": {"dev": "o/b:t"}, "config": CONFIG | {"eval": {"max_utterances": 50}}},
            "eval.max_utterances=50, so only a part",
        ),
    ],
)  # fmt: skip
def test_false_claims_are_refused(tmp_path, facts, message):
    for write in (check_card_facts, lambda facts: write_model_card(tmp_path, facts)):
        with pytest.raises(ValueError, match=message):
            write({**FACTS, **facts})
    assert not list(tmp_path.iterdir())


# -- the snippets ------------------------------------------------------------------------------------------------------

RUN_SNIPPETS = """
text = open("README.md", encoding="utf-8").read()
for block in text.split("```python\\n")[1:]:
    exec(compile(block.split("```")[0], "README.md", "exec"), {})
"""


def test_the_snippets_run_in_the_folder(tmp_path, speech):
    from data.manifest import read_manifest

    utterance = read_manifest(speech["eval"])[0]
    model, processor = load_model(SEED), load_processor(SEED)
    folder = save_arkasr(model.state_dict(), model.config, processor, tmp_path / "export", "float32")
    write_model_card(folder, FACTS)
    shutil.copyfile(utterance.audio, folder / "speech.wav")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN_SNIPPETS], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == second
    assert len(set(first.split()) & set(str(utterance.text).split())) >= 1, f"{first!r} of {utterance.text!r}"
