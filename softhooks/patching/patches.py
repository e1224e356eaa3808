"""Attributes set on objects that belong to the user, transformers or torch, and put back later.

Everything that softhooks sets on such an object goes through `Patches`:

    patches.set(module, "forward", forward)             an attribute of one instance, class or Python module
    patches.set(mapping, "sdpa", function)              an entry of a dictionary
    patches.wrap(Trainer, "compute_loss", wrapper_of)   a function, replaced by a wrapper of it, once
    patches.delete(module, "_hf_hook")                  an attribute that must be gone for a while
    patches.keep(module.register_forward_hook(hook))    anything with `remove()`
    patches.undo()                                      puts everything back, the last first

`with Patches() as patches:` and `with patched(owner, name, value):` put back at the end of the block. What several models share,
process-wide, is a `softhooks.patching.shared_patches.SharedPatches`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol


class Handle(Protocol):
    """Something that can be undone, such as the handle of a hook."""

    def remove(self) -> object:
        """Undo it."""


class _Absent:
    """Stands for a missing attribute. The class itself is used, never an instance: a copy of a class is the class."""


@dataclass(frozen=True, eq=False)
class Patch:
    """One attribute of an object, or one entry of a dictionary, with the value before and the value now."""

    owner: Any
    name: str
    before: Any
    value: Any

    @property
    def is_in_place(self) -> bool:
        """Whether the value is still there; False once other code has set another one."""
        return _get(self.owner, self.name) is self.value

    def remove(self) -> None:
        """Put the value before back, unless other code has set another value since."""
        if self.is_in_place:
            _put(self.owner, self.name, self.before)


class Patches:
    """Attributes that were set and handles that were registered, in order. Picklable and copyable with the objects in it."""

    def __init__(self) -> None:
        self._made: list[Patch | Handle] = []

    def __enter__(self) -> Patches:
        return self

    def __exit__(self, *_error: object) -> None:
        self.undo()

    def __bool__(self) -> bool:
        return bool(self._made)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an object, past any setter of its class, or an entry of a dictionary."""
        self._made.append(patch(owner, name, value))

    def delete(self, owner: Any, name: str) -> None:
        """Delete an attribute of an object or an entry of a dictionary; nothing happens if there is none."""
        self.set(owner, name, _Absent)

    def wrap(self, owner: Any, name: str, wrapper_of: Callable[[Any], Any]) -> None:
        """Replace a function by a wrapper of it, unless these patches have done so already."""
        if not any(patch.owner is owner and patch.name == name for patch in self._patches()):
            self.set(owner, name, wrapper_of(owner[name] if isinstance(owner, dict) else getattr(owner, name)))

    def keep(self, handle: Handle) -> None:
        """Remove a handle, such as that of a hook, when everything is undone."""
        self._made.append(handle)

    def restore(self, owner: Any, name: str) -> None:
        """Undo the last patch of one attribute, if there is one."""
        for patch in reversed(self._patches()):
            if patch.owner is owner and patch.name == name:
                self._made.remove(patch)
                patch.remove()
                return

    def values(self) -> list[Any]:
        """The values that are set."""
        return [patch.value for patch in self._patches()]

    def undo(self) -> None:
        """Undo everything, the last first.

        A patch that other code has replaced or wrapped stays, so that `wrap` does not wrap the same function twice.
        """
        made, self._made = self._made, []
        for one in reversed(made):
            if isinstance(one, Patch) and not one.is_in_place:
                self._made.insert(0, one)
            one.remove()

    def _patches(self) -> list[Patch]:
        return [one for one in self._made if isinstance(one, Patch)]


def patch(owner: Any, name: str, value: Any) -> Patch:
    """Set one attribute of an object, or one entry of a dictionary, until `remove()` is called on the result."""
    made = Patch(owner, name, _get(owner, name), value)
    _put(owner, name, value)
    return made


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set one attribute of an object, or one entry of a dictionary, for the length of a block."""
    with Patches() as patches:
        patches.set(owner, name, value)
        yield


def _get(owner: Any, name: str) -> Any:
    """Read an attribute that an object has itself, not from its class; read an entry of a dictionary."""
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
