"""The description of a training run in its checkpoints; a run resumes only from a checkpoint with an equal description."""

from __future__ import annotations

from typing import Any

from softhooks.backbone.container import is_prompt_key
from softhooks.errors import TrainerError
from softhooks.prompt import SoftPrompt


def describe(prompt: SoftPrompt, optimizer: str | None) -> dict[str, Any]:
    """Describe the prompt, its base and its optimizer; an unknown entry is None or empty."""
    method, shared = prompt.method, prompt.prompted_model
    options = {k: v for k, v in method.options().items() if k not in method.init_options}
    names = [name for name, _ in prompt.named_parameters() if not is_prompt_key(name)]
    parameters = dict(prompt.model.named_parameters())
    return {
        "method": {"kind": method.kind, **options, **prompt.conventions},
        "share of the base that trains": ", ".join(names) or "none",
        "base model": None if shared.record is None else shared.record.fingerprint(parameters),
        "dropout of the base": "off (freeze_dropout)" if shared.freeze_dropout else "as the model has it",
        "tokens whose rows train": "none" if prompt.added is None else str(prompt.added.ids.tolist()),
        "optimizer": optimizer,
    }


def require_same_run(stored: dict[str, Any] | None, present: dict[str, Any]) -> None:
    """Check that a checkpoint's description equals this run's; entries that are unknown in either are not compared.

    Raises:
        TrainerError: an entry differs; the message names the first one.
    """
    for key, value in (stored or {}).items():
        if key in present and present[key] and value and present[key] != value:
            raise TrainerError(
                f"this run and the checkpoint differ in the {key}.",
                "Resume with the settings that wrote the checkpoint, or start a new run in another `output_dir`.",
                checkpoint=value,
                now=present[key],
            )
