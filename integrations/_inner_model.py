"""A model with a prompt inside another model that saves and loads it, as in a sentence-transformers model.

The outer model's checkpoint holds what was trained of the inner one, and nothing else of it. The outer model resumes by loading a
second model from the checkpoint and taking its state dict: `Trained` stands in for the inner model there, and `complete` adds
what the checkpoint leaves out, from the model in training itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from softhooks.errors import CheckpointError, UnsupportedModeError
from softhooks.integration_support.checkpoints import LIVE, is_prompt_key, read_tensors, saver_of
from softhooks.integration_support.models import PromptedModel, route_direct_calls

logger = logging.getLogger(__name__)


@contextmanager
def saving_itself(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Let a model save its own weights, also while a callback saves the prompt in their place.

    Yields:
        its state dict without any prompt's parameters.
    """
    names = ("save_pretrained", "_keys_to_ignore_on_save")
    kept = {name: model.__dict__.pop(name) for name in names if name in model.__dict__}
    try:
        yield {name: tensor for name, tensor in model.state_dict().items() if not is_prompt_key(name)}
    finally:
        model.__dict__.update(kept)


def refuse_bare(folder: Path, remedy: str) -> None:
    """Refuse a Trainer's checkpoint where a whole model is wanted: the base is not in it.

    Raises:
        CheckpointError: naming the folder.
    """
    if (folder / LIVE).is_file():
        rule = "a Trainer's checkpoint holds the prompt alone; its base is not in it."
        raise CheckpointError(rule, remedy, folder=folder)


class Trained(nn.Module):
    """Stands in for a module whose `model` is the inner one: its state dict is what was trained, and nothing else.

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


def complete(model: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    """Check a checkpoint's state against the prompt in training, and add the base to it; a hook before a state dict is loaded.

    Raises:
        TrainerError: it is of another prompt, or of another base.
    """
    saver = saver_of(model)
    mine = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    base = {name for name in model.state_dict() if not is_prompt_key(name)}
    if not prefix or saver is None or base <= mine.keys():
        return
    checked = dict(mine)
    if saver.prompt.is_attached:
        saver.check(checked)
    for name in mine.keys() - checked.keys():  # the checkpoint's description
        del state[prefix + name]
    for name, tensor in model.state_dict().items():
        state.setdefault(prefix + name, tensor)


# --- the module around it ---------------------------------------------------------------------------------------------

_DRESS = "_soft_prompt_dress"
_FLATTENS = "can_flatten_inputs"
_POOL = "start_multi_process_pool"


class Dress:
    """What the module around a model wears while the model carries a prompt; until its last prompt is removed.

    Args:
        module: the module, whose `model` is the inner one.
        kind: its class meanwhile: a subclass of its own that saves and loads the prompt.
        prompted: the state of the model's prompts.
    """

    def __init__(self, module: Any, kind: type[Any], prompted: PromptedModel) -> None:
        self.module = module
        self.prompted = prompted
        self.plain = (
            type(module) if type(module) is not kind else kind.__mro__[1]
        )  # a loaded one is of the kind already
        self.covered: list[tuple[nn.Parameter, bool]] = []
        route_direct_calls(prompted)
        if getattr(module, _FLATTENS, False):
            prompted.patches.set(module, _FLATTENS, False)
        prompted.patches.keep(prompted.model.register_load_state_dict_pre_hook(complete))
        prompted.patches.keep(self)
        module.__dict__[_DRESS] = self
        module.__class__ = kind

    def cover(self, model: nn.Module) -> None:
        """Freeze what else the outer model has, and keep it to one process."""
        if not isinstance(model.__dict__.get(_POOL), _NoPool):
            self.prompted.patches.set(model, _POOL, _NoPool())
        known = {id(parameter) for parameter in self.module.model.parameters()}
        known |= {id(parameter) for parameter, _ in self.covered}
        for parameter in model.parameters():
            if id(parameter) not in known:
                self.covered.append((parameter, parameter.requires_grad))
        for parameter, _ in self.covered:
            parameter.requires_grad_(False)

    def remove(self) -> None:
        """Give the module its class back, and the rest of the outer model its flags."""
        self.module.__class__ = self.plain
        self.module.__dict__.pop(_DRESS, None)
        for parameter, flag in self.covered:
            parameter.requires_grad_(flag)
        self.covered.clear()


def dress_of(module: nn.Module) -> Dress | None:
    """What a module wears, if its model carries a prompt."""
    worn: Dress | None = module.__dict__.get(_DRESS)
    return worn


class _NoPool:
    """Stands in for `start_multi_process_pool`."""

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse.

        Raises:
            UnsupportedModeError: always.
        """
        raise UnsupportedModeError(
            "a prompt lives in the process that it was attached in; a pool would start others without it.",
            "Encode here, on one device, or load the saved model in processes of your own.",
            asked="a multi-process pool",
        )


def leave_room(module: Any, prompted: PromptedModel) -> None:
    """Cut texts so much earlier (`max_seq_length`) that slots fit among the positions beside them, until the last prompt goes."""
    slots = [prompt.layout.columns for prompt in prompted.prompts.values() if prompt.injection in ("slots", "shared")]
    limit, asked = prompted.structure.entry.positions.limit, module.max_seq_length
    if slots and limit is not None and asked is not None and asked + max(slots) > limit:
        prompted.patches.keep(_Longer(module, asked))
        module.max_seq_length = limit - max(slots)
        logger.warning(
            "texts are cut after %d tokens, not %d, as long as the prompt is on: its %d slots need positions too",
            module.max_seq_length,
            asked,
            max(slots),
        )


class _Longer:
    """Lets texts be as long as they were again, with the last prompt."""

    def __init__(self, module: Any, length: int) -> None:
        self.module = module
        self.length = length

    def remove(self) -> None:
        """Put the length back; of two prompts' lengths the longer was there first."""
        self.module.max_seq_length = max(self.length, self.module.max_seq_length)
