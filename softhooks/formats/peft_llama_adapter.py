"""Read LLaMA-Adapters that PEFT wrote, and write them for it, where its arithmetic is the paper's.

PEFT gives each layer one raw gate and adds the branch behind the output projection. That is the same as before it only where the
projection has no bias; in GPT-2 PEFT leaves the projection out altogether. Both are refused by name.

Source: the format of PEFT 0.21: `base_model.model.model.layers.{i}.self_attn.adaption_prompt` [1, K, H] and `.adaption_gate` [1].
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
_MODELS = ("llama", "mistral")
_WRITTEN = "base_model.model.model.layers.{}.self_attn.adaption_{}"


def read(tensors: dict[str, Tensor], source: str) -> StoredPrompt:
    """Take the prompts and gates of consecutive layers.

    Raises:
        CheckpointError: there are none, other tensors, or shapes that differ between layers.
    """
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(
                "a LLaMA-Adapter of PEFT must hold prompts and gates of Llama's or Mistral's layers only.",
                "In GPT-2 PEFT adds its branch behind the output projection, unprojected; train that one with softhooks.",
                file=source,
                found=name,
            )
        found.setdefault(int(match[1]), {})[match[2]] = tensor
    layers = sorted(found)
    whole = all(set(layer) == {"prompt", "gate"} for layer in found.values())
    parts = [part for layer in found.values() for part in layer.values()]
    shapes = sorted({tuple(part.shape) for part in parts})
    whole = whole and all(part.is_floating_point() for part in parts)
    if not layers or not whole or layers != list(range(layers[0], layers[-1] + 1)) or not _are_sound(shapes):
        raise CheckpointError(
            "a LLaMA-Adapter of PEFT must hold a prompt [1, K, H] and a gate [1], of floating-point numbers, for each of the "
            "top layers.",
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


def _are_sound(shapes: list[tuple[int, ...]]) -> bool:
    """Whether there is one shape of gates and one of prompts."""
    return len(shapes) == 2 and shapes[0] == (1,) and len(shapes[1]) == 3 and shapes[1][0] == 1 and shapes[1][1] > 0


def check_fit(layers: tuple[int, ...], structure: ModelStructure, source: str) -> None:
    """Check that PEFT's LLaMA-Adapter in some layers of a model computes what softhooks' does.

    Raises:
        PromptMismatchError: the layers are not its top ones, or PEFT computes something else in them.
    """
    found = _differs(structure, layers)
    if found is None:
        return
    raise PromptMismatchError(
        "a LLaMA-Adapter of PEFT computes what one of softhooks does only behind output projections without a bias, in the "
        "top layers of Llama and Mistral.",
        "Train the adapter with softhooks.",
        prompt=f"layers {layers[0]} to {layers[-1]} ({source})",
        model=found,
    )


def _differs(structure: ModelStructure, layers: Sequence[int]) -> str | None:
    """What of a model makes PEFT compute something else in its top layers; None if nothing does."""
    stack = structure.entry
    sites = stack.sites_of("self")
    config: Any = getattr(stack.module, "config", None)
    kind = getattr(config, "model_type", None)
    projections = [getattr(site.module, "o_proj", None) for site in sites[-len(layers) :]]
    biased = any(getattr(projection, "bias", None) is not None for projection in projections)
    if kind in _MODELS and layers[-1] == len(sites) - 1 and not biased:
        return None
    return f"{kind}, {len(sites)} layers, output projections {'with' if biased else 'without'} a bias"


# --- write ------------------------------------------------------------------------------------------------------------


def obstacle(stored: StoredPrompt, structure: ModelStructure | None) -> tuple[str, str] | None:
    """What keeps an adapter from being written for PEFT, and what could be; None if nothing does.

    Args:
        structure: of the model; a file alone does not say whether output projections have biases.
    """
    options = stored.options
    if options["scale_and_bias"] or options["early_fusion"] or options["context_size"] is not None:
        return "factors, offsets or a context", "prompts and gates alone"
    if stored.heads:
        return f"a trained head ({', '.join(stored.heads)})", "no head: PEFT saves none beside a LLaMA-Adapter"
    if structure is None:
        return (
            "an adapter without its model (biases of output projections are not in its file)",
            "the same with `--base`",
        )
    sites = structure.entry.sites_of("self")
    count = len(sites) if options["num_layers"] is None else options["num_layers"]
    differs = _differs(structure, range(len(sites) - count, len(sites)))
    if differs is not None:
        return differs, "Llama or Mistral, output projections without a bias"
    gates = stored.tables["text_gates"].view(count, -1)
    if not torch.equal(gates, gates[:, :1].expand_as(gates)):
        return "gates that differ between the heads of a layer", "gate_per='layer'"
    return None


def parts(stored: StoredPrompt) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config and tensors of an adapter that nothing keeps from being written; the gates' tanh is taken once."""
    options, tables = stored.options, stored.tables
    layers = sum(run[0] for run in stored.stacks["text"]["self"])
    count = layers if options["num_layers"] is None else options["num_layers"]
    prompts = tables["text_prompts"].unflatten(0, (count, -1))
    gates = tables["text_gates"].view(count, -1)[:, :1]
    gates = torch.tanh(gates) if options["gate"] == "tanh" else gates
    tensors: dict[str, Tensor] = {}
    for layer, prompt, gate in zip(range(layers - count, layers), prompts, gates, strict=True):
        tensors[_WRITTEN.format(layer, "prompt")] = prompt[None].clone()
        tensors[_WRITTEN.format(layer, "gate")] = gate.clone()
    return {
        "peft_type": KIND,
        "target_modules": "self_attn",
        "adapter_len": options["num_virtual_tokens"],
        "adapter_layers": count,
    }, tensors
