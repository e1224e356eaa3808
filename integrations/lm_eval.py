"""lm-evaluation-harness: score a model with its prompt.

A model type `softhooks`, which is the harness's own `HFLM` with one argument more, `prompt`: a directory, a hub id or a
checkpoint of PEFT. Everything else is HFLM's: log-likelihoods, rolling windows, generation, batch sizes, chat templates. Slots
take places in the model's context, so `max_length` is HFLM's own less what the prompt takes; with the prompt off it is HFLM's,
and so is every score, bit for bit. From a shell, with the harness's own options behind it:

    python -m softhooks.integrations.lm_eval --model softhooks --model_args pretrained=NAME,prompt=DIR --tasks arc_easy

In Python, `register()` makes `lm_eval.simple_evaluate(model="softhooks", model_args=...)` find it, and `SoftPromptLM` takes a
model that carries a prompt already.

Refused by name, for the harness has rows of ids and nothing else: layouts that are templates, layouts whose slots stand next to
anchors or at the end (a scored continuation may not move them), and a multitask prompt of several tasks.

Versions tested: lm-eval 0.4.13.

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

from typing import TYPE_CHECKING, Any

from softhooks.errors import OptionError, UnsupportedMethodError

from ._imports import import_framework

if TYPE_CHECKING:
    from torch import nn

    from softhooks.prompt import SoftPrompt

__all__ = ["SoftPromptLM", "main", "register"]

SoftPromptLM: Any  # made by `__getattr__`

NAME = "softhooks"
"""What the harness calls the model type."""


def register() -> None:
    """Make the harness find the model type `softhooks`; calling it again does nothing.

    Raises:
        SoftHooksError: lm-eval is not installed.
    """
    _harness()
    from lm_eval.api.registry import model_registry

    if NAME not in model_registry:
        model_registry.register(NAME, target=_language_model())


def room_taken(model: nn.Module) -> int:
    """How many of a model's positions its prompts take now: the longest of those that are on; 0 where none is."""
    from softhooks.integration_support.models import prompted_model_of, soft_prompts_of

    prompted = prompted_model_of(model)
    if prompted is None or not prompted.is_in_use:
        return 0
    names = [prompted.active] if prompted.rows is None else prompted.rows
    return max(_room(soft_prompts_of(prompted)[name]) for name in names if name is not None)


def _room(prompt: SoftPrompt) -> int:
    """A prefix that leaves the text where it stands takes no position, and a gated branch has none."""
    if prompt.injection == "branch" or not prompt.conventions.get("shift_positions", True):
        return 0
    return prompt.layout.columns


def require_plain_rows(prompt: SoftPrompt) -> None:
    """Refuse a prompt that needs more than rows of ids.

    Raises:
        UnsupportedMethodError: naming what it needs.
    """
    from softhooks.integration_support.serving import required_columns

    needs = "slots that are looked for in each row" if prompt.layout.searches else required_columns(prompt)
    if needs:
        raise UnsupportedMethodError(
            "the harness gives a model rows of ids, in which every continuation is scored at its own place.",
            "Use a prompt that stands at the front; of a multitask prompt, one task.",
            method=prompt.method.kind,
            needs=needs,
        )


def _harness() -> Any:
    return import_framework("lm_eval", "lm-evaluation-harness", "lm-eval")


def _language_model() -> type:
    """Build the class, once: it must subclass the harness's."""
    if "SoftPromptLM" in globals():
        return globals()["SoftPromptLM"]  # type: ignore[no-any-return]
    _harness()
    from lm_eval.models.huggingface import HFLM

    from softhooks.integration_support.models import prompted_model_of, soft_prompts_of
    from softhooks.load import load

    class SoftPromptLM(HFLM):
        """HFLM with a prompt.

        Args:
            pretrained: as HFLM takes it: a name, a directory, or a model; one that carries a prompt is taken with it.
            prompt: a saved prompt to load; None: the model carries one.
            strict: as in `softhooks.load`.
            kwargs: HFLM's own. A `max_length` that is given is the context's whole length, of which the prompt takes its part.

        Raises:
            OptionError: there is no prompt, or there are two.
            UnsupportedMethodError: the prompt needs more than rows of ids. The model is as it was.
        """

        def __init__(self, pretrained: Any, prompt: str | None = None, strict: bool = True, **kwargs: Any) -> None:
            carries = not isinstance(pretrained, str) and prompted_model_of(pretrained) is not None
            if carries == (prompt is not None):
                raise OptionError(
                    "a model is scored with one prompt: one that is loaded, or one that it carries.",
                    "Give `prompt=DIR` with a bare model; for the bare model alone, use the harness's own `hf`.",
                    model="carries a prompt" if carries else "carries none",
                    prompt=prompt,
                )
            super().__init__(pretrained, **kwargs)
            if prompt is None:
                prompted = prompted_model_of(pretrained)
                assert prompted is not None
                for each in soft_prompts_of(prompted).values():
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
            """How many tokens of text a row may have."""
            return int(super().max_length) - room_taken(self.model)

    SoftPromptLM.__module__, SoftPromptLM.__qualname__ = __name__, "SoftPromptLM"
    globals()["SoftPromptLM"] = SoftPromptLM
    return SoftPromptLM


def __getattr__(name: str) -> Any:
    if name == "SoftPromptLM":
        return _language_model()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main() -> None:
    """Run the harness's command line with the model type in it."""
    from softhooks.integration_support.command_line import report_errors, usage_errors

    with report_errors(), usage_errors():
        register()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()


if __name__ == "__main__":
    from softhooks.integrations.lm_eval import main as run  # the module that the registry's class belongs to

    run()
