"""Requests to llama.cpp's HTTP server."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from softhooks.errors import OptionError, SoftHooksError
from softhooks.formats.files import parse_json

URL = "http://127.0.0.1:8080"
"""Where llama-server listens if it is not told otherwise."""
_SECONDS = 600.0
_MAX_ANSWER_BYTES = 256 * 2**20


class LlamaServer:
    """A running llama-server.

    Args:
        url: its address. If it needs a key (`--api-key`), the environment variable LLAMA_API_KEY must hold it.

    Raises:
        OptionError: `url` is not an HTTP address.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable():
            raise OptionError(f"the address of llama.cpp's server is {url!r}; it must be like {URL}.")
        self.url = url.rstrip("/")

    def post(self, route: str, **body: Any) -> dict[str, Any]:
        """Post a JSON object, and return the answer.

        Raises:
            SoftHooksError: the server cannot be reached, or answers with an error.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("LLAMA_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self.url + route, json.dumps(body).encode(), headers)  # noqa: S310 (checked above)
        try:
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:  # noqa: S310
                return parse_json(answer.read(), f"the answer of {self.url}{route}", _MAX_ANSWER_BYTES)
        except urllib.error.HTTPError as error:
            raise SoftHooksError(
                f"llama.cpp's server refused a request to {route}.",
                status=error.code,
                answer=error.read(10_000).decode(errors="replace"),
            ) from error
        except (OSError, HTTPException) as error:
            raise SoftHooksError(
                f"llama.cpp's server cannot be reached at {self.url}.",
                "Start it with `llama-server -m MODEL.gguf --slots --slot-save-path DIR`.",
                error=str(error),
            ) from error

    def fill(self, slot: int, tokens: list[int]) -> None:
        """Compute the keys and values of tokens in a slot, from nothing."""
        self.post(f"/slots/{slot}?action=erase")
        answer = self.post("/completion", prompt=tokens, id_slot=slot, cache_prompt=False, n_predict=1)
        if reused_tokens(answer) != 0:
            raise SoftHooksError(
                "llama.cpp's server reused keys and values although the request asks it to compute all."
            )

    def save(self, slot: int, filename: str) -> None:
        """Save a slot to a file in the server's directory."""
        self.post(f"/slots/{slot}?action=save", filename=filename)

    def restore(self, slot: int, filename: str, tokens: int) -> None:
        """Restore a slot from a file with that many tokens in the server's directory.

        Raises:
            SoftHooksError: the server has no such file, or has read another one.
        """
        answer = self.post(f"/slots/{slot}?action=restore", filename=filename)
        if answer.get("n_restored") != tokens:
            raise SoftHooksError(
                f"llama.cpp's server read another {filename} than the one here.",
                "Pass the directory that the server was started with (`--slot-save-path`).",
                tokens_here=tokens,
                tokens_there=answer.get("n_restored"),
            )

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, with those that the model's tokenizer adds at the start."""
        tokens = self.post("/tokenize", content=text, add_special=True, parse_special=True).get("tokens")
        if not isinstance(tokens, list):
            raise SoftHooksError("llama.cpp's server did not answer /tokenize with a list of tokens.")
        return tokens


def reused_tokens(answer: dict[str, Any]) -> int:
    """Return how many tokens of a request were already in the slot, from the server's answer.

    Raises:
        SoftHooksError: the answer does not say it.
    """
    timings = answer.get("timings")
    found = timings.get("cache_n") if isinstance(timings, dict) else None
    if not isinstance(found, int):
        raise SoftHooksError(
            "llama.cpp's server did not say how many tokens it reused (`timings.cache_n`), so it cannot be checked that the "
            "prompt was used.",
            "Use a version of llama.cpp's server that docs/serving.md lists.",
        )
    return found
