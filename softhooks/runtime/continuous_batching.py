"""Continuous batching with a prompt. The checks run before the manager starts: in its thread, errors are only logged."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from softhooks.compat.peft import unwrapped
from softhooks.errors import UnsupportedModeError
from softhooks.runtime.generate import PromptedMethod

if TYPE_CHECKING:
    from softhooks.runtime.attached_prompt import AttachedPrompt
    from softhooks.runtime.prompted_model import PromptedModel

_START = "init_continuous_batching"


def required_columns(prompt: AttachedPrompt) -> str:
    """Return the batch columns that a prompt needs in each call as text, or an empty string if it needs none."""
    try:
        prompt.encoder.choose_variants({}, 1)
    except UnsupportedModeError:
        return ", ".join(prompt.method.probe_arguments())
    return ", ".join(prompt.layout.batch_columns)


def require_servable(prompted: PromptedModel) -> None:
    """Refuse prompts that cannot be used when many requests are packed into one row.

    Raises:
        UnsupportedModeError: rows have different prompts, or the prompt needs a column for each row or enters as slots.
    """
    if prompted.rows is not None:
        raise UnsupportedModeError(
            f"`rows` selects {prompted.selection_text}, but in continuous batching all requests use one prompt.",
            "Select it with `softhooks.activate`; serve other prompts with other managers, one after another.",
        )
    prompt = prompted.prompts[str(prompted.active)]
    needs = required_columns(prompt)
    if prompt.injection in ("attention", "shared", "branch") and not needs:
        return
    raise UnsupportedModeError(
        f"{prompt.name!r} ({prompt.method.kind}, injection={prompt.injection!r}) cannot be used in continuous batching: the "
        "prompt must enter at attention and be the same for every request.",
        "Use a prefix, or `placement='front'` on a model that can share its prompt; use one task of a multitask prompt.",
        **({"each request would need": needs} if needs else {}),
    )


class _Loop:
    """The loop of a manager's thread, run with the context variables of the thread that made the manager."""

    def __init__(self, manager: Any, own: Callable[[Any], None]) -> None:
        self._manager = manager
        self._own = own
        self._context = copy_context()

    def __call__(self) -> None:
        """Run the loop."""
        self._context.run(self._own, self._manager)


class _Start(PromptedMethod):
    """Checks the prompt before and after `init_continuous_batching`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.prompted.is_in_use:
            require_servable(self.prompted)
        kept = getattr(self.model, "_cached_continuous_batching_manager", None)
        manager = self.original()(*args, **kwargs)
        if kept is not None and manager is kept and not kept.is_running():
            # The manager's cache looks up blocks of earlier sessions by token ids only, whichever prompt computed them.
            kept.batch_processor = None
        try:
            if self.prompted.is_in_use:
                self._require_masks(manager.continuous_batching_config)
        except UnsupportedModeError:
            before = getattr(manager, "_original_attn_impl", None)
            if before is not None:
                manager._original_attn_impl = None
                self.model.set_attn_implementation(before)  # type: ignore[operator]
            if manager is not kept:
                manager.destroy()
            raise
        manager._run_generation_loop = _Loop(manager, type(manager)._run_generation_loop)
        return manager

    def _require_masks(self, config: Any) -> None:
        """Refuse attention without a mask, because a prompt needs one, and compiled code, because it skips hooks."""
        attention = str(self.model.config._attn_implementation)  # type: ignore[union-attr]
        joins = self.prompted.prompts[str(self.prompted.active)].injection != "branch"
        compiled = any(
            getattr(config, name, None) is not None for name in ("varlen_compile_config", "decode_compile_config")
        )
        graphs = any(config.cuda_graph_booleans)
        if (joins and attention.removeprefix("paged|") not in ("sdpa", "eager")) or compiled or graphs:
            raise UnsupportedModeError(
                "continuous batching with a prompt needs attention with a mask, and hooks that run in each forward.",
                "Use 'sdpa' or 'eager' attention and `ContinuousBatchingConfig(auto_switch_to_flash=False, "
                "use_cuda_graph=False)`, and do not compile.",
                attention=attention,
                cuda_graphs=graphs,
                compiled=compiled,
            )


def wrap_continuous_batching(prompted: PromptedModel) -> None:
    """Replace the method that starts continuous batching, until the last prompt is removed."""
    model = unwrapped(prompted.model)
    if hasattr(model, _START):
        prompted.patches.set(model, _START, _Start(prompted, model, _START))
