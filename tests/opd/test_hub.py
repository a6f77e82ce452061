"""Pushing exports: huggingface_hub itself, in a process of its own, against a stand-in for the Hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import Commit, File, HubServer, Repository

from opd.card import write_model_card
from opd.export import load_model, load_processor, save_arkasr

ROOT = Path(__file__).resolve().parents[2]
SEED = ROOT / "seeds" / "tiny_student"
FACTS = {
    "stage": "opd",
    "eval": {"clean": {"before": None, "after": {"wer": 0.25, "cer": 0.1}}},
    "eval_datasets": {"clean": "org/bench:clean"},
}
# Runs calls of opd.hub, one JSON line each: what they return, or the sentence of their ValueError.
WORKER = """
import dataclasses, json, os, sys
from opd.hub import check_push, push
for line in sys.stdin:
    name, arguments, token = json.loads(line)
    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        result = {"check_push": check_push, "push": push}[name](**arguments)
        answer = {"result": result and {**dataclasses.asdict(result), "said": str(result)}}
    except ValueError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


class Worker:
    """A process in which opd.hub talks to `hub`."""

    def __init__(self, hub: HubServer, home: Path, **environment: str) -> None:
        variables = {**os.environ, **hub.environment(home), "PYTHONPATH": str(ROOT), **environment}
        command = [sys.executable, "-c", WORKER]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=variables, stdin=pipe, stdout=pipe, text=True)

    def __call__(self, name: str, token: str | None = HubServer.TOKEN, **arguments):
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([name, arguments, token]) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["result"]

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def server():
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def call(server, tmp_path_factory):
    worker = Worker(server, tmp_path_factory.mktemp("home"))
    yield worker
    worker.close()


@pytest.fixture
def hub(server):
    """The server as it was at its start."""
    fresh = HubServer()
    server.account, server.repositories, server.store, server.fails = fresh.account, {}, {}, {}
    server.requests.clear()
    return server


@pytest.fixture
def folder(tmp_path):
    """A folder with the files of an export, not one that a model can be loaded from, and some that are not for others."""
    path = tmp_path / "an export"
    for name, content in {
        "config.json": b"{}",
        "model.safetensors": b"weights",
        "modeling_arkasr.py": b"class A: pass\n",
        "empty.txt": b"",
        ".cache/huggingface/x.json": b"{}",
        ".hidden": b"x",
        "__pycache__/modeling_arkasr.pyc": b"x",
        "model.safetensors.tmp": b"x",
    }.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    write_model_card(path, FACTS)
    return path


PUSHED = [".eval_results/opd-clean.yaml", "README.md", "config.json", "empty.txt", "model.safetensors"]
PUSHED += ["modeling_arkasr.py"]


def test_a_push_is_one_commit(hub, call, folder):
    readme = (folder / "README.md").read_bytes()
    result = call("push", folder=str(folder), repository="lab/digits", private=True)

    repository = hub.repositories["lab/digits"]
    assert repository.private
    first, commit = repository.branches["main"]
    files = {path: file.content for path, file in commit.files.items() if path not in first.files}
    assert sorted(files) == PUSHED
    for name in set(PUSHED) - {"README.md"}:
        assert files[name] == (folder / name).read_bytes(), name
    assert commit.files["model.safetensors"].large
    assert not commit.files["config.json"].large

    assert (folder / "README.md").read_bytes() == readme
    assert readme.count(b'path = "."  # this folder') == 2
    assert files["README.md"] == readme.replace(b'path = "."  # this folder', b'path = "lab/digits"')

    assert result["url"] == f"{hub.url}/lab/digits/commit/{commit.id}"
    assert result["uploaded"] == {name: len(files[name]) for name in PUSHED}
    assert result["removed"] == []
    total = sum(map(len, files.values()))
    assert f"uploaded 6 of its files, {total:,} bytes: .eval_results/opd-clean.yaml, README.md" in result["said"]
    oid = commit.files["model.safetensors"].sha256
    assert hub.written() == [
        ("POST", "/api/repos/create"),
        ("PUT", f"/lfs/{oid}"),
        ("POST", f"/lfs/{oid}"),
        ("POST", "/api/models/lab/digits/commit/main"),
    ]


def test_only_what_changed_is_sent_again(hub, call, folder):
    first = call("push", folder=str(folder), repository="lab/digits")
    assert not hub.repositories["lab/digits"].private
    commits = hub.repositories["lab/digits"].branches["main"]
    for name, content, sent in (
        (None, b"", []),
        ("config.json", b'{"a": 1}', ["commit"]),
        ("model.safetensors", b"new weights", ["lfs", "lfs", "commit"]),
    ):
        if name:
            (folder / name).write_bytes(content)
        hub.requests.clear()
        count = len(commits)
        result = call("push", folder=str(folder), repository="lab/digits")
        assert [path.split("/")[-2] for _, path in hub.written()[1:]] == sent
        assert result["uploaded"] == ({name: len(content)} if name else {})
        assert len(commits) == count + bool(name)
        if not name:
            assert result["url"] == first["url"]
            assert result["said"] == f"{first['url']} has all of it already, nothing was uploaded"
    assert commits[-1].files["model.safetensors"].content == b"new weights"


