"""A stand-in for llama.cpp's server that computes with a model of transformers.

It has the routes that softhooks uses, and answers as the server does. `make test-llama-cpp` runs the same steps with the server.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from slot_files import slot_file
from torch import Tensor
from transformers.cache_utils import DynamicCache

from softhooks.serving.slot_file import read_slot_file


class RefusedError(Exception):
    """An answer with status 400."""


@dataclass
class Slot:
    """Tokens, and their keys and values as llama.cpp keeps them, [P, width] for each layer."""

    tokens: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


class LlamaStandIn:
    """Two slots of a Llama. `folder` is the directory that slots are saved to."""

    def __init__(self, model: Any, folder: Path, tokenizer: Any = None, **layout: Any) -> None:
        self.model, self.folder, self.tokenizer, self.layout = model.eval(), folder, tokenizer, layout
        self.slots = [Slot(), Slot()]
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.keys_of_requests: list[str | None] = []
        self.url = ""

    @contextmanager
    def running(self) -> Iterator[LlamaStandIn]:
        """Listen in a thread."""
        web = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{web.server_address[1]}"
        thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            web.shutdown()
            web.server_close()
            thread.join()

    def answer(self, route: str, body: dict[str, Any]) -> Any:
        """Answer a request."""
        self.seen.append((route, body))
        path, query = urlsplit(route).path, parse_qs(urlsplit(route).query)
        if path == "/tokenize":
            return {"tokens": self.tokenizer(body["content"])["input_ids"]}
        if path == "/completion":
            return self.complete(**body)
        slot = int(path.removeprefix("/slots/"))
        [action] = query["action"]
        if action == "erase":
            self.slots[slot] = Slot()
            return {"id_slot": slot}
        return {"save": self.save, "restore": self.restore}[action](slot, body["filename"])

    def save(self, slot: int, filename: str) -> dict[str, Any]:
        """Save a slot."""
        held = self.slots[slot]
        (self.folder / filename).write_bytes(slot_file(held.tokens, held.keys, held.values, **self.layout))
        return {"id_slot": slot, "filename": filename, "n_saved": len(held.tokens)}

    def restore(self, slot: int, filename: str) -> dict[str, Any]:
        """Restore a slot."""
        if not (self.folder / filename).exists():
            raise RefusedError("Unable to restore slot: No available space in KV cache or invalid slot save file")
        found = read_slot_file(self.folder / filename)
        parts = [[found.read(block) for block in blocks] for blocks in (found.keys, found.values)]
        self.slots[slot] = Slot(list(found.tokens), *parts)
        return {"id_slot": slot, "filename": filename, "n_restored": len(found.tokens)}

    @torch.no_grad()
    def complete(
        self, prompt: list[int], id_slot: int, cache_prompt: bool, n_predict: int, **others: Any
    ) -> dict[str, Any]:
        """Continue greedily; keep the keys and values of all tokens that were run."""
        if not all(0 <= token < self.model.config.vocab_size for token in prompt):
            raise RefusedError("Prompt contains invalid tokens")
        held = self.slots[id_slot] if cache_prompt else Slot()
        reused = 0
        while reused < min(len(held.tokens), len(prompt) - 1) and held.tokens[reused] == prompt[reused]:
            reused += 1
        cache = DynamicCache()
        for layer, (key, value) in enumerate(zip(held.keys, held.values, strict=True)):
            if reused:
                cache.update(self._heads(_halves(key, self._size)[:reused]), self._heads(value[:reused]), layer)
        row, new = prompt[reused:], []
        while len(new) < n_predict:
            logits = self.model(torch.tensor([row]), past_key_values=cache, use_cache=True).logits
            new.append(int(logits[0, -1].argmax()))
            row = new[-1:]
        keys = [_pairs(self._rows(layer.keys), self._size) for layer in cache.layers]
        values = [self._rows(layer.values) for layer in cache.layers]
        self.slots[id_slot] = Slot([*prompt, *new[:-1]], keys, values)
        text = "" if self.tokenizer is None else self.tokenizer.decode(new)
        return {"content": text, "tokens": new, "id_slot": id_slot, "timings": {"cache_n": reused}}

    @property
    def _size(self) -> int:
        return int(self.model.config.head_dim)

    def _heads(self, rows: Tensor) -> Tensor:
        """[P, Hk * D] -> [1, Hk, P, D]."""
        return rows.unflatten(1, (-1, self._size)).transpose(0, 1)[None]

    @staticmethod
    def _rows(heads: Tensor) -> Tensor:
        """[1, Hk, P, D] -> [P, Hk * D]."""
        return heads[0].transpose(0, 1).flatten(1)


def _pairs(rows: Tensor, size: int) -> Tensor:
    """In each head: a1 a2 a3 b1 b2 b3 -> a1 b1 a2 b2 a3 b3."""
    order = [place for pair in zip(range(size // 2), range(size // 2, size), strict=True) for place in pair]
    return rows.unflatten(1, (-1, size))[:, :, order].flatten(1)


def _halves(rows: Tensor, size: int) -> Tensor:
    """In each head: a1 b1 a2 b2 a3 b3 -> a1 a2 a3 b1 b2 b3."""
    order = [*range(0, size, 2), *range(1, size, 2)]
    return rows.unflatten(1, (-1, size))[:, :, order].flatten(1)


def _handler(server: LlamaStandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.keys_of_requests.append(self.headers["Authorization"])
            try:
                status, answer = 200, server.answer(self.path, body)
            except RefusedError as error:
                status, answer = 400, {"error": {"code": 400, "message": str(error)}}
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            """Print nothing."""

    return Handler
