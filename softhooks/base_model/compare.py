"""Compare two fingerprints of base models, and classify the difference."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from softhooks.base_model.fingerprint import GROUPS, PACKED, Fingerprint, WeightSample

Finding = Literal["same", "quantized", "converted", "merged", "adapters", "resized", "tuned", "another"]

FOUND: dict[Finding, str] = {
    "same": "the same base model",
    "quantized": "the same base model in different quantizations",
    "converted": "the same base model, once converted to a lower precision and back",
    "merged": "one base model with and without merged adapters, or with quantized weights",
    "adapters": "one base model with different active adapters",
    "resized": "one base model with vocabularies of different sizes",
    "tuned": "a base model and a fine-tuned variant of it",
    "another": "different base models",
}
"""What the fingerprints of two base models show."""

SAME: tuple[Finding, ...] = ("same", "quantized")

_MIN_COSINE = 0.7
"""The smallest cosine similarity of weights before and after fine-tuning; for unrelated models, it is about 0."""

_MAX_TIES = 0.125
"""The largest share of values that two dtype conversions may round to neighboring values instead of the same one."""

_PRODUCT_ERROR = 1e-6
"""The rounding error of the product of LoRA's matrices, relative to the largest value."""


class _GroupComparison(NamedTuple):
    """Whether weights could be compared, whether they are equal up to dtype conversions, and their cosine similarity."""

    known: bool
    same: bool
    cosine: float


def compare(then: Fingerprint, now: Fingerprint, *, adapters: bool = True) -> Finding:
    """Classify how the model that a prompt is loaded onto (`now`) differs from the one that it was trained with (`then`).

    A base model with LoRA counts as equal to one with the LoRA merged into it, but not to one without LoRA.

    Args:
        adapters: whether unmerged LoRA is part of the base model; False if the LoRA was trained together with the prompt.
    """
    found = _compare(then, now)
    if found in SAME and adapters and (then.merged or now.merged):
        active = _compare(*(one.with_merged() if one.merged else one for one in (then, now)))
        return found if active in SAME else "adapters"
    if found not in SAME and _compare(then, lowered(now)[0]) == "same":
        return "converted"  # not the reverse: weights changed by small training steps may round to their initial values
    if found != "merged":
        return found
    pairs = [(then.with_merged(), now)] if then.merged else []
    pairs += [(then, now.with_merged()), (then, now.with_unmerged())] if now.merged else []
    return next((same for same in (_compare(one, other) for one, other in pairs) if same in SAME), found)


def _compare(then: Fingerprint, now: Fingerprint) -> Finding:
    compared = [_compare_group(then.samples.get(group, {}), now.samples.get(group, {})) for group in GROUPS]
    embeddings, vectors, _ = compared
    known = [one for one in compared if one.known]
    if all(one.same for one in known):
        if then.vocabulary != now.vocabulary:
            return "resized"
        return "quantized" if _packed(then) != _packed(now) else "same"
    if embeddings.same and vectors.same and (embeddings.known or vectors.known):
        return "merged"
    return "tuned" if all(one.cosine >= _MIN_COSINE for one in known) else "another"


def lowered(fingerprint: Fingerprint) -> tuple[Fingerprint, str]:
    """Relabel fp32 weights that contain only bf16 (or only fp16) values as that dtype; also return the dtype's name."""
    samples = [one for named in fingerprint.samples.values() for one in named.values() if one.dtype == "float32"]
    values = [one.values.nan_to_num() for one in samples]
    for dtype in ("bfloat16", "float16"):
        if all(torch.equal(each.to(getattr(torch, dtype)).float(), each) for each in values):
            lower = {
                group: {k: replace(one, dtype=dtype) if one.dtype == "float32" else one for k, one in named.items()}
                for group, named in fingerprint.samples.items()
            }
            return Fingerprint(fingerprint.vocabulary, lower), dtype
    return fingerprint, "fp32"


def _packed(fingerprint: Fingerprint) -> set[str]:
    return {name for named in fingerprint.samples.values() for name, one in named.items() if one.dtype == PACKED}


def _compare_group(then: dict[str, WeightSample], now: dict[str, WeightSample]) -> _GroupComparison:
    """Compare the weights that are in both fingerprints, within one group: embeddings, vectors or matrices."""
    same, ties, total = True, 0, 0
    pairs: list[tuple[Tensor, Tensor]] = []
    for name in sorted(set(then) & set(now)):
        one, other = then[name], now[name]
        if PACKED in (one.dtype, other.dtype):
            continue
        if one.values.shape != other.values.shape:
            return _GroupComparison(known=True, same=False, cosine=0.0)
        are_read = ~(one.values.isnan() | other.values.isnan())
        a, b = one.values[are_read], other.values[are_read]
        if one.magnitudes is not None or other.magnitudes is not None:
            different, near = _count_beyond_merge(one, other, are_read), 0
        else:
            different, near = _count_different(a, b, one.dtype, other.dtype)
        same = same and not different
        ties += near
        total += a.numel()
        pairs.append((a, b))
    if not total:
        return _GroupComparison(known=False, same=True, cosine=1.0)
    same = same and ties <= _MAX_TIES * total
    a, b = (torch.cat(side).double() for side in zip(*pairs, strict=True))
    cosine = 1.0 if same else float((a @ b) / (a.norm() * b.norm()).clamp(min=1e-30))
    return _GroupComparison(known=True, same=same, cosine=cosine)


def _count_different(a: Tensor, b: Tensor, one: str, other: str) -> tuple[int, int]:
    """Count the values that differ and, separately, those that differ by at most one rounding step of the coarser dtype."""
    if one == other:
        return int((a != b).sum()), 0
    coarse = _coarser(one, other)
    a, b = a.to(coarse).float(), b.to(coarse).float()
    step = torch.finfo(coarse).eps * torch.maximum(a.abs(), b.abs())
    step = step.clamp(min=6e-8 if "float16" in (one, other) else 0.0)  # the smallest step of fp16
    different = (a - b).abs() > step
    return int(different.sum()), int(((a != b) & ~different).sum())


def _count_beyond_merge(one: WeightSample, other: WeightSample, are_read: Tensor) -> int:
    """Count the values that differ by more than the rounding errors of a merge: product, sum and dtype conversion."""
    given = [sample.magnitudes for sample in (one, other) if sample.magnitudes is not None]
    magnitudes = torch.stack(given).amax(0)[are_read]
    a, b = one.values[are_read], other.values[are_read]
    allowed = 2 * torch.finfo(_coarser(one.dtype, other.dtype)).eps * magnitudes
    return int(((a - b).abs() > allowed + _PRODUCT_ERROR * magnitudes.amax()).sum()) if a.numel() else 0


def _coarser(one: str, other: str) -> torch.dtype:
    dtypes: list[torch.dtype] = [getattr(torch, one), getattr(torch, other)]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
