"""Start llama.cpp's server with a model."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ports
from gguf_models import write_gguf

SERVE = Path(__file__).parent / "serve.py"


@dataclass
class Server:
    """A running server: its address, and the directory that it saves slots to."""

    url: str
    slots: Path


@contextmanager
def serving(
    model: Any,
    folder: Path,
    *,
    slots: int = 1,
    unified: bool = False,
    cache: str = "f32",
    flash: str = "disabled",
) -> Iterator[Server]:
    """Serve a model of transformers, or the GGUF file at a path.

    Args:
        model: the model.
        folder: an empty directory.
        slots: the number of slots.
        unified: whether the slots share their cells (`--kv-unified`).
        cache: the type of the numbers in the cache.
        flash: "disabled", "enabled" or "auto".
    """
    file, saved = model, folder / "slots"
    saved.mkdir(parents=True)
    if not isinstance(model, Path):
        file = folder / "model.gguf"
        write_gguf(model, file)
    held, port = ports.reserve()
    log = folder / "log"
    command = [os.environ["SOFTHOOKS_LLAMA_CPP"], str(SERVE), str(file), str(port), str(saved)]
    command += [str(slots), str(unified), cache, flash]
    with log.open("w") as out, held:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        while True:
            assert process.poll() is None, log.read_text()[-5000:]
            try:
                urllib.request.urlopen(f"{url}/health").close()
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.1)
        yield Server(url, saved)
    finally:
        process.terminate()
        process.wait(60)
