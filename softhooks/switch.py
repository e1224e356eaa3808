"""Select the prompts that a model uses, and compute prompts once for many forward passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager

from torch import nn

from softhooks.errors import OptionError
from softhooks.inject.reuse import new_scope
from softhooks.prompt import SoftPrompt, soft_prompts_of
from softhooks.runtime.prompted_model import require_prompted_model
from softhooks.runtime.with_blocks import Block


def activate(model: nn.Module, name: str) -> SoftPrompt:
    """Activate one prompt of a model and deactivate all others, in every thread.

    Forwards and `generate` calls that are running in other threads continue with the prompt that was active when they began.

    An inactive prompt keeps its gradients until `zero_grad`, so one optimizer step can train several prompts.

    Raises:
        NotAttachedError: the model has no prompt with this name.
        OptionError: `name` is not a string.
    """
    if not isinstance(name, str):
        raise OptionError(
            f"the name given to `activate` is {name!r}; it must be a string, the name of one prompt.",
            "To use a different prompt for each row, call `softhooks.rows(model, names)`; to combine the outputs of several "
            "prompts, `softhooks.PromptEnsemble(model, names)`; to run the model without a prompt, `softhooks.disabled(model)`.",
            attached=", ".join(map(repr, require_prompted_model(model).prompts)),
        )
    prompted = require_prompted_model(model, name)
    with prompted.running.block("`activate`"):
        require_prompted_model(model, name)  # another thread may have removed it meanwhile
        prompted.active = name
        return soft_prompts_of(prompted)[name]


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model without prompts and with its own heads inside the context, in this thread or asyncio task.

    Raises:
        NotAttachedError: the model has no prompt.
    """
    prompted = require_prompted_model(model)
    try:
        with Block(prompted.model, off=True):
            prompted.show_labels()
            yield model
    finally:
        prompted.show_labels()


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Choose a prompt for each row of the batches that run inside the context, in `forward` and `generate`.

    The choice applies to this thread or asyncio task, and to tasks started inside the context.

    Args:
        names: for each row, the name of its prompt, or None to use no prompt. In `generate`, all beams and returned sequences of
            a row use its prompt.

    Raises:
        NotAttachedError: one of the names is not the name of an attached prompt.
        OptionError: `names` is empty, or contains anything other than strings and None.
    """
    is_list = isinstance(names, Iterable) and not isinstance(names, (str, bytes, Mapping, Set))
    listed = list(names) if is_list else []
    if not listed or not all(name is None or isinstance(name, str) for name in listed):
        raise OptionError(
            f"the names given to `rows` are {names!r}; they must be a list with one entry for each row: the name of a prompt, or "
            "None to use no prompt."
        )
    for name in dict.fromkeys(listed):
        require_prompted_model(model, name)
    with Block(require_prompted_model(model).model, rows=listed):
        yield model


@contextmanager
def kept(model: nn.Module) -> Iterator[nn.Module]:
    """Compute each prompt only once for all forward passes inside the context, as `generate` does for its own forward passes.

    Outside the context, every forward pass computes the prompt. Use `kept` for forward passes without gradients, such as an
    evaluation or your own decoding loop with `past_key_values`. Also use it to train a cartridge: the model then reads the
    cartridge's document only once. Forward passes that compute gradients for the prompt always recompute it.

    Inside the context, do not change the base model (its config, weights, hooks, modules or their attributes), because not every
    change is detected. Training steps on the prompt are allowed.

    The context applies to this thread or asyncio task, and to tasks started inside it.

    Args:
        model: a model with a prompt.

    Raises:
        NotAttachedError: the model has no prompt.
    """
    with new_scope(require_prompted_model(model).model, is_explicit=True):
        yield model
