"""The description of a training run that its checkpoints hold; a run resumes only if it is the same."""

from __future__ import annotations

from typing import Any

from softhooks.backbone.container import is_prompt_key
from softhooks.errors import TrainerError
from softhooks.prompt import SoftPrompt


def describe(prompt: SoftPrompt, optimizer: str | None) -> dict[str, Any]:
    """Describe the prompt, its base and its optimizer; None or an empty value where something is not known."""
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
    """Compare a checkpoint's description with that of this run; what one of them does not know is not compared.

    Raises:
        TrainerError: naming the first entry that differs.
    """
    for key, value in (stored or {}).items():
        if key in present and present[key] and value and present[key] != value:
            raise TrainerError(
                f"the checkpoint was written with another {key} than this run has.",
                "Resume with what wrote the checkpoint, or start a new run in another `output_dir`.",
                checkpoint=value,
                now=present[key],
            )
