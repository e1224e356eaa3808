"""The prompt that is exported for a server: the only active one."""

from __future__ import annotations

from torch import nn

from softhooks.errors import OptionError
from softhooks.prompt import SoftPrompt, soft_prompts_of
from softhooks.runtime.prompted_model import require_prompted_model


def active_prompt(model: nn.Module) -> SoftPrompt:
    """Return the active prompt of a model.

    Raises:
        NotAttachedError: the model has no prompt.
        OptionError: there is not exactly one active prompt.
    """
    prompted = require_prompted_model(model)
    if prompted.rows is not None or prompted.active is None or prompted.disabled:
        names = list(prompted.names)
        raise OptionError(
            f"the active prompts are {names!r}{' (disabled)' if prompted.disabled else ''}; exactly one prompt must be active."
        )
    return soft_prompts_of(prompted)[prompted.active]
