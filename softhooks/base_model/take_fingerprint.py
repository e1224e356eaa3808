"""Take the fingerprint of a base model: read a few values of each weight, at indices that depend only on its name and size.

Heads, poolers, adapters and weights that are trained with the prompt are left out: they may differ each time the base is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from softhooks.backbone.container import is_prompt_key
from softhooks.backbone.heads import find_heads
from softhooks.backbone.stack import ModelStructure, Stack
from softhooks.base_model.fingerprint import (
    GROUPS,
    MAX_LAYERS,
    PACKED,
    PER_EMBEDDING,
    PER_WEIGHT,
    Fingerprint,
    Group,
    WeightSample,
)
from softhooks.base_model.merged_lora import LoraWeight, adapted_weights, is_packed, is_readable
from softhooks.compat.offload import read_tensor
from softhooks.compat.sharding import full, is_sharded

_READ_WHOLE = 2**16
"""Offloaded and sharded weights with more elements than this are not read."""

_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "base_layer.", "original_module.")
_GOLDEN_RATIO = 0.6180339887498949


def take_fingerprint(
    model: nn.Module, structure: ModelStructure, *, like: Fingerprint | None = None, frozen: bool = False
) -> Fingerprint:
    """Take the fingerprint of a model, in a few milliseconds.

    Args:
        like: a fingerprint to compare with; the same token ids are sampled, even if the vocabularies differ in size.
        frozen: whether to leave out trainable weights, which are trained with the prompt.
    """
    vocabulary = structure.vocabulary if like is None else like.vocabulary
    weights: dict[Group, dict[str, list[Tensor]]] = {group: {} for group in GROUPS}
    for group, name, tensor in _weights(model, structure):
        hashed = str(xxhash.xxh32_hexdigest(name.encode()))  # a short hash, to keep files small
        weights[group].setdefault(hashed, []).append(_brought_in(tensor, model))
    adapted = adapted_weights(model)
    samples: dict[Group, dict[str, WeightSample]] = {}
    merged: dict[str, WeightSample] = {}
    for group, named in weights.items():
        samples[group] = {}
        for name, tensors in named.items():
            chosen = tensors[:: -(-len(tensors) // MAX_LAYERS)]  # every n-th layer of a deep model
            rows = vocabulary if group == "embeddings" else None
            values = [
                _unread(rows) if frozen and tensor.requires_grad else _values(tensor, name, rows) for tensor in chosen
            ]
            dtype = PACKED if is_packed(chosen[0]) else str(chosen[0].dtype).removeprefix("torch.")
            samples[group][name] = own = WeightSample(dtype, _to_cpu(values))
            if group == "matrices" and any(id(tensor) in adapted for tensor in chosen):
                deltas = _to_cpu(_deltas(chosen, name, adapted))
                merged[name] = WeightSample(own.dtype, own.values + deltas)
    return Fingerprint(structure.vocabulary, samples, merged)


def _to_cpu(values: list[Tensor]) -> Tensor:
    """Concatenate values on the CPU, with a single transfer if all are on one device."""
    if len({tensor.device for tensor in values}) == 1:
        return torch.cat(values).cpu()
    return torch.cat([tensor.cpu() for tensor in values])


def _weights(model: nn.Module, structure: ModelStructure) -> Iterator[tuple[Group, str, Tensor]]:
    """Yield each weight of the base model once, with its group and its name."""
    seen = {id(p) for head in find_heads(model, structure).values() for p in head.parameters()}
    for stack in structure.stacks:
        weight: Any = stack.embedding.weight
        if id(weight) not in seen and stack.features is None:
            seen.add(id(weight))
            yield "embeddings", f"{stack.name}.embedding", weight
        yield from _weights_of_stack(stack, seen)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(output, "weight", None)
    if isinstance(weight, Tensor) and id(weight) not in seen and weight.dim() == 2:
        yield "embeddings", "output", weight


def _weights_of_stack(stack: Stack, seen: set[int]) -> Iterator[tuple[Group, str, Tensor]]:
    pooler = getattr(stack.module, "pooler", None)
    if isinstance(pooler, nn.Module):
        seen.update(map(id, pooler.parameters()))
    # PEFT wraps a layer: base weights are under `base_layer` or `original_module`, adapter weights are next to it.
    wrapped = [
        (f"{path}.", inside)
        for path, module in stack.module.named_modules()
        for inside in ("base_layer", "original_module")
        if hasattr(module, inside)
    ]
    for name, weight in stack.module.named_parameters():
        is_adapter = any(name.startswith(path) and not name.startswith(path + inside) for path, inside in wrapped)
        if is_adapter or id(weight) in seen or is_prompt_key(name):
            continue
        seen.add(id(weight))
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        group: Group = "vectors" if weight.dim() < 2 else "matrices"
        yield group, f"{stack.name}.{pattern}", weight


def _brought_in(weight: Tensor, model: nn.Module) -> Tensor:
    """Load an offloaded weight if it is small; return any other weight unchanged."""
    if not weight.is_meta or weight.numel() > _READ_WHOLE:
        return weight
    name = next((name for name, one in model.named_parameters() if one is weight), None)
    return weight if name is None else read_tensor(model, name, weight)


def _values(weight: Tensor, name: str, vocabulary: int | None) -> Tensor:
    """Read the sampled values of a weight, in fp32; in an embedding matrix, sample only the first `vocabulary` rows."""
    if is_sharded(weight) and weight.numel() <= _READ_WHOLE:
        weight = full(weight.detach())
    if not is_readable(weight):
        return _unread(vocabulary)
    if vocabulary is None:
        return torch.take(weight.detach(), _indices(weight, name)).float()
    width = weight.shape[1]
    rows = _rows(name, vocabulary)
    columns = [int((place * 7919) % 1 * width) for place in _places(name, PER_EMBEDDING)]
    exists = torch.tensor([row < weight.shape[0] for row in rows], device=weight.device)
    indices = torch.tensor(
        [min(row, weight.shape[0] - 1) * width + column for row, column in zip(rows, columns, strict=True)],
        device=weight.device,
    )
    return torch.where(exists, torch.take(weight.detach(), indices).float(), torch.nan)


def _indices(weight: Tensor, name: str) -> Tensor:
    """Return the sampled indices into a flattened weight that is not an embedding matrix."""
    return torch.tensor([int(place * weight.numel()) for place in _places(name, PER_WEIGHT)], device=weight.device)


def _deltas(weights: list[Tensor], name: str, adapted: dict[int, LoraWeight]) -> list[Tensor]:
    """Return how merging the adapters would change the sampled values of each weight."""
    return [
        adapted[id(weight)].delta(_indices(weight, name), weight.shape[-1])
        if id(weight) in adapted
        else torch.zeros(PER_WEIGHT, device=weight.device)
        for weight in weights
    ]


def _places(name: str, count: int) -> list[float]:
    """Return fractions from 0 to 1: a golden-ratio sequence that starts at the hash of the name."""
    start = xxhash.xxh3_64_intdigest(name.encode()) / 2**64
    return [(start + (k + 1) * _GOLDEN_RATIO) % 1 for k in range(count)]


def _rows(name: str, vocabulary: int) -> list[int]:
    return [int(place * vocabulary) for place in _places(name, PER_EMBEDDING)]


def without_rows(fingerprint: Fingerprint, ids: Collection[int]) -> Fingerprint:
    """Leave out the embeddings of these token ids, which a prompt replaces with its own."""
    if not ids:
        return fingerprint
    embeddings = {}
    for name, sample in fingerprint.samples.get("embeddings", {}).items():
        is_own = torch.tensor([row in ids for row in _rows(name, fingerprint.vocabulary)])
        embeddings[name] = WeightSample(sample.dtype, sample.values.masked_fill(is_own, torch.nan))
    samples = {**fingerprint.samples, "embeddings": embeddings}
    return Fingerprint(fingerprint.vocabulary, samples, fingerprint.merged)


def _unread(vocabulary: int | None) -> Tensor:
    return torch.full((PER_WEIGHT if vocabulary is None else PER_EMBEDDING,), torch.nan)
