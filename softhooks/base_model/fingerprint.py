"""The fingerprint of a base model: a few numbers of each of its weights, by which it is known again.

The numbers themselves are kept, not a digest of them, so that they can be compared within the precision that a conversion leaves.
They lie at pseudo-random places that follow from a weight's name alone. Heads, poolers, adapters and what is trained beside the
prompt are left out, for they may differ from one load of the same base to the next.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from softhooks.backbone.heads import find_heads
from softhooks.backbone.stack import ModelStructure, Stack
from softhooks.base_model.merged_lora import Adapted, adapted_weights, is_packed, is_whole
from softhooks.compat.offload import read
from softhooks.compat.sharding import full, is_sharded

Group = Literal["embeddings", "vectors", "matrices"]

GROUPS: tuple[Group, ...] = ("embeddings", "vectors", "matrices")
PACKED = "packed"
"""The precision of a weight whose numbers are codes of a quantizer."""

_PLACES, _ROWS, _MOST = 2, 16, 128
"""Numbers of each weight, of each embedding, and weights of one name in all layers."""

_READ_WHOLE = 2**16
"""The size up to which a weight that is not on this device, or only in part, is brought in."""

_CODES = {"float64": "d", "float32": "f", "bfloat16": "b", "float16": "h", PACKED: "q"}
_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "base_layer.", "original_module.")
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Part:
    """What is known of the weights of one name, in all layers.

    Attributes:
        precision: the name of their dtype, or `packed`.
        numbers: fp32; not a number where it was not read.
        sizes: where they are sums that others may have rounded: how large what was added is.
    """

    precision: str
    numbers: Tensor
    sizes: Tensor | None = None


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of a base model.

    Attributes:
        vocabulary: how many rows its embedding has.
        parts: by group and by a short form of the name, in which layers are `*`.
        merged: the matrices that adapters change, as they are once the adapters are merged; none where that is not known.
    """

    vocabulary: int
    parts: dict[Group, dict[str, Part]] = field(default_factory=dict)
    merged: dict[str, Part] = field(default_factory=dict)

    def with_merged(self) -> Fingerprint:
        """The fingerprint of the same base with its adapters merged."""
        return self._with({name: part.numbers for name, part in self.merged.items()})

    def with_unmerged(self) -> Fingerprint:
        """The same base, whose adapters may have been merged and unmerged, which rounds."""
        own = self.parts.get("matrices", {})
        return self._with({name: own[name].numbers for name in self.merged})

    def _with(self, numbers: dict[str, Tensor]) -> Fingerprint:
        own = dict(self.parts.get("matrices", {}))
        for name, found in numbers.items():
            sizes = own[name].numbers.abs() + self.merged[name].numbers.abs()
            own[name] = Part(own[name].precision, found, sizes)
        return Fingerprint(self.vocabulary, {**self.parts, "matrices": own})

    @property
    def digest(self) -> str:
        """A short form for people: the same through conversions of precision, but for numbers at a tie."""
        numbers = [part.numbers for group in GROUPS for _, part in sorted(self.parts.get(group, {}).items())]
        rounded = torch.cat([torch.zeros(1), *numbers]).to(torch.bfloat16).view(torch.int16).numpy()
        return str(xxhash.xxh3_64_hexdigest(rounded.tobytes()))[:8]

    def to_json(self) -> dict[str, Any]:
        """The form in which a file holds it."""
        parts: dict[str, Any] = {
            group: {name: _coded(part) for name, part in named.items()} for group, named in self.parts.items()
        }
        if self.merged:
            parts["merged"] = {name: _coded(part) for name, part in self.merged.items()}
        return {"vocabulary": self.vocabulary, "digest": self.digest, **parts}

    @classmethod
    def from_json(cls, told: Any) -> Fingerprint:
        """Read it.

        Raises:
            ValueError: it is not of that form.
        """
        if not isinstance(told, dict) or type(told.get("vocabulary")) is not int or told["vocabulary"] < 1:
            raise ValueError("a fingerprint must be an object with its vocabulary")
        parts = {group: _read(told, group) for group in GROUPS}
        if not any(parts.values()):
            raise ValueError("a fingerprint must hold numbers of some weights")
        merged = _read(told, "merged")
        for name, part in merged.items():
            own = parts["matrices"].get(name)
            if own is None or own.numbers.shape != part.numbers.shape:
                raise ValueError("a fingerprint must hold each merged matrix as it is unmerged, too")
        return cls(told["vocabulary"], parts, merged)