def test_files_of_an_earlier_export_go_and_others_stay(hub, call, folder):
    earlier = {
        "model-00001-of-00002.safetensors": File(b"1", True),
        "model-00002-of-00002.safetensors": File(b"2", True),
        "model.safetensors.index.json": File(b"{}", False),
        ".eval_results/opd-other.yaml": File(b"- old\n", False),
    }
    others = {
        ".eval_results/mmlu.yaml": File(b"- theirs\n", False),
        "onnx/model.safetensors": File(b"3", True),
        "adapter_model.safetensors": File(b"4", True),
        "notes.md": File(b"mine", False),
    }
    repository = hub.repositories["lab/digits"] = Repository(private=False)
    repository.branches["main"].append(Commit("before", {**earlier, **others}))
    result = call("push", folder=str(folder), repository="lab/digits")
    assert result["removed"] == sorted(earlier)
    assert f"removed: {', '.join(sorted(earlier))}" in result["said"]
    assert sorted(repository.files()) == sorted([*others, *PUSHED])
    assert len(repository.branches["main"]) == 3


def test_a_readme_edited_on_the_hub_stays_in_the_history_only(hub, call, folder):
    call("push", folder=str(folder), repository="lab/digits")
    commits = hub.repositories["lab/digits"].branches["main"]
    edited = {**commits[-1].files, "README.md": File(b"edited by hand", False)}
    commits.append(Commit("edit", edited, commits[-1].id))
    result = call("push", folder=str(folder), repository="lab/digits")
    assert list(result["uploaded"]) == ["README.md"]
    assert commits[-1].files["README.md"] == commits[-3].files["README.md"]
    assert commits[-1].parent == commits[-2].id


def test_a_branch_is_made_where_it_is_missing(hub, call, folder):
    for count in (1, 1):
        call("push", folder=str(folder), repository="lab/digits", revision="v2")
        branches = hub.repositories["lab/digits"].branches
        assert len(branches["main"]) == 1
        assert len(branches["v2"]) == 1 + count
    text = branches["v2"][-1].files["README.md"].content.decode()
    assert text.count('path = "lab/digits"') == 2
    assert text.count('revision="v2", trust_remote_code=True') == text.count("trust_remote_code=True") == 3
    with pytest.raises(ValueError, match=r"answered 400 \(Invalid reference name\).* revision=a\.\.b`"):
        call("push", folder=str(folder), repository="lab/digits", revision="a..b")


def test_a_push_that_failed_can_be_repeated(hub, call, folder):
    hub.fails[("POST", "/api/models/lab/digits/commit")] = (403, "storage limit reached")
    again = rf"`python -m opd.export 'folder={folder}' push=lab/digits private=true`"
    with pytest.raises(ValueError, match=rf"may not write there \(storage limit reached\).*complete.*{again}"):
        call("push", folder=str(folder), repository="lab/digits", private=True)
    hub.fails.clear()
    hub.requests.clear()
    assert len(call("push", folder=str(folder), repository="lab/digits", private=True)["uploaded"]) == len(PUSHED)
    assert not [path for method, path in hub.requests if method == "PUT"]  # the weights had arrived


def test_what_push_refuses_by_itself(hub, call, folder, tmp_path):
    with pytest.raises(ValueError, match="no config.json, so it is no export"):
        call("push", folder=str(tmp_path), repository="lab/digits")
    assert not hub.requests
    write_model_card(folder, {"license": "wrong"})
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md. - .license. must be one of"):
        call("push", folder=str(folder), repository="lab/digits")
    assert len(hub.repositories["lab/digits"].branches["main"]) == 1
    with pytest.raises(ValueError, match="private=true, but this repository exists and is public"):
        call("push", folder=str(folder), repository="lab/digits", private=True)


# -- checks before any work --------------------------------------------------------------------------------------------


def fine_grained(*scopes: tuple[str, str, list[str]]) -> dict:
    scoped = [{"entity": {"type": kind, "name": name}, "permissions": list(granted)} for kind, name, granted in scopes]
    return {"role": "fineGrained", "fineGrained": {"global": ["discussion.write"], "scoped": scoped}}


