"""transformers serve: serve a model with its prompts, with or without continuous batching.

The server's answers are the same as those of `generate`. From a shell, with the server's own options:

    python -m softhooks.integrations.transformers_serve MODEL --prompt DIR --port 8000 --continuous-batching
    python -m softhooks.integrations.transformers_serve MODEL --prompt en=DIR --prompt de=DIR --store FOLDER

A request chooses a prompt by the name of the model, `MODEL:en`; `MODEL` alone is the model with the prompt of `--prompt DIR`, or
else the bare model. `/v1/models` lists these names. While the server runs, `/v1/load_soft_prompt` loads a prompt from the store,
and `/v1/unload_soft_prompt` removes one after its last request: `{"prompt_name": "en"}`.

These raise an error: a server that is not pinned to one model, because a prompt belongs to one model; with continuous batching,
prompts that occupy slots, gated branches next to other prompts, flash attention, CUDA graphs and compiled forwards. Flash
attention and CUDA graphs, which transformers may use by default on a GPU, are turned off unless you request them.

Versions tested: transformers 5.23.0, fastapi 0.165.0, uvicorn 0.54.0, openai 3.57.0

Example:
    from openai import OpenAI
    from softhooks.integrations.transformers_serve import serve

    server = serve(prompt_folder, model_folder, port=port, device="cpu", non_blocking=True)
    client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=9)
    answer = client.completions.create(model=model_folder, prompt="word5 word6", max_tokens=4).choices[0].text
    server.kill_server()
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softhooks.errors import OptionError, SoftHooksError
from softhooks.integration_support import Patches
from softhooks.integration_support.command_line import report_errors, usage_errors
from softhooks.integration_support.serving import PromptStore
from softhooks.integrations._prompt_routes import prompted_server
from softhooks.integrations._prompted_generation import prompted_state
from softhooks.integrations._served_prompts import DEFAULT, ServedPrompts

__all__ = ["main", "prompted", "serve"]

Prompts = str | Path | Mapping[str, str | Path]


def serve(
    prompt: Prompts | None,
    model: str,
    *,
    store: str | Path | None = None,
    tag: str | None = None,
    strict: bool = True,
    **options: Any,
) -> Any:
    """Start transformers' server on one model with its prompts.

    Args:
        prompt: a saved prompt for requests that name the model only (a directory, a Hub id, or a PEFT checkpoint), or saved
            prompts by name, or None.
        model: the name or the directory of the base model.
        store: the folder of a `PromptStore`, whose prompts are served too, and from which others can be loaded later.
        tag: serve only the prompts of the store with this tag.
        strict: as in `softhooks.load`.
        options: options of transformers' `Serve`, such as `port`, `device` and `continuous_batching`.

    Returns:
        transformers' `Serve`, after the server has ended; with `non_blocking=True`, after it has started.

    Raises:
        SoftHooksError: the server's dependencies are not installed, or a prompt does not fit the model or cannot be served.
    """
    with prompted(prompt, store=store, tag=tag, strict=strict):
        from transformers.cli.serve import Serve

        return Serve(force_model=model, **options)


@contextmanager
def prompted(
    prompt: Prompts | None = None,
    *,
    store: str | Path | None = None,
    tag: str | None = None,
    strict: bool = True,
) -> Iterator[None]:
    """Make servers that are created in the `with` block load their model with prompts.

    Args:
        prompt, store, tag, strict: as in `serve`.

    Raises:
        SoftHooksError: the server's dependencies are not installed.
        OptionError: there is neither a prompt nor a store, or a prompt is given twice.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise SoftHooksError(
            "the dependencies of `transformers serve` are not installed.",
            'Install them: pip install "softhooks[transformers-serve]".',
        )
    if prompt is None and store is None:
        raise OptionError("there is neither a prompt nor a store; to serve without prompts, run `transformers serve`.")
    from transformers.cli.serving import model_manager, server, utils

    by_name = prompt if isinstance(prompt, Mapping) else {} if prompt is None else {DEFAULT: prompt}
    served = ServedPrompts(by_name, None if store is None else PromptStore(store), tag, strict)
    with Patches() as patches:
        patches.set(model_manager, "ModelManager", _manager(model_manager.ModelManager, served))
        patches.set(utils, "GenerationState", prompted_state(utils, served))
        patches.set(server, "build_server", prompted_server(server.build_server, served))
        yield


def _manager(base: Any, served: ServedPrompts) -> Any:
    class PromptedModelManager(base):
        """Loads the server's model, and the prompts onto it."""

        def __init__(self, *args: Any, continuous_batching: bool = False, **kwargs: Any) -> None:
            served.batches = continuous_batching
            super().__init__(*args, continuous_batching=continuous_batching, **kwargs)

        def _validate_args(self) -> None:
            super()._validate_args()
            if self.force_model is None:
                raise OptionError(
                    "the server is not pinned to one model, but a prompt belongs to one model.",
                    "Pass the name of the model when you start the server.",
                )
            served.base = self.force_model

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super()._load_model(*args, **kwargs)
            served.attach_all(model)
            return model

        def load_pinned(self) -> None:
            """Load the server's model, unless it is loaded."""
            from transformers.cli.serving.utils import split_model_id

            repository, file = split_model_id(self.force_model)
            self.load_model_and_processor(self.process_model_name(repository), gguf_file=file)

    return PromptedModelManager


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `transformers serve` with more options: `--prompt`, `--store`, `--tag` and `--no-strict`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--store")
    parser.add_argument("--tag")
    parser.add_argument("--no-strict", action="store_true")
    own, rest = parser.parse_known_args(arguments)
    with report_errors(), usage_errors():
        if not own.prompt and own.store is None and "--help" not in rest:
            raise OptionError(
                "`--prompt DIR` or `--store FOLDER` is missing; to serve without prompts, run `transformers serve`."
            )
        prompts = _by_name(own.prompt)
    with report_errors(), prompted(prompts, store=own.store, tag=own.tag, strict=not own.no_strict):
        import typer
        from transformers.cli.serve import Serve

        app = typer.Typer(pretty_exceptions_enable=False)
        app.command(name="serve")(Serve)
        app(rest)


def _by_name(given: Sequence[str]) -> dict[str, str]:
    """Read the values of `--prompt`, each DIR or NAME=DIR."""
    prompts: dict[str, str] = {}
    for value in given:
        name, equals, source = value.partition("=")
        if not equals or Path(value).exists():
            name, source = DEFAULT, value
        if name in prompts:
            raise OptionError(
                f"`--prompt` gives {'two prompts' if name == DEFAULT else f'the name {name!r} twice'}"
                f"{' without a name' if name == DEFAULT else ''}.",
                "Write `--prompt NAME=DIR`, with a different name for each prompt.",
            )
        prompts[name] = source
    return prompts


if __name__ == "__main__":
    main()
