"""The plugin that SGLang loads in each of its processes, through an entry point of this package."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Offer `--radix-cache-backend softhooks`, and wrap the methods that requests pass.

    Raises:
        UnsupportedModeError: the release of SGLang is not supported; SGLang logs the message and goes on without the plugin.
    """
    import sglang
    from sglang.srt.mem_cache.registry import register_radix_cache_backend
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from softhooks.integrations._sglang_requests import make_request, take_request
    from softhooks.integrations._sglang_settings import BACKEND, require_version

    require_version(sglang.__version__)
    register_radix_cache_backend(BACKEND, _create)
    manager, scheduler = (
        "sglang.srt.managers.tokenizer_manager.TokenizerManager",
        "sglang.srt.managers.scheduler.Scheduler",
    )
    HookRegistry.register(f"{manager}._create_tokenized_object", make_request, HookType.AROUND)
    HookRegistry.register(f"{scheduler}.handle_generate_request", take_request, HookType.AROUND)


def _create(context: Any) -> Any:
    from softhooks.integrations._sglang_cache import create  # imports the scheduler's modules

    return create(context)
