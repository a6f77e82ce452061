"""An export to the Hugging Face Hub: what can be refused is refused before any work; then one commit of what changed."""

from __future__ import annotations

import json
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    get_token,
    is_offline_mode,
)
from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id

from opd.card import EVAL_RESULTS_DIR, EVAL_RESULTS_PREFIX, LOCAL_PATH, TRUST_CODE

COMMIT_MESSAGE = "Export of open-asr-opd"
# What an export writes under names that another export may not have. Only these are removed from a repository.
OWN_FILES = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
    rf"|{re.escape(EVAL_RESULTS_DIR)}/{EVAL_RESULTS_PREFIX}.*\.yaml"
)


@dataclass(frozen=True)
class PushResult:
    """url of the commit, or of the newest one where nothing had changed; path -> bytes of what the commit brought."""

    url: str
    uploaded: dict[str, int] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.uploaded and not self.removed:
            return f"{self.url} has all of it already, nothing was uploaded"
        sizes = self.uploaded.values()
        parts = [f"uploaded {len(sizes)} of its files, {sum(sizes):,} bytes: {', '.join(self.uploaded) or 'none'}"]
        if self.removed:
            parts.append(f"removed: {', '.join(self.removed)}")
        return f"{self.url} ({'; '.join(parts)})"


def check_push(repository: str, private: bool | None = None) -> None:
    """Raises ValueError where a push must fail: name, token, network, rights. Writes nothing, here or on the Hub.

    The rights on a repository that exists are asked of the Hub. For a new one, they are what the token's account says
    of itself; limits that it does not tell (a full quota, say) show only at the push.
    """
    where = f"push={repository}"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"{where}: {_one_line(error)}") from error
    if repository.count("/") != 1:
        raise ValueError(
            f"{where}: must be written ORG/NAME, with your user name or an organisation's before the slash"
        )
    if is_offline_mode():
        raise ValueError(f"{where}: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set; unset it to reach the Hub")
    if get_token() is None:
        raise ValueError(f"{where}: there is no token; set HF_TOKEN, or log in with `hf auth login`")
    api = HfApi()
    try:
        # First, because it is the one call with a time limit: a network that swallows packets must not hang here.
        existing = _find(api, repository)
        account = api.whoami()
        if existing is None:
            _check_rights(repository, account, api.endpoint)
        else:
            api.auth_check(repository, write=True)
            _check_visibility(existing, private)
    except Exception as error:  # whatever the HTTP library raises
        raise ValueError(f"{where}: {_reason(error, api.endpoint)}") from error


def check_folder(folder: Path) -> None:
    """Raises ValueError for what is no export."""
    if not folder.is_dir():
        raise ValueError(
            f"folder={folder}: there is no such folder; give the folder of an export, such as run_dir's export/"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"folder={folder}: has no config.json, so it is no export; give the folder of one")


def push(
    folder: str | os.PathLike, repository: str, private: bool | None = None, revision: str | None = None
) -> PushResult:
    """Uploads an export to a Hub repository in one commit, and says what the commit changed.

    private   of a repository that is made here (None: as the organisation has it, public otherwise); true for one that
              exists and is public is refused
    revision  branch, made from main where it is missing; main by default

    Files that are the same there are not sent again, and nothing is committed where all are. Weights and
    .eval_results/opd-*.yaml of an earlier export that this one does not have are removed in the same commit; other files
    of the repository stay. Hidden files and folders (but .eval_results), __pycache__ and *.tmp are left out.
    README.md replaces the one there, also where that was edited on the Hub (it stays in the history): edit the folder's
    README.md and push the folder again to keep changes. In its snippets, the repository's name replaces the local path.

    Raises ValueError with the reason, and how to repeat it, for whatever fails; the folder is left as it is.
    """
    folder, where = Path(folder), f"push={repository}"
    check_folder(folder)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        _check_visibility(api.model_info(repository), private)
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        before = _remote_files(api, repository, revision)
        additions = _additions(folder, repository, revision)
        kept = {operation.path_in_repo for operation in additions}
        removals = [path for path in before if OWN_FILES.fullmatch(path) and path not in kept]
        commit = api.create_commit(
            repository,
            [*additions, *(CommitOperationDelete(path) for path in removals)],
            commit_message=COMMIT_MESSAGE,
            revision=revision,
        )
        after = _remote_files(api, repository, commit.oid)
    except Exception as error:  # whatever the HTTP and transfer libraries raise
        again = [f"folder={folder}", where]
        again += ["private=true"] if private else []
        again += [f"revision={revision}"] if revision else []
        raise ValueError(
            f"{where}: {_reason(error, api.endpoint)}; the folder is complete, push it again with "
            f"`python -m opd.export {shlex.join(again)}`"
        ) from error
    uploaded = {
        path: file.size for path, file in after.items() if path not in before or before[path].blob_id != file.blob_id
    }
    return PushResult(commit.commit_url, uploaded, sorted(before.keys() - after.keys()))


