"""Write prompts as slot files of llama.cpp's server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer


def require_server(url: str) -> None:
    """Check that the server answers, before a model is loaded.

    Raises:
        SoftHooksError: the server cannot be reached.
    """
    from softhooks.serving.llama_server import LlamaServer  # torch takes seconds to import

    LlamaServer(url).tokenize("")


def export_slots(prompts: dict[str, str], base: Any, output: Path, url: str, strict: bool) -> None:
    """Write one slot file for each prompt, and a file with the start of its requests, into the server's directory of slots.

    Args:
        prompts: directories, or names on the Hub, by the names of the files.
        base: the base model.
        output: the directory.
        url: the server's address.
        strict: refuse a base model whose weights differ from those used in training.

    Raises:
        SoftHooksError: a prompt cannot be loaded, or cannot be served in this way, or the server refuses it.
    """
    from softhooks.formats.files import write_json
    from softhooks.load import load
    from softhooks.serving.llama_server import LlamaServer
    from softhooks.serving.slot_export import export_slot
    from softhooks.serving.slot_requests import slot_request

    server = LlamaServer(url)
    for name, source in prompts.items():
        with load(base, source, name, strict=strict):
            written = export_slot(base, output, name, server)
        facts, start = written.facts, written.path.with_suffix(".json")
        write_json(start, slot_request(written.tokens, []))
        typer.echo(
            f"{written.path}: {facts.method}, {facts.num_virtual_tokens} virtual tokens, {facts.layers} layers; the server's "
            f"keys differ by {written.difference:.1%} from the model's"
        )
        typer.echo(f"{start}: a request for {server.url}/completion; append the tokens of the text to `prompt`")
    typer.echo("Before a request, restore the prompt into the slot:")
    typer.echo(f"curl '{server.url}/slots/0?action=restore' --json '{{\"filename\": \"{written.path.name}\"}}'")
