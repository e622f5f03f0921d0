"""A staged folder -> one commit on the Hub that `HF_ENDPOINT` names, and what its refusals mean."""

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # HTTPError: of its HTTP library
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from transformers.utils import logging

from ..results import file_digest
from ..training import TntTrainingArguments
from .staging import StagedModel, is_published


logger = logging.get_logger(__name__)

RETRY_WAITS = (1, 2, 4)  # seconds
LONGEST_WAIT = 60
PASSING_ERRORS = (None, 408, 409, 412, 429, 500, 502, 503, 504)  # None: no answer; 412: the branch moved on


@dataclass(frozen=True)
class Destination:
    """
    Where on the Hub a model goes.

    Args:
        repo_id (`str`): `org/name`; created if missing.
        private (`bool`): Whether the repo must be private.
        revision (`str`): Branch to commit to; created if missing.
        create_pr (`bool`): Whether to open a pull request instead of committing.

    Raises:
        ValueError: If the id or the branch is impossible.
    """

    repo_id: str
    private: bool = False
    revision: str = "main"
    create_pr: bool = False

    def __post_init__(self):
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ValueError(f"The repo id must be org/name, got {self.repo_id!r}: {error}") from error
        if self.repo_id.count("/") != 1:
            raise ValueError(f"The repo id must be org/name, got {self.repo_id!r}.")
        if not re.fullmatch(r"[\w.][\w./-]*", self.revision) or re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(f"The revision must be the name of a branch, got {self.revision!r}.")
        if self.create_pr and self.revision != "main":
            raise ValueError(f"--create_pr opens a pull request against main, got --revision {self.revision} too.")


def training_destination(arguments: TntTrainingArguments) -> Destination | None:
    """
    Where a training run is to be published, by `--push_to_hub` and the `--hub_*` flags; None if nowhere.

    Raises:
        ValueError: If the run would not leave what is published, or the destination is impossible.
    """
    if not arguments.push_to_hub:
        return None
    if not (arguments.do_train and arguments.do_eval):
        raise ValueError("--push_to_hub needs --do_train and --do_eval.")
    if arguments.hub_model_id is None:
        raise ValueError("--push_to_hub needs --hub_model_id org/name.")
    return Destination(
        arguments.hub_model_id, private=bool(arguments.hub_private_repo), revision=arguments.hub_revision or "main"
    )


def connect(destination: Destination, token: str | None = None) -> HfApi:
    """
    A client of the Hub that `HF_ENDPOINT` names, once it has answered and the destination is known to be possible.

    Raises:
        ValueError: If nobody is logged in, or the repo that exists does not fit `private` or `create_pr`.
        ConnectionError: If the Hub cannot be reached.
        PermissionError: If it does not accept the token.
    """
    token = token or get_token()
    if token is None:
        raise ValueError("Nobody is logged in: run `hf auth login`, or set HF_TOKEN to a token that may write.")
    api = HfApi(token=token, library_name="tnt-hf")
    _retried(lambda: _existing_repo(api, destination), api, destination)
    return api


def _existing_repo(api: HfApi, destination: Destination) -> Any | None:
    """Facts of the repo on the Hub, None if there is none."""
    try:
        repo = api.repo_info(destination.repo_id)
    except HfHubHTTPError as error:
        if _status(error) == 401:
            api.whoami()  # a missing repo is answered like a bad token; this refuses the latter alone
        elif _status(error) != 404:
            raise
        if destination.create_pr:
            raise ValueError(f"--create_pr needs a repo that exists, and {destination.repo_id} does not.") from error
        return None
    if destination.private and not repo.private:
        raise ValueError(f"A private repo was asked for, but {destination.repo_id} exists and is public.")
    return repo


