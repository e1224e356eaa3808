"""Check that a model is the base model that a prompt was trained with, by comparing two fingerprints."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

from torch import nn

from softhooks.backbone.stack import ModelStructure
from softhooks.base_model.cached_commits import cached_commits
from softhooks.base_model.compare import Finding, compare, lowered
from softhooks.base_model.info import BaseModelInfo
from softhooks.base_model.take_fingerprint import take_fingerprint
from softhooks.compat.peft import unwrapped
from softhooks.errors import PromptMismatchError

_FINDINGS: dict[Finding, str] = {
    "merged": "the model looks like the prompt's base model with merged adapters (or with weights that were quantized and "
    "dequantized): embeddings, norms and biases are equal, but matrices differ",
    "adapters": "the model is the prompt's base model, but with different active adapters (LoRA) or without any",
    "resized": "the model looks like the prompt's base model with resized embeddings: only the vocabulary differs",
    "tuned": "the model looks like a fine-tuned variant of the prompt's base model: its weights are close, but not equal",
    "another": "the model is not the base model that the prompt was trained with: its weights are different",
}
_REMEDIES: dict[Finding, str] = {
    "merged": "Load the prompt onto its base model with the adapters that were active in training and no others (plain LoRA may "
    "be merged);",
    "adapters": "First load the adapters that were active in training, and disable any others (plain LoRA may be merged);",
    "resized": "Resize the embeddings as in training (`resize_token_embeddings`);",
    "tuned": "Load the prompt onto the base model that it was trained with, at the same revision;",
    "another": "Load the prompt onto the base model that it was trained with;",
}
_QUANTIZED = (
    "{source}: the model looks like the prompt's base model with a different quantization ({before} in training, now "
    "{after}). Its outputs with this prompt will be close to those in training, but not equal."
)
_CONVERTED = (
    "{source}: the model looks like the prompt's base model, converted to {precision} and back. Its outputs with this "
    "prompt will be close to those in training, but not equal."
)
_COMMIT = re.compile(r"[0-9a-f]{7,40}")

OVERRIDE = (
    "or pass `strict=False` to `load` (`--no-strict` on a command line) to use the prompt with this model anyway, and check "
    "the outputs"
)


def require_base(
    base: BaseModelInfo,
    model: nn.Module,
    structure: ModelStructure,
    source: str,
    *,
    has_adapters: bool = False,
    override: str = OVERRIDE,
) -> None:
    """Check that a model is the base model that a prompt was trained with; without a fingerprint, compare only revisions.

    Args:
        base: the base model that the prompt was trained with.
        source: the prompt's name, for error messages.
        has_adapters: whether adapters were trained with the prompt; its file does not contain them.
        override: how to skip the check; appended to error messages.
    """
    found = BaseModelInfo.of(model, structure)
    if base.fingerprint is None:
        _require_revision(base, model, found, source, override)
        return
    fingerprint = take_fingerprint(model, structure, like=base.fingerprint)
    finding = compare(base.fingerprint, fingerprint, adapters=not has_adapters)
    if finding == "same":
        return
    if finding == "quantized":
        before, after = base.quantization or "none", found.quantization or "none"
        warnings.warn(_QUANTIZED.format(source=source, before=before, after=after), UserWarning, stacklevel=2)
        return
    if finding == "converted":
        precision = lowered(fingerprint)[1]
        warnings.warn(_CONVERTED.format(source=source, precision=precision), UserWarning, stacklevel=2)
        return
    raise PromptMismatchError(
        f"{_FINDINGS[finding]}.",
        f"{_REMEDIES[finding]} {override}.",
        trained_with=base,
        model=replace(found, fingerprint=take_fingerprint(model, structure)),
        prompt=source,
    )


def _require_revision(base: BaseModelInfo, model: nn.Module, found: BaseModelInfo, source: str, override: str) -> None:
    """Compare Hub commits, but not the names of branches and tags, because a branch or tag may move."""
    then, now = base.revision or "", found.revision or ""
    if not _COMMIT.fullmatch(then) or not now or base.name_or_path != found.name_or_path or now.startswith(then):
        return
    if any(commit.startswith(then) for commit in cached_commits(unwrapped(model), found.name_or_path)):
        return  # several commits have the same weights
    raise PromptMismatchError(
        "the model's revision is not the one that the prompt was trained with.",
        f"Load the model with `revision={then!r}`; {override}.",
        trained_with=base,
        model=found,
        prompt=source,
    )
