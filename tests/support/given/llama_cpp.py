"""Names that the example of `softhooks.integrations.llama_cpp` expects."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any

import tokens
import zoo
from llama_stand_in import LlamaStandIn

import softhooks


def names() -> dict[str, Any]:
    """A tiny Llama with its prompt, a server that runs the same weights, its directory of slots, and its address."""
    model = zoo.build("llama")
    folder = tempfile.mkdtemp()
    running = (
        contextlib.ExitStack()
    )  # whoever runs the example closes it; the server ends with the process at the latest
    server = running.enter_context(LlamaStandIn(copy.deepcopy(model), Path(folder), tokens.tokenizer()).running())
    softhooks.attach(model, softhooks.PromptTuning(5))
    return {"model": model, "folder": folder, "url": server.url, "server": server, "running": running}
