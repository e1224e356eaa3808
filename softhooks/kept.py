"""`softhooks.kept`: compute prompts only once for many forwards between which the base does not change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from softhooks.inject.reuse import new_scope
from softhooks.runtime.prompted_model import require_prompted_model


@contextmanager
def kept(model: nn.Module) -> Iterator[nn.Module]:
    """Compute each prompt once for all forwards inside the context, as a call of `generate` does by itself.

    Otherwise every forward computes its prompt again, because anything may have changed since the last one. Use this around a
    loop of forwards without gradients: an evaluation, or decoding by hand with `past_key_values`. Use it also around the training
    of a cartridge, whose document is then read once.

    The caller promises that nothing in the base changes inside: no weight through `.data`, no hook, no attribute of a module, no
    replaced module, no setting of the config. Some changes are noticed all the same: the prompt's own parameters are compared by
    value, so that training steps inside are safe, and the base's tensors by address and version. Forwards that build a graph for
    the prompt always compute it again.

    It applies to the thread or task that enters it and to tasks started inside, and ends with the `with` block.

    Args:
        model: a model with a prompt.

    Raises:
        NotAttachedError: the model has no prompt.
    """
    with new_scope(require_prompted_model(model).model, is_explicit=True):
        yield model
