"""Whether a prompt is about to enter the base model that it was trained with: two fingerprints compared, and what to say."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from softhooks.anatomy import Anatomy
from softhooks.errors import CheckpointError, PromptMismatchError, explain
from softhooks.fingerprint import PACKED, Fingerprint, Group, Part, take
from softhooks.probe import unwrapped

if TYPE_CHECKING:
    from softhooks.saving.stored import Stored

Finding = Literal["same", "quantized", "converted", "merged", "resized", "tuned", "another"]

_SAME: tuple[Finding, ...] = ("same", "quantized")

_LIKENESS = 0.7
"""The least cosine between the numbers of a model and of a variant of it; those of two trainings apart have none."""

_AT_TIES = 0.125
"""The share of numbers that may round to a neighbour after two conversions of precision."""

_PRODUCT = 1e-6
"""How exact the product of LoRA's matrices is, in parts of the largest number."""

_SENTENCES: dict[Finding, str] = {
    "merged": "it looks like the same model with merged adapters (or weights quantized and written back): its embeddings and "
    "norms are the same, its matrices are not",
    "resized": "it looks like the same model with resized embeddings: the rows that both have are the same",
    "tuned": "it looks like a fine-tuned variant of the same model: its weights are near, and not the same",
    "another": "its weights are others",
}
_REMEDIES: dict[Finding, str] = {
    "merged": "Load it onto the base with the adapters that it was trained with, and no others; plain LoRA may be merged or not;",
    "resized": "Resize the embeddings as in training (`resize_token_embeddings`);",
    "tuned": "Load it onto the base that it was trained with, in the same revision;",
    "another": "Load it onto the base that it was trained with;",
}
_QUANTIZED = (
    "{source}: the base looks like the same model under another quantization ({then}, now {now}). The answers with this prompt "
    "will be near those in training, and not the same."
)
_CONVERTED = (
    "{source}: the base looks like the same model whose weights were converted to {kind} and back. The answers with this prompt "
    "will be near those in training, and not the same."
)
_SHA = re.compile(r"[0-9a-f]{7,40}")


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


# --- what is stored ---------------------------------------------------------------------------------------------------


def about_base(model: nn.Module) -> dict[str, Any]:
    """What else names a base model: its class, its name, the revision on the hub, how it is quantized."""
    plain = unwrapped(model)
    config: Any = getattr(plain, "config", None)
    facts = {
        "class": type(plain).__name__,
        "name_or_path": str(getattr(config, "_name_or_path", "") or ""),
        "revision": str(getattr(config, "_commit_hash", None) or "") or None,
        "quantization": _quantization(config),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _quantization(config: Any) -> str | None:
    """The quantizer's method and its width, as far as they are told."""
    told = getattr(config, "quantization_config", None)
    if told is None:
        return None
    values = told if isinstance(told, dict) else vars(told)
    method = values.get("quant_method")
    words = [str(getattr(method, "value", method) or type(told).__name__)]
    words += [name for name in ("load_in_4bit", "load_in_8bit") if values.get(name) or values.get(f"_{name}")]
    words += [f"{values['bits']} bits"] if values.get("bits") else []
    return " ".join(dict.fromkeys(words))


def fingerprint_of(base: dict[str, Any], source: str) -> Fingerprint | None:
    """The fingerprint that a file holds, if it has one.

    Raises:
        CheckpointError: it is not of that form.
    """
    told = base.get("fingerprint")
    if told is None:
        return None
    try:
        return Fingerprint.from_json(told)
    except ValueError as error:
        raise CheckpointError(f"{source} must hold the fingerprint of its base; it does not: {error}.") from error


def known_by(base: dict[str, Any], source: str) -> dict[str, str | None]:
    """The revision of a stored base on the hub, and its fingerprint in short; None where they are not known."""
    revision, known = base.get("revision"), fingerprint_of(base, source)
    return {"revision": revision if isinstance(revision, str) else None, "digest": known.digest if known else None}


# --- compare ----------------------------------------------------------------------------------------------------------


_OVERRIDE = (
    "or pass `strict=False` to `load` (`--no-strict` on a command line) to use it here all the same, and check "
    "what it answers"
)


def require_base(
    stored: Stored, model: nn.Module, anatomy: Anatomy, *, strict: bool = True, override: str = _OVERRIDE
) -> None:
    """Compare the base that a prompt was trained with and a model; what is not known is not compared.

    Args:
        strict: compare at all.
        override: what else can be done, in words.

    Raises:
        PromptMismatchError: they differ. The error names both.
    """
    if not strict:
        return
    about = about_base(model)
    then = fingerprint_of(stored.base, stored.source)
    if then is None:
        _require_revision(stored, about, override)
        return
    now = take(model, anatomy, like=then)
    finding = compare(then, now)
    if finding == "same":
        return
    if finding == "quantized":
        said = stored.base.get("quantization") or "none", about.get("quantization") or "none"
        warnings.warn(_QUANTIZED.format(source=stored.source, then=said[0], now=said[1]), UserWarning, stacklevel=2)
        return
    if finding == "converted":
        warnings.warn(_CONVERTED.format(source=stored.source, kind=_lowered(now)[1]), UserWarning, stacklevel=2)
        return
    raise PromptMismatchError(
        explain(
            f"a prompt must enter the base model that it was trained with; {_SENTENCES[finding]}.",
            f"{_REMEDIES[finding]} {override}.",
            trained_with=_named(stored.base, then),
            model=_named(about, take(model, anatomy)),
            prompt=stored.source,
        )
    )


def _named(base: dict[str, Any], known: Fingerprint | None = None) -> str:
    """A base in words: class, name, revision, digest, size of the vocabulary."""
    words = [str(base.get("class") or "a model"), str(base.get("name_or_path") or "without a name")]
    facts = [f"revision {base['revision']}"] if base.get("revision") else []
    facts += [f"digest {known.digest}, {known.vocabulary} rows of embeddings"] if known else []
    return " ".join(words) + (f" ({', '.join(facts)})" if facts else "")


def _require_revision(stored: Stored, about: dict[str, Any], override: str) -> None:
    """Compare revisions on the hub, where nothing else is known; names of branches and tags say nothing."""
    then, now = stored.base.get("revision"), str(about.get("revision") or "")
    if not isinstance(then, str) or not _SHA.fullmatch(then) or not now or stored.base_name != about["name_or_path"]:
        return
    if now.startswith(then):
        return
    raise PromptMismatchError(
        explain(
            "a prompt must enter the revision of its base model that it was trained with.",
            f"Load the model with `revision={then!r}`; {override}.",
            trained_with=_named(stored.base),
            model=_named(about),
            prompt=stored.source,
        )
    )


def compare(then: Fingerprint, now: Fingerprint) -> Finding:
    """Tell whether two fingerprints are of one base model, and if not, what the difference looks like.

    A base with LoRA is the same model as the one that LoRA has been merged into.
    """
    found = _compare(then, now)
    if found not in _SAME and _compare(then, _lowered(now)[0]) == "same":
        return "converted"  # in this direction alone: small steps of training round to where they began
    if found != "merged":
        return found
    others = [(then.with_merged(), now)] if then.merged else []
    others += [(then, now.with_merged()), (then, now.with_unmerged())] if now.merged else []
    return next((same for same in (_compare(one, other) for one, other in others) if same in _SAME), found)


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


def _lowered(known: Fingerprint) -> tuple[Fingerprint, str]:
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
    """How many numbers differ, and how many are neighbours in the coarser of two precisions.

    In one precision every difference counts. A conversion rounds, two of them may round to a neighbour, and fp16 knows no
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
