"""Continuous batching with a prompt: what it can serve, asked before a manager starts, whose thread would only log the error."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from softhooks.compat.peft import unwrapped
from softhooks.errors import UnsupportedModeError
from softhooks.runtime.generate import Noting

if TYPE_CHECKING:
    from softhooks.runtime.attached_prompt import AttachedPrompt
    from softhooks.runtime.prompted_model import PromptedModel

_START = "init_continuous_batching"


def needed(prompt: AttachedPrompt) -> str:
    """The columns of a batch that a prompt cannot do without; empty where ids are enough."""
    try:
        prompt.encoder.choose({}, 1)
    except UnsupportedModeError:
        return ", ".join(prompt.method.probe_arguments())
    return ", ".join(prompt.layout.batch_columns)


def require_servable(prompted: PromptedModel) -> None:
    """Refuse prompts that a row of many sequences cannot meet.

    Raises:
        UnsupportedModeError: each row has its own, or the prompt on is a matter of each row.
    """
    if prompted.rows is not None:
        raise UnsupportedModeError(
            "a continuous batch has one row, in which requests come and go: they all meet one prompt.",
            "Name it with `softhooks.activate`, and serve the others by managers of their own, one after the other.",
            rows=prompted.selection_text,
        )
    prompt = prompted.prompts[str(prompted.active)]
    needs = needed(prompt)
    if prompt.injection in ("attention", "shared", "branch") and not needs:
        return
    raise UnsupportedModeError(
        "in a continuous batch, a prompt must enter at attention and be the same for every request.",
        "Use a prefix, or `placement='front'` on a model that can share its prompt; of a multitask prompt, one task.",
        prompt=f"{prompt.name!r}: {prompt.method.kind}, which enters as {prompt.injection}",
        **({"each request would need": needs} if needs else {}),
    )


class _Loop:
    """A manager's loop, which a thread of its own runs, within the `with` blocks that the manager was made in."""

    def __init__(self, manager: Any, own: Callable[[Any], None]) -> None:
        self._manager = manager
        self._own = own
        self._context = copy_context()

    def __call__(self) -> None:
        """Run it."""
        self._context.run(self._own, self._manager)


class _Start(Noting):
    """A model's own `init_continuous_batching`, which asks first."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.prompted.is_in_use:
            require_servable(self.prompted)
        kept = getattr(self.model, "_cached_continuous_batching_manager", None)
        manager = self.own()(*args, **kwargs)
        if kept is not None and manager is kept and not kept.is_running():
            kept.batch_processor = (
                None  # its cache finds blocks of earlier sessions by their ids, whatever the prompt was
            )
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
        """Refuse what runs without a mask that can be widened, or without the hooks."""
        attention = str(self.model.config._attn_implementation)  # type: ignore[union-attr]
        joins = self.prompted.prompts[str(self.prompted.active)].injection != "branch"
        compiled = any(
            getattr(config, name, None) is not None for name in ("varlen_compile_config", "decode_compile_config")
        )
        graphs = any(config.cuda_graph_booleans)
        if (joins and attention.removeprefix("paged|") not in ("sdpa", "eager")) or compiled or graphs:
            raise UnsupportedModeError(
                "a continuous batch meets a prompt where attention has a mask and each forward runs its hooks.",
                "Use 'sdpa' or 'eager' attention and `ContinuousBatchingConfig(auto_switch_to_flash=False, "
                "use_cuda_graph=False)`, without compiling.",
                attention=attention,
                cuda_graphs=graphs,
                compiled=compiled,
            )


def watch_batching(prompted: PromptedModel) -> None:
    """Ask before a model starts a continuous batch, until its last prompt is removed."""
    model = unwrapped(prompted.model)
    if hasattr(model, _START):
        prompted.patches.set(model, _START, _Start(prompted, model, _START))
