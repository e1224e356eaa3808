"""`softhooks.kept`: the caller's promise that nothing changes, under which a prompt is computed once for many forwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from softhooks.inject.reuse import new_scope
from softhooks.runtime.prompted_model import require_prompted_model


@contextmanager
def kept(model: nn.Module) -> Iterator[nn.Module]:
    """Compute each prompt once for all forwards inside, as one call of `generate` does by itself.

    Without it every forward computes its prompt afresh, which is right whatever has changed since the last one. Use it around a
    loop of forwards without gradients: an evaluation, or decoding by hand with `past_key_values`; and around the training of a
    cartridge, whose document is then read once.

    The caller promises that nothing of the base changes inside: no weight through `.data`, no hook, no attribute of a module,
    no module that is swapped, no setting of the config. Some changes are seen all the same: the prompt's own parameters are
    compared by value, so a step of training inside is safe, and the base's tensors by where they lie and by their version.
    Forwards that build a graph for the prompt compute it afresh anyway.

    It holds for the thread or task that enters it and for tasks started inside, and ends with the `with`, also after an error.

    Args:
        model: carries one prompt or more.

    Raises:
        NotAttachedError: the model carries no prompt.
    """
    with new_scope(require_prompted_model(model).model, is_explicit=True):
        yield model
