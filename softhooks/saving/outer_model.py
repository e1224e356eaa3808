"""What `save_pretrained` of a model writes that has a model with prompts inside: the prompts too, and no stray tensors of them.

The model outside carries no prompt and knows of none; its `save_pretrained` asks its modules for their tensors. The container of
the prompts is asked as well, and learns from the call that asks whose tensors are written, and where to.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from softhooks.compat.sharding import shards

if TYPE_CHECKING:
    from softhooks.runtime.prompted_model import PromptedModel

logger = logging.getLogger(__name__)

_CALLS_UP = 64
"""How many calls up a `save_pretrained` is looked for: one for each module on the way down, and a few."""


class SaveFromOutside:
    """A hook on the container's state dict: writes the prompts where a model around theirs is saved.

    Args:
        prompted: the state of the model's prompts.
    """

    def __init__(self, prompted: PromptedModel) -> None:
        self.prompted = prompted
        self._said = False

    def __call__(self, _container: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """Write the prompts beside the outer model's weights, and take their tensors out of these.

        A Trainer resumes from the weights in its checkpoints, so there they stay. So they do in a sharded model, in which a
        prompt cannot be written by one process alone. With the prompts turned off, the model is written without them.
        """
        call = None if prefix.count(".") < 2 else _saving_call(self.prompted.model)
        if call is None or not self.prompted.prompts:
            return
        from softhooks.saving.model import SavePrompts, is_checkpoint

        folder, writes = Path(call["save_directory"]), call.get("is_main_process", True)
        off = self.prompted.disabled
        places = {} if off or shards(self.prompted.model) else SavePrompts(self.prompted).places(folder)
        for prompt, place in places.items() if writes else ():
            prompt.save_pretrained(place)
        stays = not off and (is_checkpoint(folder) or not places)
        for name in [name for name in state if name.startswith(prefix) and not stays]:
            del state[name]
        if writes and not off and not self._said:
            self._said = True
            self._say(type(call["self"]).__name__, places, stays, folder)

    def _say(self, outer: str, places: dict[Any, Path], stays: bool, folder: Path) -> None:
        inner = type(self.prompted.model).__name__
        found = ", ".join(f"{prompt.name!r} to {place}" for prompt, place in places.items())
        if not places:
            logger.warning(
                "save_pretrained of a sharded %s writes the tensors of the prompts of the %s inside among its weights; "
                "`from_pretrained` drops them. Save each prompt with `prompt.save_pretrained(directory)`, on every rank.",
                outer, inner,
            )  # fmt: skip
            return
        logger.warning(
            "save_pretrained of %s writes the prompts of the %s inside beside its weights (%s): load them with `softhooks.load`, "
            "onto the %s inside.%s",
            outer, inner, found, inner,
            " The weights hold their tensors too, from which a Trainer resumes." if stays else "",
        )  # fmt: skip


def _saving_call(inner: nn.Module) -> dict[str, Any] | None:
    """The arguments of the `save_pretrained` of a model around another one that is under way in this thread, if one is."""
    frame: Any = sys._getframe(1)
    for _ in range(_CALLS_UP):
        if frame is None:
            return None
        if frame.f_code.co_name == "save_pretrained":
            found: dict[str, Any] = frame.f_locals
            outer = found.get("self")
            around = (
                isinstance(outer, nn.Module) and outer is not inner and any(one is inner for one in outer.modules())
            )
            return dict(found) if around and "save_directory" in found else None
        frame = frame.f_back
    return None
