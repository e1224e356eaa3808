"""The fingerprint of a base model: a few numbers of each of its weights, by which a saved prompt knows its base again.

The file holds the numbers, not a hash of them, so that they can be compared within the rounding of a conversion of precision.
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
"""Stands for the dtype of a weight whose numbers are codes of a quantizer."""

PER_WEIGHT = 2
"""How many numbers of each weight are read."""
PER_EMBEDDING = 16
"""How many numbers of each embedding are read."""
MAX_LAYERS = 128
"""How many weights of one name are read, of all layers."""

_CODES = {"float64": "d", "float32": "f", "bfloat16": "b", "float16": "h", PACKED: "q"}


@dataclass(frozen=True)
class WeightSample:
    """Some numbers of the weights of one name, of all layers.

    Attributes:
        dtype: the name of their dtype, or `packed`.
        values: fp32; NaN for a number that was not read.
        magnitudes: for sums that other code may have rounded: the sum of the absolute values of what was added.
    """

    dtype: str
    values: Tensor
    magnitudes: Tensor | None = None


@dataclass(frozen=True)
class Fingerprint:
    """The fingerprint of a base model.

    Attributes:
        vocabulary: the number of rows of its embedding.
        samples: by group and by a hash of the name, in which `*` stands for the number of the layer.
        merged: the matrices that adapters change, as they are after merging the adapters; empty if that is not known.
    """

    vocabulary: int
    samples: dict[Group, dict[str, WeightSample]] = field(default_factory=dict)
    merged: dict[str, WeightSample] = field(default_factory=dict)

    def with_merged(self) -> Fingerprint:
        """The fingerprint of the same base with its adapters merged."""
        return self._with({name: sample.values for name, sample in self.merged.items()})

    def with_unmerged(self) -> Fingerprint:
        """The fingerprint of the same base after its adapters were perhaps merged and unmerged, which rounds."""
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
        """A short form for people. Rounded to bf16, so that conversions of precision rarely change it."""
        values = [sample.values for group in GROUPS for _, sample in sorted(self.samples.get(group, {}).items())]
        rounded = torch.cat([torch.zeros(1), *values]).to(torch.bfloat16).view(torch.int16).numpy()
        return str(xxhash.xxh3_64_hexdigest(rounded.tobytes()))[:8]

    def to_json(self) -> dict[str, Any]:
        """The fingerprint as a file holds it."""
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
            ValueError: the value has another form.
        """
        if not isinstance(value, dict) or type(value.get("vocabulary")) is not int or value["vocabulary"] < 1:
            raise ValueError("a fingerprint must be an object with its vocabulary")
        samples = {group: _read(value, group) for group in GROUPS}
        if not any(samples.values()):
            raise ValueError("a fingerprint must hold numbers of some weights")
        merged = _read(value, "merged")
        for name, sample in merged.items():
            own = samples["matrices"].get(name)
            if own is None or own.values.shape != sample.values.shape:
                raise ValueError("a fingerprint must hold each merged matrix as it is unmerged, too")
        return cls(value["vocabulary"], samples, merged)


def _read(value: dict[str, Any], group: str) -> dict[str, WeightSample]:
    named = value.get(group, {})
    if not isinstance(named, dict) or not all(isinstance(text, str) for text in named.values()):
        raise ValueError(f"a fingerprint must hold its {group} as text")
    return {name: _decoded(group, text) for name, text in named.items()}


def _encoded(sample: WeightSample) -> str:
    return _CODES[sample.dtype] + base64.b64encode(sample.values.numpy().astype("<f4").tobytes()).decode("ascii")


def _decoded(group: str, text: str) -> WeightSample:
    """Decode a sample, and check that it has as many numbers as `take_fingerprint` reads."""
    dtypes = {code: dtype for dtype, code in _CODES.items()}
    data = base64.b64decode(text[1:], validate=True)
    if text[:1] not in dtypes or len(data) % 4:
        raise ValueError(f"a fingerprint must hold a precision and fp32 numbers, not {text[:40]!r}")
    sample = WeightSample(dtypes[text[0]], torch.from_numpy(np.frombuffer(data, "<f4").astype("f4")))
    count = sample.values.numel()
    if group == "embeddings":
        is_complete = count == PER_EMBEDDING
    else:
        is_complete = 0 < count <= PER_WEIGHT * MAX_LAYERS and count % PER_WEIGHT == 0
    if not is_complete or (sample.dtype == PACKED and not sample.values.isnan().all()):
        raise ValueError(f"a fingerprint must hold the numbers of each weight, not {count} of {sample.dtype} {group}")
    return sample
