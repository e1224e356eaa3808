"""The command `softhooks export`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from softhooks.cli.exit_codes import usage_errors
from softhooks.cli.export_prefixes import export_prefixes, names_of, stored
from softhooks.cli.export_slots import export_slots, require_server
from softhooks.errors import CheckpointError, OptionError

EMBEDDINGS_FILE = "prompt_embeds.safetensors"
REQUEST_FILE = "request.json"

_OF_REQUESTS = ("chat", "max_tokens", "temperature", "served_name")
"""The parameters of `export` that are only used with a text."""


class Server(StrEnum):
    """The supported inference servers."""

    vllm = "vllm"
    sglang = "sglang"
    llama_cpp = "llama.cpp"


def export(
    context: typer.Context,
    to: Annotated[Server, typer.Option("--to", help="The inference server.")],
    model: Annotated[str, typer.Option(metavar="NAME", help="The base model: a directory or a name on the Hub.")],
    output: Annotated[Path, typer.Option(help="The directory to write to.", file_okay=False)],
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="The saved prompts: directories written by softhooks or PEFT, or names on the Hub. Only one with --text.",
            show_default=False,
        ),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            help="Export the prompts of this store too, under their names there.",
            exists=True,
            file_okay=False,
            show_default=False,
        ),
    ] = None,
    tag: Annotated[
        str | None, typer.Option(help="Of the store: only the prompts with this tag.", show_default=False)
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The text that follows the prompt.", show_default=False)
    ] = None,
    text_file: Annotated[
        Path | None, typer.Option(help="A file with the text.", exists=True, dir_okay=False, show_default=False)
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the tokenizer's chat template to the text.")] = False,
    max_tokens: Annotated[int, typer.Option(metavar="NUMBER", min=1, help="The number of tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="NUMBER", min=0.0, help="The sampling temperature.")] = 0.0,
    served_name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The name of the model in vLLM, if it differs from --model.", show_default=False
        ),
    ] = None,
    url: Annotated[
        str, typer.Option(metavar="URL", help="The address of llama.cpp's server, which must be running.")
    ] = "http://127.0.0.1:8080",
    strict: Annotated[
        bool,
        typer.Option(
            "--strict/--no-strict", help="Refuse a base model whose weights differ from those used in training."
        ),
    ] = True,
) -> None:
    """Write prompts for vLLM, SGLang or llama.cpp, or a request with the embeddings of a prompt and a text.

    **Prompts for vLLM and SGLang** (without --text): for each prompt, a file with its keys and values is written. A
    server that softhooks' integration is configured for finds new and replaced files by itself, and requests select a
    prompt by the name of its directory, together with plain text.

    **Prompts for llama.cpp**: a running llama-server (--url), started with --slots and --slot-save-path OUTPUT, helps to write
    a slot file for each prompt, and **NAME.json**, the start of its requests.

    **A request** (with --text): **prompt_embeds.safetensors** with the embeddings, and **request.json** to post to
    /v1/completions (vllm serve MODEL --enable-prompt-embeds) or to /generate (SGLang, --disable-radix-cache --dtype bfloat16).

    **Examples**

        softhooks export en de --to vllm --model Qwen/Qwen3-0.6B --output prompts
        softhooks export en de --to sglang --model HuggingFaceTB/SmolLM2-135M --output prompts
        softhooks export --store prompts --tag production --to vllm --model Qwen/Qwen3-0.6B --output served
        softhooks export en de --to llama.cpp --model Qwen/Qwen3-0.6B --output slots
        softhooks export sst2-prompt --to vllm --model Qwen/Qwen3-0.6B --text "A fine film. It was" --output out
    """
    with usage_errors():
        prompts = [*(prompts or ()), *stored(store, tag)]
        _check_texts(prompts, to, text, text_file)
        if text is None and text_file is None:
            _refuse_options_of_requests(context)
        if to is not Server.llama_cpp and _is_given(context, "url"):
            raise OptionError(
                "--url is the address of llama.cpp's server; it can only be combined with --to llama.cpp."
            )
    if text is None and text_file is None:
        names = names_of(prompts)
        if to is Server.llama_cpp:
            require_server(url)
            export_slots(names, _base(model), output, url, strict)
        else:
            export_prefixes(names, _base(model), output, to.value, strict)
        return
    content = text if text is not None else Path(str(text_file)).read_text(encoding="utf-8")
    embeddings = _embeddings(prompts[0], model, content, chat, to, strict)
    from softhooks.serving.requests import sglang_request, vllm_request  # torch takes seconds to import

    if to is Server.vllm:
        body = vllm_request(served_name or model, embeddings, max_tokens=max_tokens, temperature=temperature)
    else:
        body = sglang_request(embeddings, sampling_params={"max_new_tokens": max_tokens, "temperature": temperature})
    _write(output, embeddings, body, {"prompt": prompts[0], "model": model, "server": to.value})
    typer.echo(
        f"{output / EMBEDDINGS_FILE}: {embeddings.shape[0]} embeddings of size {embeddings.shape[1]}, {embeddings.dtype}"
    )
    typer.echo(f"{output / REQUEST_FILE}: {to.value}")


def _check_texts(prompts: list[str], to: Server, text: str | None, text_file: Path | None) -> None:
    if not prompts:
        raise OptionError("there is no prompt to export.", "Name saved prompts, or a folder with prompts by --store.")
    given = [name for name, value in (("--text", text), ("--text-file", text_file)) if value is not None]
    if len(given) == 2:
        raise OptionError("only one of --text and --text-file can be given; both are given.")
    if given and to is Server.llama_cpp:
        raise OptionError(
            f"{given[0]} cannot be combined with --to llama.cpp, whose requests contain the text as tokens."
        )
    if given and len(prompts) > 1:
        raise OptionError(f"{len(prompts)} prompts are given with {given[0]}; a request has only one prompt.")


def _refuse_options_of_requests(context: typer.Context) -> None:
    """Refuse options that only change a request, because without a text no request is written."""
    given = [name for name in _OF_REQUESTS if _is_given(context, name)]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise OptionError(
            f"{options} cannot be used without a text: clients choose the text and the settings of each request themselves.",
            "Leave them out, or pass --text or --text-file to write a request.",
        )


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _base(model: str) -> Any:
    """Load the base model."""
    from transformers import AutoModelForCausalLM  # torch and transformers take seconds to import

    with _load_errors(model):
        # without `trust_remote_code=False`, transformers asks on a terminal whether to run the repository's code
        return AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=False).eval()


@contextmanager
def _load_errors(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{model!r} (--model) cannot be loaded as a causal language model with a tokenizer.",
            "Give a directory with both, written by `save_pretrained`, or a name on the Hub.",
            error=" ".join(str(error).split()),
        ) from error


def _embeddings(prompt: str, model: str, text: str, chat: bool, to: Server, strict: bool) -> Any:
    """Load the base model and the prompt, and compute the embeddings."""
    from transformers import AutoTokenizer

    from softhooks.load import load
    from softhooks.serving.embeddings import sequence_embeddings

    base = _base(model)
    with _load_errors(model):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    load(base, prompt, strict=strict)
    ids: Any = text
    if chat:
        messages = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return sequence_embeddings(base, ids, tokenizer, server="vllm" if to is Server.vllm else "sglang").cpu()


def _write(folder: Path, embeddings: Any, body: dict[str, Any], about: dict[str, str]) -> None:
    from softhooks.formats.files import replacing, write_tensors

    write_tensors(folder / EMBEDDINGS_FILE, {"prompt_embeds": embeddings}, {"format": "pt", **about})
    with replacing(folder / REQUEST_FILE) as part:
        part.write_text(json.dumps(body) + "\n", encoding="utf-8")
