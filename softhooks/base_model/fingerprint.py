"""The fingerprint of a base model: a few values of each weight, stored with a prompt to recognize its base model.

The values are not hashed, so that they can also be compared after a dtype conversion, which rounds them. The weights form three
groups: embeddings, vectors (such as norms and biases) and matrices.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch import Tensor

Group = Literal["embeddings", "vectors", "matrices"]

GROUPS: tuple[Group, ...] = ("embeddings", "vectors", "matrices")
PACKED = "packed"
"""The dtype name of a quantized weight."""

PER_WEIGHT = 2
"""The number of values to read from a weight of a layer."""
PER_EMBEDDING = 16
"""The number of values to read from an embedding matrix."""
MAX_LAYERS = 128
"""The largest number of layers to read."""

_CODES = {"float64": "d", "float32": "f", "bfloat16": "b", "float16": "h", PACKED: "q"}


@dataclass(frozen=True)
class WeightSample:
    """A few values of a weight from each layer that has it.

    Attributes:
        dtype: the name of the weight's dtype, or `packed` if it is quantized.
        values: the values in fp32; NaN for a value that was not read.
        magnitudes: |weight| + |merged weight|, the scale of rounding errors, if LoRA was merged or unmerged; otherwise None.
    """

    dtype: str
    values: Tensor
    magnitudes: Tensor | None = None


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of a base model.

    Attributes:
        vocabulary: the number of rows of the embedding matrix; 0 if the model does not take token ids.
        samples: the samples by group and by a hash of the weight's name, in which `*` replaces the layer's number.
        merged: samples of the matrices with LoRA, as if LoRA were merged; empty if unknown.
    """

    vocabulary: int
    samples: dict[Group, dict[str, WeightSample]] = field(default_factory=dict)
    merged: dict[str, WeightSample] = field(default_factory=dict)

    def with_merged(self) -> Fingerprint:
        """Return the fingerprint that the base model would have after merging its adapters."""
        return self._with({name: sample.values for name, sample in self.merged.items()})

    def with_unmerged(self) -> Fingerprint:
        """Return the fingerprint, with a tolerance for weights that were rounded when adapters were merged and unmerged."""
        own = self.samples.get("matrices", {})
        return self._with({name: own[name].values for name in self.merged})

    def _with(self, values: dict[str, Tensor]) -> Fingerprint:
        own = dict(self.samples.get("matrices", {}))
        for name, found in values.items():
            magnitudes = own[name].values.abs() + self.merged[name].values.abs()
            own[name] = WeightSample(own[name].dtype, found, magnitudes)
        return Fingerprint(self.vocabulary, {**self.samples, "matrices": own})

    @property
    def digest(self) -> str:
        """A short hash for messages, computed from bf16 values so that dtype conversions rarely change it."""
        values = [sample.values for group in GROUPS for _, sample in sorted(self.samples.get(group, {}).items())]
        rounded = torch.cat([torch.zeros(1), *values]).to(torch.bfloat16).view(torch.int16).numpy()
        return str(xxhash.xxh3_64_hexdigest(rounded.tobytes()))[:8]

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint in the format of a saved prompt."""
        groups: dict[str, Any] = {
            group: {name: _encoded(sample) for name, sample in named.items()} for group, named in self.samples.items()
        }
        if self.merged:
            groups["merged"] = {name: _encoded(sample) for name, sample in self.merged.items()}
        return {"vocabulary": self.vocabulary, "digest": self.digest, **groups}

    @classmethod
    def from_json(cls, value: Any) -> Fingerprint:
        """Read a fingerprint that `to_json` wrote.

        Raises:
            ValueError: the value is malformed.
        """
        if (
            not isinstance(value, dict)
            or type(value.get("vocabulary")) is not int
            or not 0 <= value["vocabulary"] < 2**31
        ):
            raise ValueError("it must be an object whose `vocabulary` is a whole number from 0 to 2**31 - 1")
        samples = {group: _read(value, group) for group in GROUPS}
        if not any(samples.values()):
            raise ValueError("it contains no weights")
        merged = _read(value, "merged")
        for name, sample in merged.items():
            own = samples["matrices"].get(name)
            if own is None or own.values.shape != sample.values.shape:
                raise ValueError(f"the merged matrix {name[:40]!r} has no unmerged matrix of the same shape")
        return cls(value["vocabulary"], samples, merged)


def _read(value: dict[str, Any], group: str) -> dict[str, WeightSample]:
    named = value.get(group, {})
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
        raise ValueError(f"`{group}` must be an object whose values are strings")
    return {name: _decoded(group, text) for name, text in named.items()}


def _encoded(sample: WeightSample) -> str:
    return _CODES[sample.dtype] + base64.b64encode(sample.values.numpy().astype("<f4").tobytes()).decode("ascii")


def _decoded(group: str, text: str) -> WeightSample:
    """Decode a sample, and check that it has as many values as `take_fingerprint` reads."""
    dtypes = {code: dtype for dtype, code in _CODES.items()}
    data = base64.b64decode(text[1:], validate=True)
    if text[:1] not in dtypes or len(data) % 4:
        raise ValueError(f"it contains {text[:40]!r} instead of a dtype and fp32 values")
    sample = WeightSample(dtypes[text[0]], torch.from_numpy(np.frombuffer(data, "<f4").astype("f4")))
    count = sample.values.numel()
    if group == "embeddings":
        is_complete = count == PER_EMBEDDING
    else:
        is_complete = 0 < count <= PER_WEIGHT * MAX_LAYERS and count % PER_WEIGHT == 0
    if not is_complete or (sample.dtype == PACKED and not sample.values.isnan().all()):
        raise ValueError(f"`{group}` contains an invalid sample of {count} {sample.dtype} values")
    return sample
