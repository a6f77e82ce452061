"""A stand-in for the Hub on this machine: the endpoints that huggingface_hub calls to upload and to download.

Repositories, branches, commits and large files are kept in memory; every request is listed. Large files go by the basic
Git LFS transfer: the client needs HF_HUB_DISABLE_XET=1, for a Xet store is not part of this.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import uvicorn
import yaml
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

LARGE_FILES = (".safetensors", ".bin")


@dataclass(frozen=True)
class File:
    """A file of a commit. `large`: kept in the LFS store; the repository itself has a pointer to it."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """As git has it: of the content, or of the pointer to a large file."""
        content = self.content
        if self.large:
            content = (
                f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(content)}\n".encode()
            )
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def oid(self) -> str:
        """What the Hub compares uploads with."""
        return self.sha256 if self.large else self.blob_id


@dataclass(frozen=True)
class Commit:
    title: str
    files: dict[str, File]
    parent: str | None = None

    @property
    def id(self) -> str:
        names = sorted((path, file.blob_id) for path, file in self.files.items())
        return hashlib.sha1(repr((self.title, self.parent, names)).encode()).hexdigest()


@dataclass
class Repository:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.branches["main"] = [Commit("initial commit", {".gitattributes": File(b"*.safetensors lfs\n", False)})]

    def commit(self, revision: str) -> Commit:
        if revision in self.branches:
            return self.branches[revision][-1]
        known = {commit.id: commit for commits in self.branches.values() for commit in commits}
        if revision not in known:
            raise HubError(404, "Invalid rev id", "RevisionNotFound")
        return known[revision]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.commit(revision).files.items()}


@dataclass(frozen=True)
class Call:
    """A request to a repository; `rest` is what follows the kind of request in the path."""

    name: str
    repository: Repository
    rest: list[str]
    body: bytes
    query: dict[str, str]


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


class HubServer:
    """`with HubServer() as hub:` serves at `hub.url`; one token, `hub.TOKEN`, of `hub.account`.

    account   the answer to whoami; may be changed at any time
    fails     {(method, start of a path): (status, message)}: requests that are refused
    requests  (method, path) of all requests so far
    """

    TOKEN = "hf_token"

    def __init__(self) -> None:
        self.account: dict[str, Any] = {
            "type": "user",
            "name": "alice",
            "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "library", "roleInOrg": "read"}],
            "auth": {"type": "access_token", "accessToken": {"displayName": "t", "role": "write"}},
        }
        self.repositories: dict[str, Repository] = {}
        self.store: dict[str, bytes] = {}
        self.fails: dict[tuple[str, str], tuple[int, str]] = {}
        self.requests: list[tuple[str, str]] = []
        # Requests are answered one at a time: what they change is shared.
        self._server = uvicorn.Server(uvicorn.Config(self._app(), host="127.0.0.1", port=0, log_level="warning"))
        self._thread = threading.Thread(target=self._server.run, daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        host, port = self._server.servers[0].sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}"
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def environment(self, home: Any, token: str | None = TOKEN) -> dict[str, str]:
        """Variables with which huggingface_hub talks to this server and to nothing else."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "HF_TOKEN": token or "",
            "HUGGING_FACE_HUB_TOKEN": "",
        }

    def written(self) -> list[tuple[str, str]]:
        """The requests that change something here."""
        reading = ("/api/validate-yaml", "/preupload/", "/objects/batch")
        return [
            (m, path) for m, path in self.requests if m not in ("GET", "HEAD") and not any(r in path for r in reading)
        ]

    # -- requests ----------------------------------------------------------------------------------------------------

    def _app(self) -> FastAPI:
        app = FastAPI(openapi_url=None)

        @app.api_route("/{path:path}", methods=["GET", "HEAD", "POST", "PUT", "DELETE"])
        async def answer(request: Request) -> Response:
            path, method = request.url.path, request.method
            self.requests.append((method, path))
            try:
                for (refused_method, start), (status, message) in self.fails.items():
                    if method == refused_method and path.startswith(start):
                        raise HubError(status, message)
                authorization = request.headers.get("authorization")
                return self._answer(method, path, request.query_params, await request.body(), authorization)
            except HubError as error:
                headers = {"X-Error-Code": error.code, "X-Error-Message": str(error)}
                return JSONResponse({"error": str(error)}, error.status, headers)

        return app

    def _answer(
        self, method: str, path: str, query: Mapping[str, str], body: bytes, authorization: str | None
    ) -> Response:
        parts = path.strip("/").split("/")
        if authorization is not None and authorization != f"Bearer {self.TOKEN}":
            raise HubError(401, "Invalid credentials in Authorization header")
        is_known = authorization is not None
        if parts[0] == "lfs":
            return self._large_file(method, parts[1], body)
        if path == "/api/whoami-v2":
            return JSONResponse(self.account) if is_known else _refuse(401, "Invalid username or password.")
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body))
        if path == "/api/repos/create":
            return self._create(json.loads(body), is_known)
        if parts[:2] == ["api", "models"]:
            name, rest = "/".join(parts[2:4]), parts[4:]
        else:
            name, rest = "/".join(parts[:2]).removesuffix(".git"), parts[2:]
        repository = self.repositories.get(name)
        if repository is None or (repository.private and not is_known):
            raise HubError(404, "Repository not found", "RepoNotFound")
        if method not in ("GET", "HEAD") or rest[:1] == ["auth-check"]:
            self._check_rights(name, is_known)
        handler = getattr(self, f"_{method.lower()}_{(rest[0] if rest else 'repository').replace('-', '_')}", None)
        if handler is None:
            raise HubError(404, f"this stand-in has no {method} {path}")
        return handler(Call(name, repository, rest[1:], body, dict(query)))

    def _check_rights(self, name: str, is_known: bool) -> None:
        namespace = name.partition("/")[0]
        writable = {org["name"] for org in self.account["orgs"] if org["roleInOrg"] != "read"} | {self.account["name"]}
        if not is_known or namespace not in writable or self.account["auth"]["accessToken"]["role"] == "read":
            raise HubError(403, f"You don't have the rights to write under the namespace {namespace!r}")

    def _create(self, wanted: dict[str, Any], is_known: bool) -> Response:
        name = f"{wanted['organization'] or self.account['name']}/{wanted['name']}"
        self._check_rights(name, is_known)
        url = {"url": f"{self.url}/{name}"}
        if name in self.repositories:
            return JSONResponse(url, 409)
        self.repositories[name] = Repository(private=wanted.get("visibility") == "private")
        return JSONResponse(url)

    def _validate(self, wanted: dict[str, Any]) -> Response:
        metadata = yaml.safe_load(wanted["content"].split("---")[1])
        if metadata.get("license") == "wrong":
            return JSONResponse({"errors": [{"message": '"license" must be one of [apache-2.0, mit, ...]'}]}, 400)
        return JSONResponse({"errors": [], "warnings": []})

    # -- a repository: reading --------------------------------------------------------------------------------------------

    def _get_repository(self, call: Call) -> Response:
        return self._get_revision(replace(call, rest=["main"]))

    def _get_revision(self, call: Call) -> Response:
        commit = call.repository.commit(call.rest[0])
        siblings = [{"rfilename": path} for path in commit.files]
        return JSONResponse(
            {"id": call.name, "sha": commit.id, "private": call.repository.private, "siblings": siblings}
        )

    def _get_auth_check(self, call: Call) -> Response:
        return JSONResponse({})

    def _get_tree(self, call: Call) -> Response:
        start = "".join(f"{part}/" for part in call.rest[1:])
        files = {path: f for path, f in call.repository.commit(call.rest[0]).files.items() if path.startswith(start)}
        if call.query.get("recursive", "").lower() != "true":
            files = {path: f for path, f in files.items() if "/" not in path.removeprefix(start)}
        if start and not files:
            raise HubError(404, f"{start} does not exist", "EntryNotFound")
        entries = []
        for path, file in files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
            if file.large:
                entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 130}
            entries.append(entry)
        return JSONResponse(entries)

    def _get_resolve(self, call: Call) -> Response:
        commit = call.repository.commit(call.rest[0])
        file = commit.files.get("/".join(call.rest[1:]))
        if file is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        headers = {"X-Repo-Commit": commit.id, "ETag": f'"{file.oid}"'}
        return Response(file.content, headers=headers, media_type="application/octet-stream")

    _head_resolve = _get_resolve

    # -- a repository: writing --------------------------------------------------------------------------------------------

    def _post_branch(self, call: Call) -> Response:
        if call.rest[0] in call.repository.branches:
            return _refuse(409, "Reference already exists")
        if ".." in call.rest[0]:
            return _refuse(400, "Invalid reference name")
        call.repository.branches[call.rest[0]] = list(call.repository.branches["main"])
        return JSONResponse({})

    def _post_preupload(self, call: Call) -> Response:
        there = call.repository.commit(call.rest[0]).files
        answers = []
        for file in json.loads(call.body)["files"]:
            path = file["path"]
            large = path.endswith(LARGE_FILES) or file["size"] > 10_000_000
            oid = {"oid": there[path].oid} if path in there else {}
            answers.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, **oid})
        return JSONResponse({"files": answers})

    def _post_info(self, call: Call) -> Response:
        """The LFS batch endpoint: where to put each object; no actions for those that are in the store."""
        objects = []
        for wanted in json.loads(call.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.url}/lfs/{wanted['oid']}"},
                "verify": {"href": f"{self.url}/lfs/{wanted['oid']}"},
            }
            objects.append({**wanted, **({} if wanted["oid"] in self.store else {"actions": actions})})
        return JSONResponse({"transfer": "basic", "objects": objects})

    def _large_file(self, method: str, oid: str, body: bytes) -> Response:
        if method == "PUT":
            if hashlib.sha256(body).hexdigest() != oid:
                raise HubError(400, "the content is not that of its oid")
            self.store[oid] = body
        elif oid not in self.store or json.loads(body)["size"] != len(self.store[oid]):
            raise HubError(404, "this object was not uploaded")
        return JSONResponse({})

    def _post_commit(self, call: Call) -> Response:
        lines = [json.loads(line) for line in call.body.splitlines()]
        commits = call.repository.branches[call.rest[0]]
        files = dict(commits[-1].files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.store:
                    raise HubError(400, f"{value['path']} was not uploaded")
                files[value["path"]] = File(self.store[value["oid"]], large=True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise HubError(400, f"this stand-in knows no {line['key']}")
        commits.append(Commit(lines[0]["value"]["summary"], files, commits[-1].id))
        url = f"{self.url}/{call.name}/commit/{commits[-1].id}"
        return JSONResponse({"commitUrl": url, "commitOid": commits[-1].id, "success": True})


def _refuse(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status, {"X-Error-Message": message})