def _read(told: dict[str, Any], group: str) -> dict[str, Part]:
    named = told.get(group, {})
    if not isinstance(named, dict) or not all(isinstance(value, str) for value in named.values()):
        raise ValueError(f"a fingerprint must hold its {group} as text")
    return {name: _part(group, value) for name, value in named.items()}


def _coded(part: Part) -> str:
    return _CODES[part.precision] + base64.b64encode(part.numbers.numpy().astype("<f4").tobytes()).decode("ascii")


def _part(group: str, text: str) -> Part:
    """Read what is told of the weights of one name; no more numbers, and no others, than `take` finds."""
    part = Part(*_unpacked(text))
    count = part.numbers.numel()
    is_whole = count == _ROWS if group == "embeddings" else 0 < count <= _PLACES * _MOST and count % _PLACES == 0
    if not is_whole or (part.precision == PACKED and not part.numbers.isnan().all()):
        raise ValueError(f"a fingerprint must hold the numbers of each weight, not {count} of {part.precision} {group}")
    return part


def _unpacked(text: str) -> tuple[str, Tensor]:
    precisions = {code: precision for precision, code in _CODES.items()}
    data = base64.b64decode(text[1:], validate=True)
    if text[:1] not in precisions or len(data) % 4:
        raise ValueError(f"a fingerprint must hold a precision and fp32 numbers, not {text[:40]!r}")
    return precisions[text[0]], torch.from_numpy(np.frombuffer(data, "<f4").astype("f4"))


# --- take -------------------------------------------------------------------------------------------------------------


