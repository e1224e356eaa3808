"""The HTTP API of the stand-in for the Hub, and faults of its answers."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from hub_stand_in import HubStandIn

TOKEN = "hf_" + "standin" * 5
USER = "me"
_BINARY = (".safetensors", ".bin", ".png", ".pt")


@dataclass
class Repository:
    """A repository: the files of each commit, and the commit of each branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], message: str = "", branch: str = "main") -> str:
        """Add files to a branch."""
        before = self.commits.get(self.refs.get(branch, ""), {})
        content = {**before, **files}
        state = json.dumps([len(self.commits), message, *sorted(content)])
        sha = hashlib.sha1(state.encode(), usedforsecurity=False).hexdigest()
        self.commits[sha], self.messages[sha], self.refs[branch] = content, message, sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch or of a full hash."""
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision."""
        return self.commits[self.refs.get(revision, revision)]


Fault = Callable[["Handler", bytes, dict[str, str]], None]
"""Answers a request for a file (its content, and the headers that a sound answer has) in another way."""


# --- faults -----------------------------------------------------------------------------------------------------------


def status(code: int) -> Fault:
    """An error of the server."""
    return lambda handler, _body, _headers: handler.answer(code, b"", {})


def cut_off(count: int) -> Fault:
    """Send some bytes, and close the connection."""

    def send(handler: Handler, body: bytes, headers: dict[str, str]) -> None:
        handler.answer(200, body, headers, only=count)
        handler.close_connection = True

    return send


def held_back(handler: Handler, body: bytes, headers: dict[str, str]) -> None:
    """Answer only when the test says so."""
    handler.hub.released.wait()
    handler.close_connection = True


def announced(size: int) -> Fault:
    """Announce another size."""
    return lambda handler, _body, headers: handler.answer(200, b"", {**headers, "Content-Length": str(size)})


def endless(handler: Handler, body: bytes, headers: dict[str, str]) -> None:
    """Send the file again and again, without announcing a size, until the client has had enough."""
    handler.answer(200, b"", {name: value for name, value in headers.items() if name != "Content-Length"}, chunked=True)
    try:
        while not handler.hub.released.is_set():
            handler.wfile.write(f"{len(body):x}\r\n".encode() + body + b"\r\n")
    except OSError:
        pass
    handler.close_connection = True


def longer(handler: Handler, body: bytes, headers: dict[str, str]) -> None:
    """Send twice the bytes, and announce them in this answer."""
    handler.answer(200, body + body, {**headers, "Content-Length": str(2 * len(body))})


