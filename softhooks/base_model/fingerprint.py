"""The fingerprint of a base model: a few values of each weight, by which a saved prompt recognizes its base model.

The file contains the values and not a hash of them, so that they can be compared up to the rounding of a dtype conversion.
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
"""The dtype name for a weight that contains the codes of a quantizer."""

PER_WEIGHT = 2
"""The number of values to read from each weight."""
PER_EMBEDDING = 16
"""The number of values to read from each embedding."""
MAX_LAYERS = 128
"""The maximal number of weights with the same name to read, over all layers."""

_CODES = {"float64": "d", "float32": "f", "bfloat16": "b", "float16": "h", PACKED: "q"}


@dataclass(frozen=True)
class WeightSample:
    """Some values of the weights with the same name in all layers.

    Attributes:
        dtype: the name of the weights' dtype, or `packed`.
        values: the values in fp32; NaN for a value that was not read.
        magnitudes: the sum of the absolute summands of each value, if the value is a sum that may have been rounded elsewhere.
    """

    dtype: str
    values: Tensor
    magnitudes: Tensor | None = None


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of a base model.

    Attributes:
        vocabulary: the number of rows of the embedding.
        samples: the samples by group and by a hash of the name, with `*` for the number of the layer.
        merged: the matrices that adapters change, with the adapters merged; empty if unknown.
    """

    vocabulary: int
    samples: dict[Group, dict[str, WeightSample]] = field(default_factory=dict)
    merged: dict[str, WeightSample] = field(default_factory=dict)

    def with_merged(self) -> Fingerprint:
        """Return the fingerprint of the same base model with its adapters merged."""
        return self._with({name: sample.values for name, sample in self.merged.items()})

    def with_unmerged(self) -> Fingerprint:
        """Return the fingerprint of the same base model after merging and unmerging its adapters, which may round weights."""
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
        """A short form for messages, computed from bf16 values so that dtype conversions rarely change it."""
        values = [sample.values for group in GROUPS for _, sample in sorted(self.samples.get(group, {}).items())]
        rounded = torch.cat([torch.zeros(1), *values]).to(torch.bfloat16).view(torch.int16).numpy()
        return str(xxhash.xxh3_64_hexdigest(rounded.tobytes()))[:8]

    def to_json(self) -> dict[str, Any]:
        """Return the fingerprint as it is stored in a file."""
        groups: dict[str, Any] = {
            group: {name: _encoded(sample) for name, sample in named.items()} for group, named in self.samples.items()
        }
        if self.merged:
            groups["merged"] = {name: _encoded(sample) for name, sample in self.merged.items()}
        return {"vocabulary": self.vocabulary, "digest": self.digest, **groups}

    @classmethod
    def from_json(cls, value: Any) -> Fingerprint:
        """Read a fingerprint that `to_json` has written.

        Raises:
            ValueError: the value is malformed.
        """
        if not isinstance(value, dict) or type(value.get("vocabulary")) is not int or value["vocabulary"] < 1:
            raise ValueError("it is not an object with `vocabulary`, a whole number of 1 or more")
        samples = {group: _read(value, group) for group in GROUPS}
        if not any(samples.values()):
            raise ValueError("it has no values of any weight")
        merged = _read(value, "merged")
        for name, sample in merged.items():
            own = samples["matrices"].get(name)
            if own is None or own.values.shape != sample.values.shape:
                raise ValueError(f"the merged matrix {name[:40]!r} has no unmerged matrix of the same shape")
        return cls(value["vocabulary"], samples, merged)


def _read(value: dict[str, Any], group: str) -> dict[str, WeightSample]:
    named = value.get(group, {})
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
        raise ValueError(f"its {group} are not an object of strings")
    return {name: _decoded(group, text) for name, text in named.items()}


def _encoded(sample: WeightSample) -> str:
    return _CODES[sample.dtype] + base64.b64encode(sample.values.numpy().astype("<f4").tobytes()).decode("ascii")


def _decoded(group: str, text: str) -> WeightSample:
    """Decode a sample, and check that it has the number of values that `take_fingerprint` reads."""
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
        raise ValueError(
            f"it has a sample of {count} {sample.dtype} values in {group}; their number or content is invalid"
        )
    return sample
