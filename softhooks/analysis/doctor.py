"""Find out which prompts a model allows, by attaching each method to a tiny copy that is made from the model's config."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn

from softhooks.analysis.tiny_config import tiny_like, widen
from softhooks.attach import attach
from softhooks.compat.quiet import without_warnings
from softhooks.errors import CheckpointError, SoftHooksError
from softhooks.method import Method
from softhooks.methods import (
    Cartridge,
    ContextAwarePromptTuning,
    ContextTuning,
    LlamaAdapter,
    MultitaskPromptTuning,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    ResidualPromptTuning,
)

_P = 4
TRIALS: dict[str, Callable[[], Method]] = {
    "prompt_tuning": lambda: PromptTuning(_P),
    "prefix_tuning": lambda: PrefixTuning(_P),
    "p_tuning": lambda: PTuning(_P),
    "p_tuning_v2": lambda: PTuningV2(_P),
    "multitask_prompt_tuning": lambda: MultitaskPromptTuning(_P, tasks=2),
    "context_aware_prompt_tuning": lambda: ContextAwarePromptTuning(context_ids=[5, 6, 7, 8], token_types=[1, 2, 3, 4]),
    "llama_adapter": lambda: LlamaAdapter(_P),
    "residual_prompt_tuning": lambda: ResidualPromptTuning(_P),
    "context_tuning": lambda: ContextTuning(demonstrations=[[5, 6], [7, 8]]),
    "cartridge": lambda: Cartridge(_P, document=list(range(5, 15))),
}
"""A small prompt of each method."""

_ATTENTION = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}
_FAILURES = (
    ValueError,
    TypeError,
    RuntimeError,
    KeyError,
    AttributeError,
    IndexError,
    NotImplementedError,
    ImportError,
)
"""The errors with which a model fails that cannot be built with small sizes."""


class Candidate:
    """A model that is known by its config; its weights are not loaded.

    Args:
        name: a directory with a config, or a name on the Hub, from which only the config is downloaded.

    Raises:
        CheckpointError: the config cannot be read, or names a model that transformers does not have.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        try:
            self.config: Any = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"the config of {name!r} cannot be read.",
                "Give a directory with config.json, or the name of a model on the Hub that needs no remote code.",
                error=" ".join(str(error).split())[:300],
            ) from error
        self.cls: Any = self._class()

    def _class(self) -> Any:
        """Return the class that the config names; without a name, a class with the config's language modeling head or none."""
        for architecture in self.config.architectures or ():
            if hasattr(transformers, architecture):
                return getattr(transformers, architecture)
        autos = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM, transformers.AutoModel)
        for auto in autos:
            if type(self.config) in auto._model_mapping:
                found = auto._model_mapping[type(self.config)]
                return found[0] if isinstance(found, (tuple, list)) else found
        raise CheckpointError(f"transformers has no model class for the config of {self.name!r}.")

    def facts(self) -> dict[str, Any]:
        """Describe the model: its class, its number of parameters, and the attention that it supports."""
        text = self.config.get_text_config()
        return {
            "name": self.name,
            "class": self.cls.__name__,
            "model_type": self.config.model_type,
            "parameters": self._parameters(),
            "layers": getattr(text, "num_hidden_layers", None),
            "width": getattr(text, "hidden_size", None),
            "vocabulary": getattr(text, "vocab_size", None),
            "positions": getattr(text, "max_position_embeddings", None),
            "attention": ["eager", *(name for name, flag in _ATTENTION.items() if getattr(self.cls, flag, False))],
        }

    def _parameters(self) -> int | None:
        """Count the parameters on the meta device, which allocates no memory; None if the model cannot be built there."""
        try:
            with torch.device("meta"), _quiet():
                model: nn.Module = self.cls(self.config)
                return sum(parameter.numel() for parameter in model.parameters())
        except _FAILURES:
            return None

    def tiny(self) -> nn.Module:
        """Build the tiny copy, with random weights.

        Raises:
            CheckpointError: the model cannot be built with small sizes.
        """
        torch.manual_seed(0)
        try:
            with _quiet():
                model: nn.Module = self.cls(tiny_like(self.config)).eval()
        except _FAILURES as error:
            raise CheckpointError(
                f"no tiny copy of {self.cls.__name__} can be built from the config of {self.name!r}.",
                "Pass --weights to load the model itself.",
                error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            ) from error
        widen(model)
        return model

    def real(self) -> nn.Module:
        """Load the model with its weights."""
        try:
            model: nn.Module = self.cls.from_pretrained(self.name, trust_remote_code=False, use_safetensors=True)
        except (OSError, *_FAILURES) as error:
            raise CheckpointError(
                f"{self.name!r} cannot be loaded with `{self.cls.__name__}.from_pretrained`.",
                error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            ) from error
        return model.eval()


def try_methods(model: nn.Module) -> list[dict[str, Any]]:
    """Attach a small prompt of each method, and return how it enters the model, or the reason why it is refused."""
    return [{"method": kind, **_try(model, make())} for kind, make in TRIALS.items()]


def _try(model: nn.Module, method: Method) -> dict[str, Any]:
    try:
        with _quiet(), attach(model, method) as prompt:
            told = prompt.summary()
            return {
                "injection": told.injection,
                "way_in": told.way_in,
                "needs": told.needs,
                "refused": list(told.refused),
                "error": None,
            }
    except SoftHooksError as error:
        return {"injection": None, "way_in": None, "needs": "", "refused": [], "error": str(error)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of transformers and of softhooks about the tiny copy."""
    with without_warnings(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