def upload(api: HfApi, staged: StagedModel, destination: Destination) -> dict[str, Any]:
    """
    Bring a repo to the state of a staged folder in one commit, and tag it.

    Only files that differ are sent, so an interrupted upload is completed by another call, and without a difference
    there is no commit. Files in the repo of another kind than those staged are left alone. What fails in passing (rate
    limits, server errors, lost connections) is tried again.

    Returns:
        `dict`: `repo_id`, `revision` (branch or pull request), `commit` (the hash), `tag` (None if it could not be
        set), `pull_request` (URL or None), `changed` (paths), `deleted` (paths).

    Raises:
        ConnectionError: If the Hub cannot be reached or keeps failing.
        PermissionError: If the token is not accepted or may not write to the repo.
        OSError: If the Hub refuses otherwise.
    """
    return _retried(lambda: _upload_once(api, staged, destination), api, destination)


def _upload_once(api: HfApi, staged: StagedModel, destination: Destination) -> dict[str, Any]:
    repo_id = destination.repo_id
    if _existing_repo(api, destination) is None:
        api.create_repo(repo_id, private=destination.private or None, exist_ok=True)  # None: the default of the owner
    title = f"Publish {staged.tag} with tnt-hf"
    revision, pull_request = destination.revision, None
    if destination.create_pr:
        pull_request = _open_pull_request(api, repo_id, title)
        revision = pull_request.git_reference if pull_request else "main"
    head = _branch_head(api, repo_id, revision)
    remote = _remote_files(api, repo_id, head)
    changed = {name: path for name, path in staged.files.items() if not _is_equal(path, remote.get(name))}
    deleted = [name for name in remote if is_published(name) and name not in staged.files]
    pull_request_url = pull_request.url if pull_request else None
    if changed or deleted:
        opens_pull_request = destination.create_pr and pull_request is None
        additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in changed.items()]
        try:
            api.preupload_lfs_files(repo_id, additions, revision=revision, create_pr=opens_pull_request)
        except (HTTPError, RuntimeError) as error:
            cause = error.__cause__ if isinstance(error, RuntimeError) else error
            if not isinstance(cause, HTTPError):
                raise
            raise _explained(cause, api, destination) from error  # huggingface_hub has tried again often enough
        commit = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(path_in_repo=name) for name in deleted)],
            commit_message=title,
            revision=revision,
            create_pr=opens_pull_request,
            parent_commit=head,  # what was committed by a call whose answer was lost is not committed again
        )
        head, pull_request_url = commit.oid, commit.pr_url or pull_request_url
        if pull_request_url and pull_request is None:
            revision = commit.pr_revision
        sizes = {name: entry.size for name, entry in _remote_files(api, repo_id, head).items()}
        missing = [name for name, path in staged.files.items() if sizes.get(name) != path.stat().st_size]
        if missing:
            raise OSError(f"{repo_id} lacks {', '.join(missing)} after the commit: push again.")
    return {
        "repo_id": repo_id,
        "revision": revision,
        "commit": head,
        "tag": staged.tag if _tag(api, repo_id, staged.tag, head, destination) else None,
        "pull_request": pull_request_url,
        "changed": sorted(changed),
        "deleted": sorted(deleted),
    }


def _branch_head(api: HfApi, repo_id: str, revision: str) -> str:
    """The commit that a branch points to; a missing branch is made from main."""
    try:
        return api.repo_info(repo_id, revision=revision).sha
    except HfHubHTTPError as error:
        if _status(error) != 404:
            raise
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.repo_info(repo_id, revision=revision).sha


def _open_pull_request(api: HfApi, repo_id: str, title: str) -> Any | None:
    """The open pull request of an earlier call, if the Hub has discussions at all."""
    try:
        discussions = list(api.get_repo_discussions(repo_id, discussion_type="pull_request", discussion_status="open"))
    except HfHubHTTPError as error:
        if _status(error) != 404:
            raise
        return None
    return next((discussion for discussion in discussions if discussion.title == title), None)


def _remote_files(api: HfApi, repo_id: str, commit: str) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo_id, revision=commit, recursive=True)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _is_equal(path: Path, remote: RepoFile | None) -> bool:
    if remote is None:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == file_digest(path)
    content = path.read_bytes()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tag(api: HfApi, repo_id: str, tag: str, commit: str, destination: Destination) -> bool:
    """Tag a commit unless the tag is there; whether it is. Who may only open pull requests cannot tag."""
    try:
        api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)
    except HfHubHTTPError as error:
        if destination.create_pr and _status(error) == 403:
            return False
        raise
    return True


