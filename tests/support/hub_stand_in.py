"""A stand-in for the Hub on localhost: repositories in memory, the part of its HTTP API for uploads and downloads, and faults.

huggingface_hub itself is not changed; `connect` only sets the endpoint, the cache and so on, as environment variables would.
Large files use LFS and not Xet, whose server cannot be imitated in a few lines.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hub_api import Fault, Handler, Repository


class HubStandIn:
    """The server and its repositories.

    Attributes:
        collections: the type and the name of each item of a collection, by slug.
        requests: the method and the path of each request.
        faults: the faults of the next GET requests for a file, by file name; each is used once.
        head_faults: the same for HEAD requests.
        ranges: the ranges of bytes that were requested.
        when_slept: called instead of waiting between two attempts.
        released: set it to let the answers that a fault holds back go on.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.collections: dict[str, list[tuple[str, str]]] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: dict[str, list[Fault]] = {}
        self.head_faults: dict[str, list[Fault]] = {}
        self.ranges: list[str] = []
        self.when_slept: Callable[[], object] = lambda: None
        self.released = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, repo_id: str, folder: Path, **options: Any) -> str:
        """Commit all files of a directory."""
        repository = self.repositories.setdefault(repo_id, Repository(**options))
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        return repository.commit(files)

    def asked(self, method: str, name: str) -> int:
        """The number of requests for a file."""
        return sum(known == method and path.endswith(f"/{name}") for known, path in self.requests)

    @contextmanager
    def running(self) -> Iterator[HubStandIn]:
        """Serve in a thread."""
        thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self.server.shutdown()
            self.server.server_close()
            thread.join()


@contextmanager
def connect(hub: HubStandIn, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make huggingface_hub in this process use the stand-in, with an empty cache and without waiting between attempts."""
    from huggingface_hub import constants, file_download, hf_api
    from huggingface_hub.utils import _http
    from transformers.utils import hub as transformers_hub

    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.endpoint)
    monkeypatch.setattr(transformers_hub, "_hf_api", None, raising=False)
    for module in (file_download, _http):
        monkeypatch.setattr(module, "time", _NoSleep(module.time, hub))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    _http.close_session()
    try:
        yield
    finally:
        _http.close_session()


class _NoSleep:
    """The module `time`, whose `sleep` returns at once."""

    def __init__(self, module: Any, hub: HubStandIn) -> None:
        self._module, self._hub = module, hub

    def sleep(self, _seconds: float) -> None:
        self._hub.when_slept()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
