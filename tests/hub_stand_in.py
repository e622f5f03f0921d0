"""
A Hub in memory, on loopback: what `huggingface_hub` asks of one to publish and load models, and ways to make it fail.

Own code on the standard library. Paths, fields and status codes are those that huggingface_hub 1.33 and 2.4 send and
expect; Xet, data sets and Spaces are left out, so clients in other processes need HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


LFS_NAMES = re.compile(r"\.(safetensors|png|bin|pt)$")
REPO = r"([^/]+/[^/]+)"


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """Branches and tags point to commits, and a commit maps paths to the SHA-256 of their contents."""

    private: bool = False
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    history: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: list[str] = field(default_factory=list)

    def commit(self, parent: str, files: dict[str, str]) -> str:
        oid = hashlib.sha1(f"{parent} {len(self.history)} {sorted(files.items())}".encode()).hexdigest()
        self.commits[oid] = files
        self.history.append(oid)
        return oid


@dataclass
class Fault:
    """
    What goes wrong with the next `times` requests that match: a status code, or a connection that is closed before the
    answer, with the request carried out ("lost answer"), or not ("dropped"; of a body, only half is read). "none" lets
    them pass. Of several faults the first that has times left applies.
    """

    pattern: str
    kind: int | str
    times: int = 1
    retry_after: int | None = None


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubStandIn:
    """
    Args:
        tokens (`dict[str, str]`): For each token that is accepted, the user or organisation it may write to.
    """

    def __init__(self, tokens: dict[str, str] | None = None):
        self.tokens = {"secret": "org"} if tokens is None else tokens
        self.repos: dict[str, Repo] = {}
        self.contents: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # an answer is two writes

            def log_message(self, *arguments: Any) -> None:
                pass

            def answer(self) -> None:
                hub._answer(self)

            do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = answer

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents by path at a branch, tag or commit."""
        return {path: self.contents[digest] for path, digest in self._tree(repo_id, revision)[1].items()}

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        path, method = unquote(url.path), handler.command
        length = int(handler.headers.get("Content-Length") or 0)
        with self.lock:
            self.requests.append((method, path))
            line = f"{method} {path}"
            fault = next((fault for fault in self.faults if fault.times and re.search(fault.pattern, line)), None)
            if fault is not None:
                fault.times -= 1
        if fault is not None and fault.kind == "dropped":
            handler.rfile.read(length // 2)
            self._hang_up(handler)
            return
        body = self._body(handler, length)
        headers: dict[str, str] = {}
        with self.lock:
            try:
                if fault is not None and isinstance(fault.kind, int):
                    if fault.retry_after is not None:
                        headers["Retry-After"] = str(fault.retry_after)
                    raise Refusal(fault.kind, "made to fail")
                status, content, extra = self._route(handler, method, path, parse_qs(url.query), body)
                headers |= extra
            except Refusal as refusal:
                status, content = refusal.status, {"error": refusal.message}
                if refusal.code is not None:
                    headers["X-Error-Code"] = refusal.code
        if fault is not None and fault.kind == "lost answer":
            self._hang_up(handler)
            return
        payload = content if isinstance(content, bytes) else json.dumps(content).encode()
        if fault is not None and fault.kind == 500:
            payload = b"<html>Internal error</html>"
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(payload)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        if method != "HEAD":
            handler.wfile.write(payload)

    @staticmethod
    def _body(handler: BaseHTTPRequestHandler, length: int) -> bytes:
        if "chunked" not in handler.headers.get("Transfer-Encoding", ""):
            return handler.rfile.read(length)
        body = b""
        while size := int(handler.rfile.readline().strip() or b"0", 16):
            body += handler.rfile.read(size)
            handler.rfile.readline()
        handler.rfile.readline()
        return body

    @staticmethod
    def _hang_up(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)

    def _owner(self, handler: BaseHTTPRequestHandler) -> str | None:
        """Whom the token of a request writes as; None without a token."""
        token = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            raise Refusal(401, "Invalid username or password.")
        return self.tokens.get(token)

    def _repo(self, handler: BaseHTTPRequestHandler, repo_id: str, write: bool = False) -> Repo:
        owner, repo = self._owner(handler), self.repos.get(repo_id)
        if repo is None or (repo.private and owner != repo_id.split("/")[0]):
            raise Refusal(401 if owner is None else 404, "Repository not found", "RepoNotFound")
        if write and owner != repo_id.split("/")[0]:
            raise Refusal(401 if owner is None else 403, "You have no right to write here.")
        return repo

    def _tree(self, repo_id: str, revision: str) -> tuple[str, dict[str, str]]:
        repo = self.repos[repo_id]
        commit = repo.branches.get(revision) or repo.tags.get(revision) or revision
        if commit not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repo.commits[commit]

    def _entry(self, path: str, digest: str) -> dict[str, Any]:
        content = self.contents[digest]
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if LFS_NAMES.search(path):
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        return entry

    def _store(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        self.contents[digest] = content
        return digest

    def _route(
        self, handler: BaseHTTPRequestHandler, method: str, path: str, query: dict[str, list[str]], body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        sent = json.loads(body) if handler.headers.get("Content-Type", "").endswith(("/json", "+json")) else {}
        if path == "/api/whoami-v2":
            owner = self._owner(handler)
            if owner is None:
                raise Refusal(401, "Invalid username or password.")
            return 200, {"type": "user", "name": owner, "orgs": []}, {}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}, {}
        if path == "/api/repos/create":
            return self._create(handler, sent)
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            if self._store(body) != match[1]:
                raise Refusal(400, "The content is not that of the digest.")
            return 200, {}, {}
        if match := re.fullmatch(f"/{REPO}.git/info/lfs/objects/batch", path):
            self._repo(handler, match[1])
            return 200, {"transfer": "basic", "objects": [self._lfs_object(entry) for entry in sent["objects"]]}, {}
        if match := re.fullmatch(f"/api/models/{REPO}/preupload/(.+)", path):
            self._repo(handler, match[1])
            return 200, {"files": [self._upload_mode(match[1], match[2], entry) for entry in sent["files"]]}, {}
        if match := re.fullmatch(f"/api/models/{REPO}/commit/(.+)", path):
            return self._commit(handler, match[1], match[2], "create_pr" in query, body)
        if match := re.fullmatch(f"/api/models/{REPO}/(tag|branch)/(.+)", path):
            return self._refer(handler, match[1], match[2], match[3], sent)
        if match := re.fullmatch(f"/api/models/{REPO}/refs", path):
            return 200, self._refs(self._repo(handler, match[1])), {}
        if match := re.fullmatch(f"/api/models/{REPO}/discussions", path):
            return 200, self._discussions(match[1], self._repo(handler, match[1])), {}
        if match := re.fullmatch(f"/api/models/{REPO}/tree/([^/]+|refs/pr/\\d+)(?:/(.+))?", path):
            self._repo(handler, match[1])
            folder = f"{match[3]}/" if match[3] else ""
            files = self._tree(match[1], match[2])[1].items()
            return 200, [self._entry(name, digest) for name, digest in files if name.startswith(folder)], {}
        if match := re.fullmatch(f"/api/models/{REPO}(?:/revision/(.+))?", path):
            return 200, self._info(match[1], self._repo(handler, match[1]), match[2] or "main"), {}
        if match := re.fullmatch(f"/{REPO}/resolve/([^/]+|refs/pr/\\d+)/(.+)", path):
            self._repo(handler, match[1])
            return self._resolve(match[1], match[2], match[3])
        raise Refusal(404, f"There is no {method} {path}.")

    def _create(self, handler: BaseHTTPRequestHandler, sent: dict[str, Any]) -> tuple[int, Any, dict[str, str]]:
        owner = self._owner(handler)
        repo_id = f"{sent.get('organization') or owner}/{sent['name']}"
        if owner is None:
            raise Refusal(401, "Invalid username or password.")
        if owner != repo_id.split("/")[0]:
            raise Refusal(403, f"You have no right to create {repo_id}.")
        if repo_id in self.repos:
            raise Refusal(409, "You already created this model repo")
        repo = self.repos[repo_id] = Repo(private=sent.get("visibility") == "private")
        repo.branches["main"] = repo.commit("", {})
        return 200, {"url": f"{self.url}/{repo_id}", "name": repo_id, "id": repo_id}, {}

    def _lfs_object(self, entry: dict[str, Any]) -> dict[str, Any]:
        upload = {"actions": {"upload": {"href": f"{self.url}/lfs/{entry['oid']}"}}}
        return {"oid": entry["oid"], "size": entry["size"], **({} if entry["oid"] in self.contents else upload)}

    def _upload_mode(self, repo_id: str, revision: str, entry: dict[str, Any]) -> dict[str, Any]:
        is_lfs = bool(LFS_NAMES.search(entry["path"]))
        digest = self._tree(repo_id, revision)[1].get(entry["path"])
        oid = None if digest is None else digest if is_lfs else git_oid(self.contents[digest])
        return {"path": entry["path"], "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, "oid": oid}

    def _commit(
        self, handler: BaseHTTPRequestHandler, repo_id: str, revision: str, create_pr: bool, body: bytes
    ) -> tuple[int, Any, dict[str, str]]:
        repo = self._repo(handler, repo_id, write=not create_pr)
        parent, files = self._tree(repo_id, revision)
        files, title = dict(files), ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise Refusal(412, "A commit has happened since.")
            elif line["key"] == "file":
                files[value["path"]] = self._store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.contents:
                    raise Refusal(400, f"{value['path']} was not uploaded.")
                files[value["path"]] = value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(parent, files)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo_id}/commit/{oid}"}
        if create_pr:
            repo.pull_requests.append(title)
            revision = f"refs/pr/{len(repo.pull_requests)}"
            answer["pullRequestUrl"] = f"{self.url}/{repo_id}/discussions/{len(repo.pull_requests)}"
        repo.branches[revision] = oid
        return 200, answer, {}

    def _refer(
        self, handler: BaseHTTPRequestHandler, repo_id: str, kind: str, name: str, sent: dict[str, Any]
    ) -> tuple[int, Any, dict[str, str]]:
        repo = self._repo(handler, repo_id, write=True)
        refs, name, start = (
            (repo.tags, sent["tag"], name)
            if kind == "tag"
            else (repo.branches, name, sent.get("startingPoint") or "main")
        )
        if name in refs:
            raise Refusal(409, f"{name} already exists")
        refs[name] = self._tree(repo_id, start)[0]
        return 200, {}, {}

    def _refs(self, repo: Repo) -> dict[str, Any]:
        def listed(refs: dict[str, str], kind: str) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": oid} for name, oid in refs.items()]

        return {"branches": listed(repo.branches, "heads"), "tags": listed(repo.tags, "tags"), "converts": []}

    def _discussions(self, repo_id: str, repo: Repo) -> dict[str, Any]:
        discussions = [
            {
                "title": title,
                "num": number,
                "author": {"name": "org"},
                "createdAt": "2026-01-01T00:00:00.000Z",
                "status": "open",
                "repo": {"name": repo_id, "type": "model"},
                "isPullRequest": True,
            }
            for number, title in enumerate(repo.pull_requests, start=1)
        ]
        return {"discussions": discussions, "count": len(discussions), "start": 0}

    def _info(self, repo_id: str, repo: Repo, revision: str) -> dict[str, Any]:
        commit, files = self._tree(repo_id, revision)
        return {
            "_id": "0",
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": name} for name in files],
        }

    def _resolve(self, repo_id: str, revision: str, name: str) -> tuple[int, Any, dict[str, str]]:
        commit, files = self._tree(repo_id, revision)
        if name not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        content = self.contents[files[name]]
        etag = files[name] if LFS_NAMES.search(name) else git_oid(content)
        return 200, content, {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "X-Linked-Size": str(len(content))}