def take(
    model: nn.Module, structure: ModelStructure, *, like: Fingerprint | None = None, frozen: bool = False
) -> Fingerprint:
    """Take the fingerprint of a model; some milliseconds, for few numbers are read.

    Args:
        like: the one to be compared with, whose rows of the vocabulary are read.
        frozen: leave out what trains, where everything else is frozen.
    """
    vocabulary = structure.vocabulary if like is None else like.vocabulary
    weights: dict[Group, dict[str, list[Tensor]]] = {group: {} for group in GROUPS}
    for group, name, tensor in _weights(model, structure):
        weights[group].setdefault(name, []).append(tensor)
    adapted = adapted_weights(model)
    parts: dict[Group, dict[str, Part]] = {}
    merged: dict[str, Part] = {}
    for group, named in weights.items():
        parts[group] = {}
        for name, tensors in named.items():
            chosen = tensors[:: -(-len(tensors) // _MOST)]
            rows = vocabulary if group == "embeddings" else None
            left_out = [frozen and tensor.requires_grad for tensor in chosen]
            numbers = [
                _nothing(rows) if out else _numbers(tensor, name, rows)
                for tensor, out in zip(chosen, left_out, strict=True)
            ]
            parts[group][name] = own = Part(_precision(chosen[0]), _together(numbers))
            if group == "matrices" and any(id(tensor) in adapted for tensor in chosen):
                changes = _together(_changes(chosen, name, adapted))
                merged[name] = Part(own.precision, own.numbers + changes)
    return Fingerprint(structure.vocabulary, parts, merged)


def _together(numbers: list[Tensor]) -> Tensor:
    """Bring the numbers of many weights to the CPU in one transfer a device."""
    devices = {tensor.device for tensor in numbers}
    if len(devices) == 1:
        return torch.cat(numbers).cpu()
    return torch.cat([tensor.cpu() for tensor in numbers])


def _weights(model: nn.Module, structure: ModelStructure) -> Iterator[tuple[Group, str, Tensor]]:
    """Each weight of the base with its group and its name, tied ones once."""
    seen = {id(p) for head in find_heads(model, structure).values() for p in head.parameters()}
    for stack in structure.stacks:
        weight: Any = stack.embedding.weight
        if id(weight) not in seen:
            seen.add(id(weight))
            yield "embeddings", _key(f"{stack.name}.embedding"), _brought(weight, model)
        yield from _of_stack(model, stack, seen)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(output, "weight", None)
    if isinstance(weight, Tensor) and id(weight) not in seen and weight.dim() == 2:
        yield "embeddings", _key("output"), _brought(weight, model)


def _of_stack(model: nn.Module, stack: Stack, seen: set[int]) -> Iterator[tuple[Group, str, Tensor]]:
    pooler = getattr(stack.module, "pooler", None)
    if isinstance(pooler, nn.Module):
        seen.update(map(id, pooler.parameters()))
    adapted = [
        (f"{path}.", inside)
        for path, module in stack.module.named_modules()
        for inside in ("base_layer", "original_module")
        if hasattr(module, inside)
    ]
    for name, weight in stack.module.named_parameters():
        beside = any(name.startswith(path) and not name.startswith(path + inside) for path, inside in adapted)
        if beside or id(weight) in seen or name.startswith("soft_prompt."):
            continue
        seen.add(id(weight))
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        group: Group = "vectors" if weight.dim() < 2 else "matrices"
        yield group, _key(f"{stack.name}.{pattern}"), _brought(weight, model)


def _key(name: str) -> str:
    """A short form of a name, for files to stay small."""
    return str(xxhash.xxh32_hexdigest(name.encode()))


def _brought(weight: Tensor, model: nn.Module) -> Tensor:
    """Bring in a small weight that is offloaded; any other stays where it is."""
    if not weight.is_meta or weight.numel() > _READ_WHOLE:
        return weight
    name = next((name for name, one in model.named_parameters() if one is weight), None)
    return weight if name is None else read(model, name, weight)


def _precision(weight: Tensor) -> str:
    return PACKED if is_packed(weight) else str(weight.dtype).removeprefix("torch.")


def _numbers(weight: Tensor, name: str, vocabulary: int | None) -> Tensor:
    """The numbers of one weight at its places, fp32."""
    if is_sharded(weight) and weight.numel() <= _READ_WHOLE:
        weight = full(weight.detach())
    if not is_whole(weight):
        return _nothing(vocabulary)
    if vocabulary is None:
        return torch.take(weight.detach(), _index(weight, name)).float()
    width = weight.shape[1]
    rows = _rows(name, vocabulary)
    columns = [int((place * 7919) % 1 * width) for place in _places(name, _ROWS)]
    there = torch.tensor([row < weight.shape[0] for row in rows], device=weight.device)
    index = torch.tensor(
        [min(row, weight.shape[0] - 1) * width + column for row, column in zip(rows, columns, strict=True)],
        device=weight.device,
    )
    return torch.where(there, torch.take(weight.detach(), index).float(), torch.nan)


def _index(weight: Tensor, name: str) -> Tensor:
    """The places at which a weight that is no embedding is read, in its flat form."""
    return torch.tensor([int(place * weight.numel()) for place in _places(name, _PLACES)], device=weight.device)


def _changes(weights: list[Tensor], name: str, adapted: dict[int, Adapted]) -> list[Tensor]:
    """What merging the adapters adds to the numbers of some weights."""
    changes = []
    for weight in weights:
        known = adapted.get(id(weight))
        change = None if known is None else known.change(_index(weight, name), weight.shape[-1])
        changes.append(torch.zeros(_PLACES, device=weight.device) if change is None else change)
    return changes


def _places(name: str, count: int) -> list[float]:
    """Where the numbers of a weight are read, from 0 to 1."""
    start = xxhash.xxh3_64_intdigest(name.encode()) / 2**64
    return [(start + (k + 1) * _GOLDEN) % 1 for k in range(count)]


def _rows(name: str, vocabulary: int) -> list[int]:
    return [int(place * vocabulary) for place in _places(name, _ROWS)]


def without_rows(known: Fingerprint, ids: Collection[int]) -> Fingerprint:
    """Leave out the rows of some words: those that a prompt has of its own."""
    if not ids:
        return known
    named = {
        name: Part(part.precision, part.numbers.masked_fill(_are_among(name, known.vocabulary, ids), torch.nan))
        for name, part in known.parts.get("embeddings", {}).items()
    }
    return Fingerprint(known.vocabulary, {**known.parts, "embeddings": named}, known.merged)


def _are_among(name: str, vocabulary: int, ids: Collection[int]) -> Tensor:
    return torch.tensor([row in ids for row in _rows(name, vocabulary)])


def _nothing(vocabulary: int | None) -> Tensor:
    return torch.full((_PLACES if vocabulary is None else _ROWS,), torch.nan)
