"""The state that a copy or a pickle of a prompted model gets: everything except the state of a forward or a `with` block.

Hooks, marks and prompts are copied with the model, for they are objects on it. What is wrapped once for the whole process is not:
it is wrapped for a copy too when the copy comes to life.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

from softhooks.backbone.attention_interface import open_interface
from softhooks.runtime.training_loop import watch_steps

if TYPE_CHECKING:
    from softhooks.runtime.prompted_model import PromptedModel


def state_of(own: dict[str, Any]) -> dict[str, Any]:
    """The state of a prompted model as a copy has it: nothing runs on it, and the first model's `with` blocks are not its own."""
    return {**own, "_stays": []}


def reopen(prompted: PromptedModel, files: Iterable[str]) -> None:
    """Wrap the attention functions for a prompted model that was copied or unpickled.

    Its model may be half made at this moment, so it is known by the names of its files. They are imported, for in another
    process they may come after this.
    """
    for name in files:
        with suppress(ImportError):
            import_module(name)
    open_interface(prompted, files)
    watch_steps(prompted)
