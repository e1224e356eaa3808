"""Check that saved prompts belong to one base model, by comparing what their files say about its weights."""

from __future__ import annotations

from softhooks.base_model.compare import FOUND, Finding, compare
from softhooks.errors import CheckpointError, PromptMismatchError
from softhooks.formats.stored import StoredPrompt, on_one_line

_SAME_BASE: tuple[Finding, ...] = ("same", "quantized", "converted")
"""The findings with which `softhooks.load` also accepts a base model."""


def require_fingerprint(stored: StoredPrompt) -> None:
    """Raise a `CheckpointError` if a prompt's file does not describe the weights of its base model."""
    if stored.base.fingerprint is None:
        raise CheckpointError(
            "the prompt's file does not describe the weights of its base model (PEFT's files never do), so the prompt cannot be "
            "checked against a model.",
            "Load the prompt onto its base model, and add it from there: `store.add(softhooks.load(model, path), name)`.",
            prompt=stored.source,
        )


def require_same_base(present: tuple[str, StoredPrompt], new: tuple[str, StoredPrompt]) -> None:
    """Raise a `PromptMismatchError` if two prompts have different base models."""
    difference = _difference(present[1], new[1])
    if difference is not None:
        raise PromptMismatchError(
            f"the prompts in the store belong to another base model than {new[0]!r}: {difference}.",
            "Use one store for each base model.",
            store=f"{present[0]!r}, for {present[1].base}",
            prompt=f"{new[1].source}, for {new[1].base}",
        )


def _difference(one: StoredPrompt, other: StoredPrompt) -> str | None:
    """Describe how the base models of two prompts differ; return None if they are the same."""
    if one.stacks != other.stacks:
        return f"their layers differ ({on_one_line(one.stacks)}; {on_one_line(other.stacks)})"
    then, now = one.base.fingerprint, other.base.fingerprint
    finding: Finding = "another" if then is None or now is None else compare(then, now)
    return None if finding in _SAME_BASE else FOUND[finding]
