"""Check prompts before continuous batching starts, because the manager's own thread only logs errors."""

from __future__ import annotations

from contextvars import copy_context
from functools import partial
from typing import Any

from softhooks.errors import UnsupportedModeError
from softhooks.runtime.generate import PromptedMethod
from softhooks.runtime.request_prompts import RequestPrompts, require_name_each
from softhooks.runtime.servable import require_servable


class GenerateBatch(PromptedMethod):
    """The replacement for `generate_batch`."""

    def __call__(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        """Check that `rows` has one name for each request; later, transformers would only log the error."""
        rows = self.prompted.rows
        if rows is not None:
            require_name_each(rows, len(inputs))
        return self.original()(inputs, *args, **kwargs)


class StartContinuousBatching(PromptedMethod):
    """The replacement for `init_continuous_batching`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Check the prompts, create the manager, check its settings, and let its requests use different prompts."""
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
        if manager is not kept or not kept.is_running():
            RequestPrompts(self.prompted, manager)
        # The manager's thread does not inherit this thread's `with` blocks, which are context variables.
        manager._run_generation_loop = partial(copy_context().run, type(manager)._run_generation_loop, manager)
        return manager

    def _require_masks(self, config: Any) -> None:
        # A prompt needs an attention mask, and compiled code skips hooks.
        attention = str(self.model.config._attn_implementation)  # type: ignore[union-attr]
        joins = any(prompt.injection != "branch" for prompt in self.prompted.active_prompts())
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
