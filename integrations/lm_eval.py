"""lm-evaluation-harness: evaluate a model with its prompt.

The model type `softhooks` is the harness's `HFLM` with two more arguments: `prompt` (a directory, a Hub id or a PEFT checkpoint)
and `strict`. With the prompt disabled, all scores equal HFLM's scores bit for bit. From a shell, with any of the harness's own
options:

    python -m softhooks.integrations.lm_eval --model softhooks --model_args pretrained=NAME,prompt=DIR --tasks arc_easy

In Python, call `register()`, then `lm_eval.simple_evaluate(model="softhooks", model_args=...)`. `SoftPromptLM` also accepts a
model that already has a prompt.

These raise an error: layouts with a template, and multitask prompts with several tasks, because the harness passes only token
ids; layouts with slots at anchors or at the end, because the harness appends each continuation to the text.

Versions tested: lm-eval 0.4.13

Example:
    import lm_eval
    import softhooks
    from softhooks.integrations.lm_eval import SoftPromptLM

    lm = SoftPromptLM(model, tokenizer=tokenizer, prompt=prompt_folder, batch_size=8)
    with_prompt = lm_eval.simple_evaluate(lm, tasks=["tiny_choice"], task_manager=manager)
    with softhooks.disabled(model):
        without = lm_eval.simple_evaluate(lm, tasks=["tiny_choice"], task_manager=manager)
"""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from softhooks.errors import OptionError, UnsupportedMethodError
from softhooks.integration_support.command_line import report_errors, usage_errors
from softhooks.integration_support.models import prompted_model_of, require_prompted_model, soft_prompts_of
from softhooks.integration_support.serving import required_columns
from softhooks.load import load
from softhooks.prompt import SoftPrompt

from ._imports import create_at_first_use, import_framework

__all__ = ["SoftPromptLM", "main", "register"]

SoftPromptLM: Any  # created at its first use, because it derives from a class of the harness

NAME = "softhooks"
"""The name of the model type."""


def register() -> None:
    """Register the model type `softhooks` with the harness, unless it is registered already.

    Raises:
        SoftHooksError: lm-eval is not installed.
    """
    _harness()
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=sys.modules[__name__].SoftPromptLM)


def positions_taken(model: nn.Module) -> int:
    """Return how many positions the longest active prompt of a model occupies; 0 if no prompt is active."""
    prompted = prompted_model_of(model)
    if prompted is None or not prompted.is_in_use:
        return 0
    names = [prompted.active] if prompted.rows is None else prompted.rows
    return max(_positions(soft_prompts_of(prompted)[name]) for name in names if name is not None)


def _positions(prompt: SoftPrompt) -> int:
    # gated branches, and prefixes that do not shift positions, occupy none
    if prompt.injection == "branch" or not prompt.conventions.get("shift_positions", True):
        return 0
    return prompt.layout.num_slots


def require_plain_rows(prompt: SoftPrompt) -> None:
    """Check that a prompt works with the harness, which passes only token ids."""
    if prompt.layout.form.searches:
        found = (
            "the positions of the virtual tokens depend on the text, which the harness extends by each continuation."
        )
    elif columns := required_columns(prompt):
        found = f"the prompt needs {columns}, but the harness passes only token ids."
    else:
        return
    remedy = "Use a prompt at the front of the text; a multitask prompt may have only one task."
    raise UnsupportedMethodError(found, remedy, method=prompt.method.kind)


def _harness() -> Any:
    return import_framework("lm_eval", "lm-evaluation-harness", "lm-eval")


def _language_model() -> type:
    _harness()
    from lm_eval.models.huggingface import HFLM

    class SoftPromptLM(HFLM):
        """HFLM with a prompt.

        Args:
            pretrained: as for HFLM: a name, a directory, or a model, which may already have a prompt.
            prompt: a saved prompt to load, or None if the model already has a prompt.
            strict: as in `softhooks.load`.
            kwargs: HFLM's arguments. In `max_length`, include the length of the prompt.

        Raises:
            OptionError: there is no prompt, or `prompt` is passed for a model that already has a prompt.
            UnsupportedMethodError: the prompt does not work with the harness. The model is unchanged.
        """

        def __init__(self, pretrained: Any, prompt: str | None = None, strict: bool = True, **kwargs: Any) -> None:
            has_prompt = not isinstance(pretrained, str) and prompted_model_of(pretrained) is not None
            if has_prompt == (prompt is not None):
                raise OptionError(
                    f"the model already has a prompt, and prompt={prompt!r} would load another."
                    if has_prompt
                    else "the model has no prompt, and no `prompt` was passed.",
                    "Pass either `prompt=DIR` or a model with a prompt; without a prompt, use the harness's model type `hf`.",
                )
            super().__init__(pretrained, **kwargs)
            if prompt is None:
                for each in soft_prompts_of(require_prompted_model(pretrained)).values():
                    require_plain_rows(each)
                return
            loaded = load(self.model, str(prompt), strict=strict)
            try:
                require_plain_rows(loaded)
            except UnsupportedMethodError:
                loaded.remove()
                raise

        @property
        def max_length(self) -> int:
            """The maximum number of text tokens: the context length minus the positions of the prompt."""
            return int(super().max_length) - positions_taken(self.model)

    return SoftPromptLM


__getattr__ = create_at_first_use(__name__, SoftPromptLM=_language_model)


def main() -> None:
    """Register the model type, and run the harness's command line."""
    with report_errors(), usage_errors():
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()


if __name__ == "__main__":
    # so that the registered class belongs to this module and not to `__main__`
    from softhooks.integrations.lm_eval import main as run

    run()
