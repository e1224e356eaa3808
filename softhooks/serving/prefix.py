"""The keys and values of a prompt, computed once so that a server can put them before the text's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from softhooks.backbone.probe_inputs import text_config
from softhooks.backbone.probing import eval_mode
from softhooks.errors import UnsupportedMethodError, UnsupportedModelError
from softhooks.prompt import SoftPrompt
from softhooks.runtime.servable import required_columns
from softhooks.serving.active_prompt import active_prompt

_REMEDY = "Serve this prompt with `softhooks.integrations.transformers_serve`."

MODEL_TYPES = ("gemma2", "gemma3_text", "granite", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""The model types on which servers were compared with transformers."""


@dataclass(frozen=True)
class PrefixFacts:
    """What a server must know about a prefix before it loads the tensors.

    Attributes:
        method: the kind of the method, such as `prefix_tuning`.
        num_virtual_tokens: P.
        model_type: the type of the base model's text config.
        vocabulary: the number of rows of the base model's input embedding.
        heads, key_dims, value_dims: the number of key-value heads and the head dimensions of each layer.
        windowed: whether sliding windows treat the prefix as tokens before the text; otherwise every token sees all of it.
    """

    method: str
    num_virtual_tokens: int
    model_type: str
    vocabulary: int
    heads: tuple[int, ...]
    key_dims: tuple[int, ...]
    value_dims: tuple[int, ...]
    windowed: bool

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.heads)


@dataclass(frozen=True)
class Prefix:
    """The keys and values of a prompt at positions 0 to P-1, with rotary embeddings applied.

    Attributes:
        keys, values: for each layer, [P, Hk, D].
    """

    facts: PrefixFacts
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


@torch.no_grad()
def prefix_of(model: nn.Module) -> Prefix:
    """Compute the keys and values of the active prompt, in the dtype of the model's embeddings.

    A prompt that consists of embeddings is run through the frozen model, so that a server needs only one mechanism for all.

    Args:
        model: a causal decoder with exactly one active prompt.

    Raises:
        NotAttachedError: the model has no prompt.
        OptionError: there is not exactly one active prompt.
        UnsupportedModelError: no server was compared with transformers on this type of model.
        UnsupportedMethodError: the prompt cannot be represented by the keys and values of tokens before the text.
    """
    prompt = active_prompt(model)
    stack = prompt.structure.entry
    model_type = _require_model(model, prompt)
    _require_prefix(prompt)
    variants = tuple(prompt.encoder.choose_variants({}, 1) or (0,))
    with eval_mode(model):
        found = prompt.key_values(stack, variants)["self"]
    sites = stack.sites_of("self")
    windowed = bool(found.windowed)
    if found.shifted is not True or found.hidden is not None or found.lengths is not None:
        raise UnsupportedMethodError(
            f"the prompt {prompt.name!r} does not shift the text's positions, but a server numbers the text after the prefix.",
            _REMEDY,
            method=prompt.method.kind,
        )
    if [site.index for site in sites] != list(range(len(sites))) or set(found.keys) != {site.index for site in sites}:
        raise UnsupportedMethodError(
            f"the prompt {prompt.name!r} has keys and values in {len(found.keys)} of {len(sites)} attention layers, but a server "
            "needs them in every layer.",
            _REMEDY,
            method=prompt.method.kind,
            layers=", ".join(map(str, sorted(found.keys))),
        )
    dtype = stack.embedding.weight.dtype
    keys = tuple(_by_token(found.keys[site.index], dtype) for site in sites)  # type: ignore[arg-type]
    values = tuple(_by_token(found.values[site.index], dtype) for site in sites)  # type: ignore[arg-type]
    facts = PrefixFacts(
        method=prompt.method.kind,
        num_virtual_tokens=keys[0].shape[0],
        model_type=model_type,
        vocabulary=prompt.structure.vocabulary,
        heads=tuple(key.shape[1] for key in keys),
        key_dims=tuple(key.shape[2] for key in keys),
        value_dims=tuple(value.shape[2] for value in values),
        windowed=windowed,
    )
    return Prefix(facts, keys, values)


def _by_token(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Reorder keys or values. [1, Hk, P, D] -> [P, Hk, D]."""
    return tensor[0].transpose(0, 1).to("cpu", dtype).clone(memory_format=torch.contiguous_format)


def _require_model(model: nn.Module, prompt: SoftPrompt) -> str:
    """Return the model type, and refuse a model on which servers were not compared with transformers."""
    kind = str(getattr(text_config(getattr(model, "config", None)), "model_type", type(model).__name__))
    stack = prompt.structure.entry
    if kind in MODEL_TYPES and stack.positions.dynamic_rope_length is None:
        return kind
    because = (
        "its rotary frequencies depend on the length of the text"
        if kind in MODEL_TYPES
        else "no server was compared on it"
    )
    raise UnsupportedModelError(
        f"the keys and values of a prompt for the model type {kind!r} cannot be exported: {because}.",
        _REMEDY,
        model=type(model).__name__,
        supported=", ".join(MODEL_TYPES),
    )


def _require_prefix(prompt: SoftPrompt) -> None:
    """Refuse a prompt that is more than keys and values before the text."""
    missing = required_columns(prompt)
    if prompt.injection in ("attention", "shared") and not (missing or len(prompt.heads) or prompt.added):
        return
    raise UnsupportedMethodError(
        f"the prompt {prompt.name!r} ({prompt.method.kind}) cannot be exported as keys and values: it must be a prefix, or "
        "embeddings before the text, and must need nothing else.",
        _REMEDY,
        injection=prompt.injection,
        heads=", ".join(prompt.heads) or "none",
        needs=missing or ("embeddings of added tokens" if prompt.added else "nothing more"),
    )