def _find(api: HfApi, repository: str) -> ModelInfo | None:
    try:
        return api.model_info(repository, timeout=HF_HUB_ETAG_TIMEOUT)
    except RepositoryNotFoundError:
        return None


def _check_visibility(existing: ModelInfo, private: bool | None) -> None:
    if private and existing.private is False:
        raise ValueError(
            "private=true, but this repository exists and is public; make it private in its settings, or choose another"
        )


def _check_rights(repository: str, account: dict[str, Any], endpoint: str) -> None:
    """Whether the account and its token may make a repository there, as far as `whoami` tells."""
    namespace = repository.partition("/")[0].lower()
    roles = {org["name"].lower(): org.get("roleInOrg") for org in account.get("orgs") or []}
    if namespace != account["name"].lower() and namespace not in roles:
        raise ValueError(
            f"the token's account, {account['name']}, is no member of {namespace}; it may push to "
            f"{', '.join(f'{name}/NAME' for name in (account['name'], *roles))}"
        )
    if roles.get(namespace) == "read":
        raise ValueError(
            f"the token's account, {account['name']}, may only read in {namespace}; ask for the right to write"
        )
    token = (account.get("auth") or {}).get("accessToken") or {}
    scopes = (token.get("fineGrained") or {}).get("scoped") or []
    may_write = token.get("role") not in ("read", "fineGrained") or any(
        "repo.write" in scope["permissions"]
        and scope["entity"].get("name", "").lower() in (namespace, repository.lower())
        for scope in scopes
    )
    if not may_write:
        raise ValueError(f"the token may not write to {namespace}; make one that may at {endpoint}/settings/tokens")


def _remote_files(api: HfApi, repository: str, revision: str | None) -> dict[str, RepoFile]:
    tree = api.list_repo_tree(repository, recursive=True, revision=revision)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def _additions(folder: Path, repository: str, revision: str | None) -> list[CommitOperationAdd]:
    """The files of the folder, README.md with the repository in place of the local path."""
    additions = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") and part != EVAL_RESULTS_DIR for part in parts)
        if not path.is_file() or hidden or "__pycache__" in parts or path.suffix == ".tmp":
            continue
        content: Path | bytes = path
        if parts == ("README.md",):
            options = f'revision="{revision}", {TRUST_CODE}' if revision else TRUST_CODE
            text = path.read_text(encoding="utf-8").replace(LOCAL_PATH, f'path = "{repository}"')
            content = text.replace(TRUST_CODE, options).encode()
        additions.append(CommitOperationAdd("/".join(parts), content))
    return additions


def _reason(error: Exception, endpoint: str) -> str:
    if isinstance(error, HfHubHTTPError):
        status, said = error.response.status_code, _one_line(error.server_message or "")
        if status == 401:
            return f"{endpoint} does not accept the token; set a valid one as HF_TOKEN, or by `hf auth login --force`"
        if status == 403:
            return f"the token may not write there ({said or 'forbidden'}); use one that may"
        return f"{endpoint} answered {status} ({said or error.response.reason_phrase})"
    if isinstance(error, httpx.TransportError):
        why = _one_line(error) or type(error).__name__
        return f"{endpoint} cannot be reached ({why}); check the network, a proxy, and HF_ENDPOINT"
    if isinstance(error, json.JSONDecodeError | KeyError | TypeError):
        return f"{endpoint} does not answer as the Hub does ({_one_line(error)}); check HF_ENDPOINT"
    return _one_line(error)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