def shorter(handler: Handler, body: bytes, headers: dict[str, str]) -> None:
    """Send half of the bytes as if this was the file."""
    half = body[: len(body) // 2]
    handler.answer(200, half, {**headers, "Content-Length": str(len(half))})


# --- the API ----------------------------------------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: Any) -> None:
        """Log nothing."""

    def answer(
        self, code: int, body: bytes, headers: dict[str, str], *, only: int | None = None, chunked: bool = False
    ) -> None:
        """Send a response; `only` sends the first bytes of the body."""
        self.send_response(code)
        length = {"Transfer-Encoding": "chunked"} if chunked else {"Content-Length": str(len(body))}
        for name, value in {**length, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:only])

    def json(self, value: Any, code: int = 200, **headers: str) -> None:
        """Send JSON."""
        self.answer(code, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def missing(self, code: str, status: int = 404) -> None:
        """Send an error with the code that huggingface_hub knows."""
        self.json({"error": code}, status, **{"X-Error-Code": code, "X-Error-Message": code})

    @property
    def has_token(self) -> bool:
        """Whether the request has the token."""
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def read(self) -> bytes:
        """Read the request's body."""
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def route(self) -> None:
        """Find the answer to a request."""
        path, body = unquote(urlsplit(self.path).path), self.read()
        self.hub.requests.append((self.command, path))
        writes = self.command in ("POST", "PUT") and not path.startswith("/lfs/")
        if writes and not self.has_token:
            return self.json({"error": "Unauthorized"}, 401)
        for method, pattern, function in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return function(self, body, *found.groups())
        return self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = route  # noqa: N815

    def repository(self, repo_id: str) -> Repository | None:
        """Return a repository that the request may read, or send an error."""
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.private and not self.has_token):
            self.missing("RepoNotFound", 401)
            return None
        return found

    # --- downloads ----------------------------------------------------------------------------------------------------

    def resolve(self, _body: bytes, repo_id: str, revision: str, name: str) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return None
        sha = repository.resolve(revision)
        if sha is None:
            return self.missing("RevisionNotFound")
        if name not in repository.commits[sha]:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha}
            return self.answer(404, b"", headers)
        content = repository.commits[sha][name]
        etag = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        faults = (self.hub.head_faults if self.command == "HEAD" else self.hub.faults).get(name)
        if faults:
            return faults.pop(0)(self, content, {**headers, "Content-Length": str(len(content))})
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start and self.command == "GET":
            self.hub.ranges.append(start[0])
            first = int(start[1])
            span = {"Content-Range": f"bytes {first}-{len(content) - 1}/{len(content)}"}
            return self.answer(206, content[first:], {**headers, **span})
        return self.answer(200, content, {**headers, "Content-Length": str(len(content))})

    def revision_info(self, _body: bytes, repo_id: str, revision: str = "main") -> None:
        repository = self.repository(repo_id)
        sha = repository.resolve(revision) if repository else None
        if repository is None:
            return None
        if sha is None:
            return self.missing("RevisionNotFound")
        files = [{"rfilename": name} for name in repository.commits[sha]]
        return self.json({"id": repo_id, "sha": sha, "private": repository.private, "tags": [], "siblings": files})

    # --- uploads ------------------------------------------------------------------------------------------------------

    def create(self, body: bytes) -> None:
        given = json.loads(body)
        repo_id = f"{given.get('organization') or USER}/{given['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if repo_id in self.hub.repositories:
            return self.json({**url, "error": "exists"}, 409)
        private = bool(given.get("private")) or given.get("visibility") == "private"
        self.hub.repositories[repo_id] = Repository(private)
        self.hub.repositories[repo_id].commit({".gitattributes": b""}, "initial commit")
        return self.json(url)

    def branch(self, _body: bytes, repo_id: str, branch: str) -> None:
        repository = self.repository(repo_id)
        if repository is not None:
            is_new = branch not in repository.refs
            repository.refs.setdefault(branch, repository.refs["main"])
            self.json({}, 200 if is_new else 409)

    def validate(self, _body: bytes) -> None:
        self.json({"errors": [], "warnings": []})

    def preupload(self, body: bytes, _repo_id: str, _revision: str) -> None:
        files = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["path"].endswith(_BINARY) else "regular",
                "shouldIgnore": False,
            }
            for f in json.loads(body)["files"]
        ]
        self.json({"files": files})

    def batch(self, body: bytes, _repo_id: str) -> None:
        objects = json.loads(body)["objects"]
        for item in objects:
            item["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}
        self.json({"transfer": "basic", "objects": objects})

    def collection(self, _body: bytes, slug: str) -> None:
        if slug not in self.hub.collections:
            return self.missing("RepoNotFound")
        items = [
            {"_id": str(place), "id": name, "type": kind, "position": place}
            for place, (kind, name) in enumerate(self.hub.collections[slug])
        ]
        about = {"title": slug, "owner": slug, "lastUpdated": "2026-01-01T00:00:00.000Z", "theme": "pink"}
        return self.json({**about, "slug": slug, "items": items, "position": 0, "private": False, "upvotes": 0})

    def put(self, body: bytes, oid: str) -> None:
        sound = hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self.answer(200 if sound else 400, b"", {})

    def commit(self, body: bytes, repo_id: str, branch: str) -> None:
        repository = self.repository(repo_id)
        if repository is None:
            return None
        if branch not in repository.refs:
            return self.missing("RevisionNotFound")
        files, message = {}, ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = repository.commit(files, message, branch)
        return self.json({"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha})


_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", Handler.branch),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", Handler.preupload),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", Handler.commit),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", r"/lfs/(.+)", Handler.put),
    ("GET", r"/api/collections/(.+)", Handler.collection),
    ("GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)", Handler.revision_info),
    ("GET", r"/api/models/([^/]+/[^/]+)", Handler.revision_info),
    ("GET HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler.resolve),
]