def _retried(call: Callable[[], Any], api: HfApi, destination: Destination) -> Any:
    """
    Call, and call again after errors that may pass. huggingface_hub does so for file contents, not for making repos
    and commits.
    """
    for wait in (*RETRY_WAITS, None):
        try:
            return call()
        except (HTTPError, json.JSONDecodeError) as error:  # huggingface_hub may parse the page of a failed request
            if wait is None or _status(error) not in PASSING_ERRORS:
                raise _explained(error, api, destination) from error
            asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
            wait = min(int(asked), LONGEST_WAIT) if asked.isdigit() else wait
            logger.warning(f"{api.endpoint}: {_reason(error)} Trying again in {wait} s.")
            time.sleep(wait)


def _status(error: HTTPError | json.JSONDecodeError) -> int | None:
    """Status code of an HTTP error, None if there was no answer."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _explained(error: HTTPError | json.JSONDecodeError, api: HfApi, destination: Destination) -> OSError:
    status, repo_id = _status(error), destination.repo_id
    again = "Push again with `tnt-hf publish`: what was sent is not sent twice."
    if status is None:
        return ConnectionError(
            f"{api.endpoint} cannot be reached, or is no Hub: {_reason(error)} Check the network and HF_ENDPOINT. "
            f"{again}"
        )
    if status == 401:
        return PermissionError(
            f"{api.endpoint} does not accept the token: run `hf auth login`, or set HF_TOKEN to one that may write."
        )
    if status == 403:
        return PermissionError(
            f"The token may not write to {repo_id}: it needs the write role, and its owner a place in "
            f"{repo_id.split('/')[0]}, or --create_pr and a repo that takes pull requests."
        )
    if status == 404:
        return FileNotFoundError(
            f"{repo_id}, its revision {destination.revision} or what else was asked for is not on {api.endpoint}: "
            f"{_reason(error)}"
        )
    if status == 429:
        return ConnectionError(f"{api.endpoint} limits the rate of requests. Wait some minutes. {again}")
    if status >= 500:
        return ConnectionError(f"{api.endpoint} keeps failing with status {status}. {again}")
    return OSError(f"{api.endpoint} refused: {_reason(error)}")


def _reason(error: Exception) -> str:
    """What went wrong, in one line: for an answer of the Hub its status, what the Hub says and where."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, HfHubHTTPError):
        response = error.response
        lines = [f"{response.status_code} {error.server_message or response.reason_phrase} ({response.url})"]
    return lines[0].rstrip(".") + "."


def describe_staged(staged: StagedModel, destination: Destination) -> str:
    """What would be published where: every file with its size in bytes."""
    lines = [f"{path.stat().st_size:>12,}  {name}" for name, path in staged.files.items()]
    total = sum(path.stat().st_size for path in staged.files.values())
    where = "a pull request to main" if destination.create_pr else f"branch {destination.revision}"
    visibility = "private " if destination.private else ""
    return "\n".join(
        [
            f"Verified for {visibility}{destination.repo_id}, {where}, as one commit with the tag {staged.tag}:",
            *lines,
            f"{total:>12,}  bytes in {len(lines)} files",
        ]
    )


def describe_upload(published: dict[str, Any]) -> str:
    """What was published, and the line that loads it pinned."""
    changed, deleted = len(published["changed"]), len(published["deleted"])
    what = f"{changed} files sent, {deleted} deleted" if changed or deleted else "up to date"
    lines = [f"{published['repo_id']}, {published['revision']}: {what}; commit {published['commit']}"]
    if published["pull_request"]:
        lines.append(f"pull request: {published['pull_request']}")
    if published["tag"] is None:
        lines.append("The card pins a tag that you may not set: the owner of the repo sets it after merging.")
    lines.append(
        f'AutoModelForImageClassification.from_pretrained("{published["repo_id"]}", '
        f'revision="{published["commit"]}", trust_remote_code=True)'
    )
    return "\n".join(lines)


__all__ = ["Destination", "connect", "describe_staged", "describe_upload", "training_destination", "upload"]
