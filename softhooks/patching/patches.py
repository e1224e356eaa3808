"""Set attributes on objects that belong to the user, transformers or torch, and restore them later.

Everything that softhooks sets on these objects goes through `Patches`:

    patches.set(module, "forward", forward)             set an attribute of an instance, a class or a Python module
    patches.set(mapping, "sdpa", function)              set an entry of a dictionary
    patches.wrap(Trainer, "compute_loss", wrapper_of)   wrap a function, at most once
    patches.delete(module, "_hf_hook")                  delete an attribute until it is restored
    patches.keep(module.register_forward_hook(hook))    add an object that has `remove()`
    patches.undo()                                      restore everything, in reverse order

`with Patches() as patches:` and `with patched(owner, name, value):` restore everything at the end of the block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import nn  # `import softhooks` loads this module, but not torch


class Handle(Protocol):
    """An object with `remove()`, such as the handle of a hook."""

    def remove(self) -> object:
        """Undo the change."""


class _Absent:
    """A marker for a missing attribute. The class itself is the marker, because a deep copy of a class is the same object."""


@dataclass(frozen=True, eq=False)
class Patch:
    """One attribute of an object or one entry of a dictionary, with its old and its new value."""

    owner: Any
    name: str
    before: Any
    value: Any

    @property
    def is_in_place(self) -> bool:
        """Whether the new value is still in place, and not replaced by other code."""
        return _get(self.owner, self.name) is self.value

    def remove(self) -> None:
        """Restore the old value, unless other code has replaced the new one."""
        if self.is_in_place:
            _put(self.owner, self.name, self.before)


class Patches:
    """A list of changes that can be undone. It can be copied and pickled."""

    def __init__(self) -> None:
        self._made: list[Patch | Handle] = []

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, *_error: object) -> None:
        self.undo()

    def __bool__(self) -> bool:
        return bool(self._made)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an object, bypassing any setter of its class, or set an entry of a dictionary."""
        self._made.append(patch(owner, name, value))

    def delete(self, owner: Any, name: str) -> None:
        """Delete an attribute of an object or an entry of a dictionary, if it exists."""
        self.set(owner, name, _Absent)

    def wrap(self, owner: Any, name: str, wrapper_of: Callable[[Any], Any]) -> None:
        """Wrap a function, unless these patches have already wrapped it."""
        if not any(patch.owner is owner and patch.name == name for patch in self._patches()):
            self.set(owner, name, wrapper_of(owner[name] if isinstance(owner, dict) else getattr(owner, name)))

    def keep(self, handle: Handle) -> None:
        """Add a handle, such as a hook's; `undo` calls its `remove()`."""
        self._made.append(handle)

    def restore(self, owner: Any, name: str) -> None:
        """Undo the last patch of one attribute or dictionary entry, if there is one."""
        for patch in reversed(self._patches()):
            if patch.owner is owner and patch.name == name:
                self._made.remove(patch)
                patch.remove()
                return

    def values(self) -> list[Any]:
        """Return the new values of all patches."""
        return [patch.value for patch in self._patches()]

    def undo(self) -> None:
        """Undo everything in reverse order.

        A patch stays in the list if other code has replaced its value, so that `wrap` does not wrap the same function again.
        """
        made, self._made = self._made, []
        for one in reversed(made):
            if isinstance(one, Patch) and not one.is_in_place:
                self._made.insert(0, one)
            one.remove()

    def _patches(self) -> list[Patch]:
        return [one for one in self._made if isinstance(one, Patch)]


def patch(owner: Any, name: str, value: Any) -> Patch:
    """Set an attribute of an object or an entry of a dictionary. The result's `remove()` restores the old value."""
    made = Patch(owner, name, _get(owner, name), value)
    _put(owner, name, value)
    return made


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of an object or an entry of a dictionary for the duration of a `with` block."""
    with Patches() as patches:
        patches.set(owner, name, value)
        yield


def _get(owner: Any, name: str) -> Any:
    # `vars`: only attributes of the object itself, not of its class
    return (owner if isinstance(owner, dict) else vars(owner)).get(name, _Absent)


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, type):  # the dictionary of a class is read-only
        if value is not _Absent:
            setattr(owner, name, value)
        elif name in vars(owner):
            delattr(owner, name)
        return
    own = owner if isinstance(owner, dict) else vars(owner)
    if value is _Absent:
        own.pop(name, None)
    else:
        own[name] = value


class MethodWrapper:
    """Base class of the wrappers that replace a method of one model.

    A wrapper is an object, not a closure: in a deep copy of the model, a closure would still call the original model's method.

    Args:
        model: the model.
        name: the name of the method.

    Attributes:
        before: an earlier replacement, which this wrapper calls, or None if it calls the class's method.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name
        self.before: Callable[..., Any] | None = model.__dict__.get(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the original method, but not through `original()`, whose result `torch.compile` confuses with the wrapper."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)

    def original(self) -> Callable[..., Any]:
        """Return the original method."""
        if self.before is not None:
            return self.before
        kind = type(self.model)
        own: Callable[..., Any] = inspect.getattr_static(kind, self.name).__get__(self.model, kind)
        return own
