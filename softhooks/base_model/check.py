"""Whether a prompt is about to enter the base model that it was trained with: two fingerprints compared, and what to say."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from softhooks.backbone.stack import ModelStructure
from softhooks.base_model.compare import Finding, compare, lowered
from softhooks.base_model.fingerprint import Fingerprint, take
from softhooks.compat.peft import unwrapped
from softhooks.errors import CheckpointError, PromptMismatchError

if TYPE_CHECKING:
    from softhooks.formats.stored import Stored

_SENTENCES: dict[Finding, str] = {
    "merged": "it looks like the same model with merged adapters (or weights quantized and written back): its embeddings and "
    "norms are the same, its matrices are not",
    "adapters": "it is the same model, and other adapters (LoRA) are on, or none",
    "resized": "it looks like the same model with resized embeddings: the rows that both have are the same",
    "tuned": "it looks like a fine-tuned variant of the same model: its weights are near, and not the same",
    "another": "its weights are others",
}
_REMEDIES: dict[Finding, str] = {
    "merged": "Load it onto the base with the adapters that it was trained with, and no others; plain LoRA may be merged or not;",
    "adapters": "Load the adapters that it was trained with first, and turn off others; plain LoRA may also be merged;",
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


# --- check ------------------------------------------------------------------------------------------------------------


_OVERRIDE = (
    "or pass `strict=False` to `load` (`--no-strict` on a command line) to use it here all the same, and check "
    "what it answers"
)


def require_base(
    stored: Stored, model: nn.Module, structure: ModelStructure, *, strict: bool = True, override: str = _OVERRIDE
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
    now = take(model, structure, like=then)
    finding = compare(then, now, adapters=not any("lora_" in name for name in stored.also_trained))
    if finding == "same":
        return
    if finding == "quantized":
        said = stored.base.get("quantization") or "none", about.get("quantization") or "none"
        warnings.warn(_QUANTIZED.format(source=stored.source, then=said[0], now=said[1]), UserWarning, stacklevel=2)
        return
    if finding == "converted":
        warnings.warn(_CONVERTED.format(source=stored.source, kind=lowered(now)[1]), UserWarning, stacklevel=2)
        return
    raise PromptMismatchError(
        f"a prompt must enter the base model that it was trained with; {_SENTENCES[finding]}.",
        f"{_REMEDIES[finding]} {override}.",
        trained_with=_named(stored.base, then),
        model=_named(about, take(model, structure)),
        prompt=stored.source,
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
        "a prompt must enter the revision of its base model that it was trained with.",
        f"Load the model with `revision={then!r}`; {override}.",
        trained_with=_named(stored.base),
        model=_named(about),
        prompt=stored.source,
    )
