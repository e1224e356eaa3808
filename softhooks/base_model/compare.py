"""How alike two fingerprints of base models are, and what a difference looks like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from softhooks.base_model.fingerprint import PACKED, Fingerprint, Group, Part

Finding = Literal["same", "quantized", "converted", "merged", "adapters", "resized", "tuned", "another"]

SAME: tuple[Finding, ...] = ("same", "quantized")

_LIKENESS = 0.7
"""The least cosine between the numbers of a model and of a variant of it; those of two trainings apart have none."""

_AT_TIES = 0.125
"""The share of numbers that may round to a neighbor after two conversions of precision."""

_PRODUCT = 1e-6
"""How exact the product of LoRA's matrices is, in parts of the largest number."""


@dataclass(frozen=True)
class _Likeness:
    """How two sets of numbers compare.

    Attributes:
        known: whether there was anything to compare.
        same: whether they are equal, but for conversions of precision.
        cosine: how alike they are.
    """

    known: bool
    same: bool
    cosine: float


def compare(then: Fingerprint, now: Fingerprint, *, adapters: bool = True) -> Finding:
    """Tell whether two fingerprints are of one base model, and if not, what the difference looks like.

    A base with LoRA is the same model as the one that LoRA has been merged into, and another one than the bare base.

    Args:
        then: of the base that a prompt was trained with.
        now: of the model that it is to enter.
        adapters: whether LoRA that is not merged counts; not where it was trained with the prompt.
    """
    found = _compare(then, now)
    if found in SAME and adapters and (then.merged or now.merged):
        in_force = _compare(*(one.with_merged() if one.merged else one for one in (then, now)))
        return found if in_force in SAME else "adapters"
    if found not in SAME and _compare(then, lowered(now)[0]) == "same":
        return "converted"  # in this direction alone: small steps of training round to where they began
    if found != "merged":
        return found
    others = [(then.with_merged(), now)] if then.merged else []
    others += [(then, now.with_merged()), (then, now.with_unmerged())] if now.merged else []
    return next((same for same in (_compare(one, other) for one, other in others) if same in SAME), found)


def _compare(then: Fingerprint, now: Fingerprint) -> Finding:
    groups: list[Group] = ["embeddings", "vectors", "matrices"]
    embeddings, vectors, matrices = (_likeness(then.parts.get(g, {}), now.parts.get(g, {})) for g in groups)
    found = [one for one in (embeddings, vectors, matrices) if one.known]
    if all(one.same for one in found):
        if then.vocabulary != now.vocabulary:
            return "resized"
        return "quantized" if _packed(then) != _packed(now) else "same"
    if embeddings.same and vectors.same and (embeddings.known or vectors.known):
        return "merged"
    return "tuned" if all(one.cosine >= _LIKENESS for one in found) else "another"


def lowered(known: Fingerprint) -> tuple[Fingerprint, str]:
    """Take weights in fp32 that hold nothing but numbers of bf16, or of fp16, for weights of that precision."""
    parts = [part for named in known.parts.values() for part in named.values() if part.precision == "float32"]
    for kind in ("bfloat16", "float16"):
        if all(torch.equal(_rounded(part.numbers, kind), part.numbers.nan_to_num()) for part in parts):
            lower = {
                group: {
                    name: Part(kind, part.numbers) if part.precision == "float32" else part
                    for name, part in named.items()
                }
                for group, named in known.parts.items()
            }
            return Fingerprint(known.vocabulary, lower), kind
    return known, "fp32"


def _rounded(numbers: Tensor, kind: str) -> Tensor:
    return numbers.nan_to_num().to(getattr(torch, kind)).float()


def _packed(known: Fingerprint) -> set[str]:
    return {name for named in known.parts.values() for name, part in named.items() if part.precision == PACKED}


def _likeness(then: dict[str, Part], now: dict[str, Part]) -> _Likeness:
    """Compare the weights of one group that both have."""
    same, near, total = True, 0, 0
    pairs: list[tuple[Tensor, Tensor]] = []
    for name in sorted(set(then) & set(now)):
        one, other = then[name], now[name]
        if PACKED in (one.precision, other.precision):
            continue
        if one.numbers.shape != other.numbers.shape:
            return _Likeness(known=True, same=False, cosine=0.0)
        there = ~(one.numbers.isnan() | other.numbers.isnan())
        a, b = one.numbers[there], other.numbers[there]
        if one.sizes is not None or other.sizes is not None:
            off, close = _apart(one, other, there), 0
        else:
            off, close = _differing(a, b, one.precision, other.precision)
        same = same and not off
        near += close
        total += a.numel()
        pairs.append((a, b))
    if not total:
        return _Likeness(known=False, same=True, cosine=1.0)
    same = same and near <= _AT_TIES * total
    a, b = (torch.cat(side).double() for side in zip(*pairs, strict=True))
    cosine = 1.0 if same else float((a @ b) / (a.norm() * b.norm()).clamp(min=1e-30))
    return _Likeness(known=True, same=same, cosine=cosine)


def _differing(a: Tensor, b: Tensor, one: str, other: str) -> tuple[int, int]:
    """How many numbers differ, and how many are neighbors in the coarser of two precisions.

    In one precision every difference counts. A conversion rounds, two of them may round to a neighbor, and fp16 knows no
    numbers below 6e-8.
    """
    if one == other:
        return int((a != b).sum()), 0
    coarse = _coarser(one, other)
    a, b = a.to(coarse).float(), b.to(coarse).float()
    step = torch.finfo(coarse).eps * torch.maximum(a.abs(), b.abs())
    step = step.clamp(min=6e-8 if "float16" in (one, other) else 0.0)
    off = (a - b).abs() > step
    return int(off.sum()), int(((a != b) & ~off).sum())


def _apart(one: Part, other: Part, there: Tensor) -> int:
    """How many numbers differ by more than the roundings of a merge: of the product, of the sum and of a later conversion."""
    sizes = torch.stack([part.sizes for part in (one, other) if part.sizes is not None]).amax(0)[there]
    a, b = one.numbers[there], other.numbers[there]
    allowed = 2 * torch.finfo(_coarser(one.precision, other.precision)).eps * sizes
    return int(((a - b).abs() > allowed + _PRODUCT * sizes.amax()).sum()) if a.numel() else 0


def _coarser(one: str, other: str) -> torch.dtype:
    kinds: list[torch.dtype] = [getattr(torch, one), getattr(torch, other)]
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)
