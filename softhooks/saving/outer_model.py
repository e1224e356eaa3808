"""Save a model that contains a model with prompts, such as a wrapper or an encoder-decoder made of two models.

The `save_pretrained` of the outer model collects the tensors of all modules. A state dict hook on the container (the submodule
that holds the prompts) writes the prompts next to the outer model's weights, and removes their tensors from the weights.
"""

from __future__ import annotations

import logging
import sys
from itertools import islice
from pathlib import Path
from traceback import walk_stack
from typing import Any

from torch import nn

from softhooks.compat.sharding import is_sharded_model
from softhooks.formats.find import is_checkpoint
from softhooks.prompt import SoftPrompt, soft_prompts_of
from softhooks.runtime.prompted_model import PromptedModel

logger = logging.getLogger(__name__)

_MAX_FRAMES = 64
"""The number of stack frames that are searched for `save_pretrained`: one for each nested module, and a few more."""


def prompt_folders(prompted: PromptedModel, folder: Path) -> dict[SoftPrompt, Path]:
    """Map each prompt to the folder to save it in: one prompt to `folder` itself, the others to subfolders.

    `folder` gets the prompt named `default`. If no prompt has this name, it gets the active prompt or, if none is active, the
    prompt that was attached last.
    """
    prompts = soft_prompts_of(prompted)
    top = "default" if "default" in prompts else prompted.active or next(reversed(prompts))
    return {prompt: folder if name == top else folder / name for name, prompt in prompts.items()}


class SaveFromOutside:
    """A state dict hook on the container that writes the prompts of an inner model when an outer model is saved."""

    def __init__(self, prompted: PromptedModel) -> None:
        self.prompted = prompted
        self._has_logged = False

    def __call__(self, _container: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """Write the prompts, and remove their tensors from the state dict.

        The tensors stay in the state dict in two cases: in a Trainer's checkpoint, because training resumes from them, and if the
        model is sharded, because a single process cannot write its prompts. Disabled prompts are not written,
        but their tensors are removed.
        """
        call = None if prefix.count(".") < 2 else _saving_call(self.prompted.model)
        if call is None or not self.prompted.prompts:
            return
        folder, writes = Path(call["save_directory"]), call.get("is_main_process", True)
        disabled = self.prompted.disabled
        folders = {} if disabled or is_sharded_model(self.prompted.model) else prompt_folders(self.prompted, folder)
        for prompt, own in folders.items() if writes else ():
            prompt.save_pretrained(own)
        keeps_tensors = not disabled and (is_checkpoint(folder) or not folders)
        for name in [name for name in state if name.startswith(prefix) and not keeps_tensors]:
            del state[name]
        if writes and not disabled and not self._has_logged:
            self._has_logged = True
            self._log(type(call["self"]).__name__, folders, keeps_tensors)

    def _log(self, outer: str, folders: dict[SoftPrompt, Path], keeps_tensors: bool) -> None:
        inner = type(self.prompted.model).__name__
        if not folders:
            logger.warning(
                "save_pretrained of the sharded %s writes the tensors of its inner %s's prompts among its weights, but "
                "`from_pretrained` drops them. Save each prompt with `prompt.save_pretrained(directory)`, on every rank.",
                outer, inner,
            )  # fmt: skip
            return
        logger.warning(
            "save_pretrained of %s writes the prompts of its inner %s next to its weights (%s); load them with `softhooks.load` "
            "onto the inner %s.%s",
            outer, inner, ", ".join(f"{prompt.name!r} to {folder}" for prompt, folder in folders.items()), inner,
            " The weights also contain the prompts' tensors, from which the Trainer resumes." if keeps_tensors else "",
        )  # fmt: skip


def _saving_call(inner: nn.Module) -> dict[str, Any] | None:
    """Return the arguments of the running `save_pretrained` of a model that contains `inner`, or None if there is none."""
    frames = islice(walk_stack(sys._getframe(1)), _MAX_FRAMES)
    call: dict[str, Any] = next((f.f_locals for f, _ in frames if f.f_code.co_name == "save_pretrained"), {})
    outer = call.get("self")
    contains = isinstance(outer, nn.Module) and outer is not inner and any(one is inner for one in outer.modules())
    return dict(call) if contains and "save_directory" in call else None
