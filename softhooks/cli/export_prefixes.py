"""Write the keys and values of prompts, which vLLM and SGLang serve with softhooks' integrations."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import typer

from softhooks.cli.exit_codes import usage_errors
from softhooks.cli.prompt_names import default_name
from softhooks.errors import OptionError


def export_prefixes(prompts: dict[str, str], base: Any, output: Path, server: str, strict: bool) -> None:
    """Write one file for each prompt into the directory of a server's prompts.

    Args:
        prompts: directories, or names on the Hub, by the names of the prompts in requests.
        base: the base model.
        output: the directory.
        server: "vllm" or "sglang", whose option or command is printed.
        strict: refuse a base model whose weights differ from those used in training.

    Raises:
        SoftHooksError: a prompt cannot be loaded, or cannot be served as keys and values.
    """
    from softhooks.load import load  # torch and transformers take seconds to import
    from softhooks.serving.prefix import prefix_of
    from softhooks.serving.prefix_files import write_prefix
    from softhooks.serving.requests import sglang_command, vllm_kv_transfer_config

    for name, source in prompts.items():
        prompt = load(base, source, name, strict=strict)
        try:
            prefix = prefix_of(base)
        finally:
            prompt.remove()
        path = write_prefix(output, name, prefix)
        facts = prefix.facts
        typer.echo(f"{path}: {facts.method}, {facts.num_virtual_tokens} virtual tokens, {facts.layers} layers")
    if server == "sglang":
        typer.echo(f"Start SGLang with this command:\n{sglang_command(base.name_or_path, output)}")
        return
    config = shlex.quote(json.dumps(vllm_kv_transfer_config(output), separators=(",", ":")))
    typer.echo(f"Start vLLM with this option:\n--kv-transfer-config {config}")


def stored(folder: Path | None, tag: str | None) -> list[str]:
    """Return the paths of the prompts in a store.

    Args:
        folder: the store; None if there is none.
        tag: only the prompts with this tag.

    Raises:
        OptionError: `folder` is not a store, has no such prompt, or is missing although there is a tag.
    """
    if folder is None:
        if tag is not None:
            raise OptionError("--tag selects prompts of a store, but there is none.", "Pass the store by --store.")
        return []
    from softhooks.serving.prompt_store import PromptStore

    names = PromptStore(folder).names(tag)
    if not names:
        found = "contains no prompt" if tag is None else f"contains no prompt with the tag {tag!r}"
        raise OptionError(f"{folder} {found}.", f"`softhooks store list {folder}` lists the prompts of a store.")
    return [str(folder / name) for name in names]


def names_of(prompts: list[str]) -> dict[str, str]:
    """Return the paths of prompts by the last part of each path, which is the prompt's name in requests.

    Raises:
        OptionError: two prompts have the same name, or a name has characters that are not allowed.
    """
    from softhooks.serving.prefix_files import check_name

    sources: dict[str, str] = {}
    with usage_errors():
        for source in prompts:
            name = check_name(default_name(source))
            if name in sources:
                raise OptionError(
                    f"two prompts would get the name {name!r} on the server; a prompt is named after its directory.",
                    "Rename one directory.",
                    first=sources[name],
                    second=source,
                )
            sources[name] = source
    return sources
