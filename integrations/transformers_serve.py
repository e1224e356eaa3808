"""transformers serve: serve a model with its prompt, with or without continuous batching.

The server's answers are the same as those of `generate`. From a shell, with the server's own options:

    python -m softhooks.integrations.transformers_serve MODEL --prompt DIR --port 8000 --continuous-batching

These raise an error: a server that is not pinned to one model, because a prompt belongs to one model; with continuous batching,
prompts that occupy slots or differ between requests, flash attention, CUDA graphs and compiled forwards. Flash attention and CUDA
graphs, which transformers may use by default on a GPU, are turned off unless you request them.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from softhooks.errors import OptionError, SoftHooksError
from softhooks.integration_support import Patches
from softhooks.integration_support.command_line import report_errors, usage_errors
from softhooks.integration_support.serving import require_servable
from softhooks.load import load

__all__ = ["main", "prompted", "serve"]


def serve(prompt: str | Path, model: str, **options: Any) -> Any:
    """Start transformers' server on one model with its prompt.

    Args:
        prompt: a saved prompt: a directory, a Hub id, or a PEFT checkpoint.
        model: the name or the directory of the base model.
        options: options of transformers' `Serve`, such as `port`, `device` and `continuous_batching`.

    Returns:
        transformers' `Serve`, after the server has ended; with `non_blocking=True`, after it has started.

    Raises:
        SoftHooksError: the server's dependencies are not installed, or the prompt does not fit the model or cannot be served.
    """
    with prompted(prompt):
        from transformers.cli.serve import Serve

        return Serve(force_model=model, **options)


@contextmanager
def prompted(prompt: str | Path, *, strict: bool = True) -> Iterator[None]:
    """Make servers that are created in the `with` block load their model with a prompt.

    Args:
        prompt, strict: as in `softhooks.load`.

    Raises:
        SoftHooksError: the server's dependencies are not installed.
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise SoftHooksError(
            "the dependencies of `transformers serve` are not installed.",
            'Install them: pip install "softhooks[transformers-serve]".',
        )
    from transformers.cli.serving import model_manager, utils

    with Patches() as patches:
        patches.set(model_manager, "ModelManager", _manager(model_manager.ModelManager, str(prompt), strict))
        patches.set(utils, "GenerationState", _state(utils.GenerationState))
        yield


def _manager(base: Any, prompt: str, strict: bool) -> Any:
    class PromptedModelManager(base):
        """Loads the server's model, and the prompt onto it."""

        def __init__(self, *args: Any, continuous_batching: bool = False, **kwargs: Any) -> None:
            self._batches = continuous_batching
            super().__init__(*args, continuous_batching=continuous_batching, **kwargs)

        def _validate_args(self) -> None:
            super()._validate_args()
            if self.force_model is None:
                raise OptionError(
                    "the server is not pinned to one model, but a prompt belongs to one model.",
                    "Pass the name of the model when you start the server.",
                    prompt=prompt,
                )

        def _load_model(self, *args: Any, **kwargs: Any) -> Any:
            model = super()._load_model(*args, **kwargs)
            loaded = load(model, prompt, strict=strict)
            if self._batches:
                require_servable(loaded.prompted_model)
            return model

    return PromptedModelManager


def _state(base: Any) -> Any:
    class PromptedGenerationState(base):
        """Turns off flash attention and CUDA graphs, unless they were requested."""

        def __init__(self, continuous_batching: bool = False, cb_config: Any = None, **kwargs: Any) -> None:
            from transformers import ContinuousBatchingConfig

            if continuous_batching:
                cb_config = ContinuousBatchingConfig() if cb_config is None else cb_config
                cb_config.auto_switch_to_flash = False
                cb_config.use_cuda_graph = False if cb_config.use_cuda_graph is None else cb_config.use_cuda_graph
            super().__init__(continuous_batching=continuous_batching, cb_config=cb_config, **kwargs)

    return PromptedGenerationState


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `transformers serve` with two more options: `--prompt` and `--no-strict`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompt")
    parser.add_argument("--no-strict", action="store_true")
    own, rest = parser.parse_known_args(arguments)
    with report_errors(), usage_errors():
        if own.prompt is None and "--help" not in rest:
            raise OptionError("`--prompt DIR` is missing; to serve without a prompt, run `transformers serve`.")
    with report_errors(), prompted(own.prompt, strict=not own.no_strict):
        import typer
        from transformers.cli.serve import Serve

        app = typer.Typer(pretty_exceptions_enable=False)
        app.command(name="serve")(Serve)
        app(rest)


if __name__ == "__main__":
    main()
