"""Models that PEFT has wrapped: find the inner model, and refuse calls that would lose a prompt."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from softhooks.errors import AttachError, UnsupportedModelError
from softhooks.patching.patches import Patches

_UNLOADS = ("merge_and_unload", "unload")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a PEFT model; return any other model unchanged."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def path_in_wrapper(model: nn.Module) -> str:
    """Return the path of the transformers model inside a PEFT model, with a trailing dot; empty for any other model.

    The paths of saved heads omit this prefix, so that a prompt trained with LoRA can also be loaded onto the merged model.
    """
    inner = unwrapped(model)
    return "" if inner is model else next(f"{path}." for path, part in model.named_modules() if part is inner)


def refuse_peft_prompts(model: nn.Module) -> None:
    """Raise an `UnsupportedModelError` if a PEFT model has prompts, because both libraries would insert theirs."""
    configs = getattr(model, "peft_config", None)
    found = {name: _kind(one) for name, one in configs.items() if _is_prompt(one)} if isinstance(configs, dict) else {}
    if found:
        raise UnsupportedModelError(
            "the model already has PEFT prompts, so a softhooks prompt cannot be attached to it.",
            "Convert the PEFT prompts for the unwrapped model with `softhooks.integrations.peft.from_peft(peft_model, model)`.",
            adapters=", ".join(f"{name!r} ({kind})" for name, kind in found.items()),
        )


def _kind(config: Any) -> str:
    kind = getattr(config, "peft_type", None)
    return str(getattr(kind, "value", kind))


def _is_prompt(config: Any) -> bool:
    return bool(getattr(config, "is_prompt_learning", False)) or _kind(config) == "ADAPTION_PROMPT"


def refuse_unloading(model: nn.Module, patches: Patches) -> None:
    """Make the methods that remove the wrapper of a PEFT model raise an error, because the wrapper holds the prompts."""
    if unwrapped(model) is model or not hasattr(model, "peft_config"):
        return
    for module in (model, getattr(model, "base_model", model)):
        for name in _UNLOADS:
            if hasattr(module, name):
                patches.set(module, name, _Refusal(name))


class _Refusal:
    """Replaces a method that would lose the prompts; a class and not a closure, so that the model can be pickled."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, *_args: Any, **_kwargs: Any) -> NoReturn:
        raise AttachError(
            f"`{self._name}` would remove the PEFT wrapper, which holds the prompts, heads and hooks.",
            "Save and remove the prompt, merge, and load the prompt onto the merged model; or keep the wrapper and merge in "
            "place with `merge_adapter()`.",
        )