WRITE, READ = ["repo.content.read", "repo.write"], ["repo.content.read"]


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        ("digits", {}, "push=digits: must be written ORG/NAME"),
        ("lab/digits/v2", {}, "Repo id must be"),
        ("lab/di..gits", {}, r"Cannot have -- or \.\."),
        ("bob/digits", {}, "account, alice, is no member of bob; it may push to alice/NAME, lab/NAME, library/NAME"),
        ("library/digits", {}, "account, alice, may only read in library"),
        ("lab/digits", {"role": "read"}, "the token may not write to lab; make one that may at .*/settings/tokens"),
        ("lab/digits", fine_grained(("user", "alice", WRITE), ("org", "lab", READ)), "may not write to lab"),
        ("lab/digits", fine_grained(), "may not write to lab"),
        ("library/there", {}, r"may not write there \(You don't have the rights"),
    ],
)
def test_pushes_that_must_fail_are_refused_first(hub, call, repository, token, message):
    hub.repositories["library/there"] = Repository(private=False)
    hub.account["auth"]["accessToken"] |= token
    with pytest.raises(ValueError, match=rf"^push={repository}: .*{message.removeprefix(f'push={repository}: ')}"):
        call("check_push", repository=repository)
    assert hub.written() == []


@pytest.mark.parametrize(
    ("repository", "token"),
    [
        ("alice/digits", {}),
        ("Lab/digits", {}),
        ("lab/there", {}),
        ("lab/digits", fine_grained(("org", "lab", WRITE))),
        ("lab/digits", fine_grained(("model", "lab/digits", WRITE))),
    ],
)
def test_pushes_that_may_succeed_pass(hub, call, repository, token):
    hub.repositories["lab/there"] = Repository(private=True)
    hub.account["auth"]["accessToken"] |= token
    call("check_push", repository=repository, private=True)
    assert hub.written() == []


def test_a_public_repository_is_not_taken_for_a_private_one(hub, call):
    hub.repositories["lab/there"] = Repository(private=False)
    call("check_push", repository="lab/there")
    with pytest.raises(ValueError, match="push=lab/there: private=true, but this repository exists and is public"):
        call("check_push", repository="lab/there", private=True)


def test_tokens(hub, call):
    with pytest.raises(ValueError, match="there is no token; set HF_TOKEN, or log in with `hf auth login`"):
        call("check_push", token=None, repository="lab/digits")
    assert hub.requests == []
    hub.repositories["lab/there"] = Repository(private=False)
    for repository in ("lab/digits", "lab/there"):
        with pytest.raises(ValueError, match=f"{hub.url} does not accept the token; set a valid one"):
            call("check_push", token="hf_wrong", repository=repository)


def test_networks(hub, tmp_path):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        cases = {
            "HF_HUB_OFFLINE .* is set; unset it": {"HF_HUB_OFFLINE": "1"},
            "http://127.0.0.1:9 cannot be reached .*refused.*; check the network": {
                "HF_ENDPOINT": "http://127.0.0.1:9"
            },
            f"{silent_url} cannot be reached .*timed out": {"HF_ENDPOINT": silent_url, "HF_HUB_ETAG_TIMEOUT": "1"},
            f"{hub.url}/other answered 404": {"HF_ENDPOINT": f"{hub.url}/other"},
        }
        workers = {message: Worker(hub, tmp_path, **variables) for message, variables in cases.items()}
        for message, worker in workers.items():
            line = json.dumps(["check_push", {"repository": "lab/digits"}, hub.TOKEN])
            answer, _ = worker.process.communicate(f"{line}\n", timeout=120)
            assert re.search(message, json.loads(answer)["error"])


def test_an_endpoint_that_is_no_hub(hub, call):
    hub.account = {"hello": "world"}
    with pytest.raises(ValueError, match=f"{hub.url} does not answer as the Hub does"):
        call("check_push", repository="lab/digits")


# -- and back ----------------------------------------------------------------------------------------------------------

RUN_SNIPPETS = """
from huggingface_hub import hf_hub_download
text = open(hf_hub_download("lab/digits", "README.md", revision="v2"), encoding="utf-8").read()
for block in text.split("```python\\n")[1:]:
    exec(compile(block.split("```")[0], "README.md", "exec"), {})
"""


def test_the_card_on_the_hub_runs_anywhere(hub, call, tmp_path, speech):
    """Its snippets, on a machine that has neither this package nor the folder, give what the folder's model gives."""
    from data.audio import load_audio
    from data.manifest import read_manifest

    utterance = read_manifest(speech["eval"])[1]
    model, processor = load_model(SEED), load_processor(SEED)
    inputs = processor.build_inputs([load_audio(utterance)])
    ids = model.generate(**inputs, max_new_tokens=256, do_sample=False)
    expected = processor.clean_text(ids[0, inputs["input_ids"].shape[1] :])

    folder = save_arkasr(model.state_dict(), model.config, processor, tmp_path / "export", "float32")
    write_model_card(folder, FACTS)
    call("push", folder=str(folder), repository="lab/digits", revision="v2")
    shutil.rmtree(folder)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copyfile(utterance.audio, elsewhere / "speech.wav")
    environment = {**os.environ, **hub.environment(tmp_path / "home", token=None)}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", RUN_SNIPPETS],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [expected, expected]
    assert expected
