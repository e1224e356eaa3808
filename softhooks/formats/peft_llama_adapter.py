"""LLaMA-Adapters in PEFT's format.

PEFT has one gate for each layer, without tanh, and adds the gated branch after the output projection; the paper adds it before.
The results are equal only if the projection has no bias. In GPT-2, PEFT does not project the branch at all. Adapters that PEFT
would compute differently are refused.

Source: the PEFT 0.21 format: `base_model.model.model.layers.{i}.self_attn.adaption_prompt` [1, K, H] and `.adaption_gate` [1].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from softhooks.backbone.stack import ModelStructure
from softhooks.errors import CheckpointError, PromptMismatchError
from softhooks.formats.stored import StoredPrompt

KIND = "ADAPTION_PROMPT"
_NAME = re.compile(r"base_model\.model\.(?:[a-z_]+\.)*layers\.(\d{1,6})\.self_attn\.adaption_(prompt|gate)")
_WRITTEN_NAME = "base_model.model.model.layers.{}.self_attn.adaption_{}"
_MODEL_TYPES = ("llama", "mistral")
_NO_BIAS = "Llama or Mistral, output projections without a bias"


def read(tensors: dict[str, Tensor], source: str) -> StoredPrompt:
    """Read the prompts and gates of consecutive layers."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                f"{name!r} is neither the prompt nor the gate of a Llama or Mistral layer.",
                "For other models, train a LLaMA-Adapter with softhooks; in GPT-2, PEFT computes it differently.",
                file=source,
            )
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    layers = sorted(found)
    are_consecutive = bool(layers) and layers == list(range(layers[0], layers[-1] + 1))
    are_complete = all(set(layer) == {"prompt", "gate"} for layer in found.values())
    parts = [part for layer in found.values() for part in layer.values()]
    are_floats = all(part.is_floating_point() for part in parts)
    shapes = sorted({tuple(part.shape) for part in parts})
    has_shapes = (
        len(shapes) == 2 and shapes[0] == (1,) and len(shapes[1]) == 3 and shapes[1][0] == 1 and shapes[1][1] > 0
    )
    if not (are_consecutive and are_complete and are_floats and has_shapes):
        raise CheckpointError(
            "the PEFT LLaMA-Adapter does not have a floating-point prompt [1, K, H] and gate [1] for each of the top layers.",
            "Save the adapter again with PEFT.",
            file=source,
            layers=layers,
            shapes=shapes,
        )
    prompts = torch.cat([found[layer]["prompt"][0] for layer in layers])
    gates = torch.stack([found[layer]["gate"] for layer in layers], dim=1)
    count = len(layers)
    return StoredPrompt(
        "llama_adapter",
        {"num_virtual_tokens": len(prompts) // count, "num_layers": count, "gate": "raw", "gate_per": "layer"},
        {"text_prompts": prompts, "text_gates": gates},
        heads={},
        conventions={
            "gate": "raw",
            "branch": "before the output projection",
            "rows": "unnormed, unrotated, unmasked",
        },
        source=source,
        stacks={"text": {"causal": True}},
        adapter_layers=tuple(layers),
    )


def check_fit(layers: tuple[int, ...], structure: ModelStructure, source: str) -> None:
    """Raise a `PromptMismatchError` if PEFT and softhooks do not compute the same result in these layers of a model."""
    difference = _difference(structure, layers)
    if difference is not None:
        raise PromptMismatchError(
            "PEFT computes a LLaMA-Adapter differently in these layers; the results are equal only in the top layers of Llama "
            "and Mistral models whose output projections have no bias.",
            "Train the adapter with softhooks.",
            prompt=f"layers {layers[0]} to {layers[-1]} ({source})",
            model=difference,
        )


def _difference(structure: ModelStructure, layers: Sequence[int]) -> str | None:
    """Describe a model if PEFT and softhooks compute different results in these layers of it; otherwise, return None."""
    stack = structure.entry
    sites = stack.sites_of("self")
    config: Any = getattr(stack.module, "config", None)
    model_type = getattr(config, "model_type", None)
    projections = [getattr(site.module, "o_proj", None) for site in sites[-len(layers) :]]
    has_bias = any(getattr(projection, "bias", None) is not None for projection in projections)
    if model_type in _MODEL_TYPES and layers[-1] == len(sites) - 1 and not has_bias:
        return None
    return f"{model_type}, {len(sites)} layers, output projections {'with' if has_bias else 'without'} a bias"


# --- write ------------------------------------------------------------------------------------------------------------


def obstacle(stored: StoredPrompt, structure: ModelStructure | None) -> tuple[str, str] | None:
    """Return what prevents writing an adapter in PEFT's format, and a supported alternative; return None if nothing does.

    If `structure` is None, the adapter is refused, because its file does not record whether the model's projections have a bias.
    """
    options = stored.options
    if options["scale_and_bias"] or options["early_fusion"] or options["context_size"] is not None:
        return "factors, offsets or a context", "prompts and gates alone"
    if stored.heads:
        return f"a trained head ({', '.join(stored.heads)}) with a LLaMA-Adapter", "no head"
    if structure is None:
        return (
            "an adapter without its model, whose output projections may have a bias",
            "an adapter with its model (`--base`)",
        )
    sites = structure.entry.sites_of("self")
    count = len(sites) if options["num_layers"] is None else options["num_layers"]
    difference = _difference(structure, range(len(sites) - count, len(sites)))
    if difference is not None:
        return difference, _NO_BIAS
    gates = stored.tables["text_gates"].view(count, -1)
    if not torch.equal(gates, gates[:, :1].expand_as(gates)):
        return "gates that differ between the heads of a layer", "gate_per='layer'"
    return None


def parts(stored: StoredPrompt) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return PEFT's config and tensors for a supported adapter. PEFT applies no tanh to gates, so this function applies it."""
    options, tables = stored.options, stored.tables
    layers = sum(run[0] for run in stored.stacks["text"]["self"])
    count = layers if options["num_layers"] is None else options["num_layers"]
    prompts = tables["text_prompts"].unflatten(0, (count, -1))
    gates = tables["text_gates"].view(count, -1)[:, :1]
    gates = torch.tanh(gates) if options["gate"] == "tanh" else gates
    tensors: dict[str, Tensor] = {}
    for layer, prompt, gate in zip(range(layers - count, layers), prompts, gates, strict=True):
        tensors[_WRITTEN_NAME.format(layer, "prompt")] = prompt[None].clone()
        tensors[_WRITTEN_NAME.format(layer, "gate")] = gate.clone()
    return {
        "peft_type": KIND,
        "target_modules": "self_attn",
        "adapter_len": options["num_virtual_tokens"],
        "adapter_layers": count,
    }, tensors
