"""Check prompts before continuous batching starts, because the manager's own thread only logs errors."""

from __future__ import annotations

from contextvars import copy_context
from functools import partial
from typing import Any

from softhooks.errors import UnsupportedModeError
from softhooks.runtime.attached_prompt import AttachedPrompt
from softhooks.runtime.generate import PromptedMethod
from softhooks.runtime.prompted_model import PromptedModel


def required_columns(prompt: AttachedPrompt) -> str:
    """Return the names of the batch columns that a prompt requires, joined by commas."""
    try:
        prompt.encoder.choose_variants({}, 1)
    except UnsupportedModeError:
        return ", ".join(prompt.method.probe_arguments())
    return ", ".join(prompt.layout.batch_columns)


def require_servable(prompted: PromptedModel) -> None:
    """Refuse prompts that continuous batching cannot use, because it packs many requests into one row.

    Raises:
        UnsupportedModeError: `rows` is in use, or the prompt requires a batch column or has an unsupported `injection`.
    """
    if prompted.rows is not None:
        raise UnsupportedModeError(
            f"`rows` selects {prompted.selection_text}, but in continuous batching all requests use one prompt.",
            "Select one prompt with `softhooks.activate`; to serve another prompt, start another manager afterwards.",
        )
    prompt = prompted.prompts[str(prompted.active)]
    needs = required_columns(prompt)
    if prompt.injection in ("attention", "shared", "branch") and not needs:
        return
    raise UnsupportedModeError(
        f"{prompt.name!r} ({prompt.method.kind}, injection={prompt.injection!r}) cannot be used in continuous batching: all "
        "requests must use the same prompt, which must enter as keys and values or as a gated branch.",
        "Use a prefix, `placement='front'` on a model with `injection='shared'`, or a multitask prompt with a single task.",
        **({"each request would need": needs} if needs else {}),
    )


class StartContinuousBatching(PromptedMethod):
    """The replacement for `init_continuous_batching`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Check the prompts, create the manager, and check its settings."""
        if self.prompted.is_in_use:
            require_servable(self.prompted)
        kept = getattr(self.model, "_cached_continuous_batching_manager", None)
        manager = self.original()(*args, **kwargs)
        if kept is not None and manager is kept and not kept.is_running():
            # The manager finds cached blocks of earlier sessions by their token ids, even if another prompt computed them.
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
        # The manager's thread does not inherit this thread's `with` blocks, which are context variables.
        manager._run_generation_loop = partial(copy_context().run, type(manager)._run_generation_loop, manager)
        return manager

    def _require_masks(self, config: Any) -> None:
        # A prompt needs an attention mask, and compiled code skips hooks.
        attention = str(self.model.config._attn_implementation)  # type: ignore[union-attr]
        joins = self.prompted.prompts[str(self.prompted.active)].injection != "branch"
        compiled = any(
            getattr(config, name, None) is not None for name in ("varlen_compile_config", "decode_compile_config")
        )
        graphs = any(config.cuda_graph_booleans)
        if (joins and attention.removeprefix("paged|") not in ("sdpa", "eager")) or compiled or graphs:
            raise UnsupportedModeError(
                "continuous batching with a prompt needs an attention mask, and does not support compilation or CUDA graphs.",
                "Use 'sdpa' or 'eager' attention and `ContinuousBatchingConfig(auto_switch_to_flash=False, "
                "use_cuda_graph=False)`, and do not compile.",
                attention=attention,
                cuda_graphs=graphs,
                compiled=compiled,
            )
