"""Saving and loading of a prompted model inside a sentence-transformers model.

A checkpoint of the sentence model holds only the trained tensors of the inner model. To resume, the library loads a second model
from the checkpoint and uses its state dict: `TrainedTensors` replaces the inner model in it, and the hook `add_base` adds the
base from the model in training.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softhooks.errors import CheckpointError, UnsupportedModeError
from softhooks.integration_support import Patches
from softhooks.integration_support.checkpoints import LIVE, is_prompt_key, read_tensors, saver_of
from softhooks.integration_support.models import PromptedModel, route_direct_calls

logger = logging.getLogger(__name__)


@contextmanager
def own_save_pretrained(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Let a model save its own weights, although a callback has replaced its `save_pretrained`.

    Yields:
        the model's state dict without prompts.
    """
    with Patches() as patches:
        for name in ("save_pretrained", "_keys_to_ignore_on_save"):
            patches.delete(model, name)
        yield {name: tensor for name, tensor in model.state_dict().items() if not is_prompt_key(name)}


def refuse_checkpoint(folder: Path, remedy: str) -> None:
    """Refuse a Trainer's checkpoint in place of a saved model, because it does not contain the base.

    Raises:
        CheckpointError: the folder is a Trainer's checkpoint.
    """
    if (folder / LIVE).is_file():
        raise CheckpointError(
            f"{folder} is a Trainer's checkpoint, which holds only the prompt and not the base.", remedy
        )


class TrainedTensors(nn.Module):
    """A module with the trained tensors of a checkpoint in its state dict, under `model.`.

    Args:
        folder: a Trainer's checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.model = nn.Module()
        for name, tensor in read_tensors(folder / LIVE)[0].items():
            *parents, leaf = name.split(".")
            holder = self.model
            for parent in parents:
                if parent not in holder._modules:
                    holder.add_module(parent, nn.Module())
                holder = holder.get_submodule(parent)
            holder.register_buffer(leaf, tensor)


def add_base(model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    """Check, before a state dict is loaded, that it belongs to the prompt in training, and add the base to it.

    Raises:
        TrainerError: the state dict belongs to another prompt or base.
    """
    saver = saver_of(model)
    mine = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    base = {name for name in model.state_dict() if not is_prompt_key(name)}
    if not prefix or saver is None or base <= mine.keys():
        return
    checked = dict(mine)
    if saver.prompt.is_attached:
        saver.check(checked)
    for name in mine.keys() - checked.keys():  # the description in the checkpoint
        del state[prefix + name]
    for name, tensor in model.state_dict().items():
        state.setdefault(prefix + name, tensor)


# --- the module around it ---------------------------------------------------------------------------------------------

_WRAPPER = "_soft_prompt_wrapper"
_FLATTENS = "can_flatten_inputs"
_POOL = "start_multi_process_pool"


class ModuleWrapper:
    """Changes the module around a model while the model has a prompt, and restores it when the last prompt is removed.

    Args:
        module: the module, with the inner model as its `model`.
        kind: the new class of the module: a subclass of its class that saves and loads the prompt.
        prompted: the state of the model's prompts.
    """

    def __init__(self, module: Any, kind: type[Any], prompted: PromptedModel) -> None:
        self.module = module
        self.prompted = prompted
        # a module that was loaded with its prompt already has this class
        self._original_class = kind.__mro__[1] if type(module) is kind else type(module)
        self._others: list[tuple[nn.Parameter, bool]] = []
        route_direct_calls(prompted)
        if getattr(module, _FLATTENS, False):
            prompted.patches.set(module, _FLATTENS, False)
        prompted.patches.keep(prompted.model.register_load_state_dict_pre_hook(add_base))
        prompted.patches.keep(self)
        module.__dict__[_WRAPPER] = self
        module.__class__ = kind

    def freeze_others(self, model: nn.Module) -> None:
        """Freeze the other modules of the sentence model, and refuse multi-process pools."""
        if not isinstance(model.__dict__.get(_POOL), _NoPool):
            self.prompted.patches.set(model, _POOL, _NoPool())
        known = {id(parameter) for parameter in self.module.model.parameters()}
        known |= {id(parameter) for parameter, _ in self._others}
        for parameter in model.parameters():
            if id(parameter) not in known:
                self._others.append((parameter, parameter.requires_grad))
        for parameter, _ in self._others:
            parameter.requires_grad_(False)

    def remove(self) -> None:
        """Restore the module's class, and `requires_grad` of the other modules."""
        self.module.__class__ = self._original_class
        self.module.__dict__.pop(_WRAPPER, None)
        for parameter, flag in self._others:
            parameter.requires_grad_(flag)
        self._others.clear()


def wrapper_of(module: nn.Module) -> ModuleWrapper | None:
    """Return the wrapper of a module if its model has a prompt."""
    wrapper: ModuleWrapper | None = module.__dict__.get(_WRAPPER)
    return wrapper


class _NoPool:
    """Replaces `start_multi_process_pool`."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse to start a multi-process pool.

        Raises:
            UnsupportedModeError: always.
        """
        raise UnsupportedModeError(
            "a multi-process pool would encode without the prompt, which exists only in this process.",
            "Encode in this process, on one device, or load the saved model in your own processes.",
        )


def limit_text_length(module: Any, prompted: PromptedModel) -> None:
    """Lower `max_seq_length` until the last prompt is removed, so that text and slots fit into the model's positions."""
    slots = [prompt.layout.num_slots for prompt in prompted.prompts.values() if prompt.injection in ("slots", "shared")]
    limit, asked = prompted.structure.entry.positions.limit, module.max_seq_length
    if slots and limit is not None and asked is not None and asked + max(slots) > limit:
        prompted.patches.keep(_TextLength(module, asked))
        module.max_seq_length = limit - max(slots)
        logger.warning(
            "texts are truncated to %d tokens instead of %d while the prompt is attached: its %d slots need positions too",
            module.max_seq_length,
            asked,
            max(slots),
        )


class _TextLength:
    """The `max_seq_length` of a module before it was lowered."""

    def __init__(self, module: Any, length: int) -> None:
        self.module = module
        self.length = length

    def remove(self) -> None:
        """Restore the length; if two prompts lowered it, the original is the longer one."""
        self.module.max_seq_length = max(self.length, self.module.max_seq_length)
