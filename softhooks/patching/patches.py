"""Set attributes on objects that belong to the user, transformers or torch, and restore them later.

Everything that softhooks sets on these objects goes through `Patches`:

    patches.set(module, "forward", forward)             an attribute of one instance, class or Python module
    patches.set(mapping, "sdpa", function)              an entry of a dictionary
    patches.wrap(Trainer, "compute_loss", wrapper_of)   a function, wrapped at most once
    patches.delete(module, "_hf_hook")                  an attribute to delete temporarily
    patches.keep(module.register_forward_hook(hook))    anything with `remove()`
    patches.undo()                                      restores everything, in reverse order

`with Patches() as patches:` and `with patched(owner, name, value):` restore at the end of the block. Process-wide patches that
several models share are a `softhooks.patching.shared_patches.SharedPatches`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol


class Handle(Protocol):
    """An object with `remove()`, such as the handle of a hook."""

    def remove(self) -> object:
        """Undo the change."""


class _Absent:
    """Placeholder for a missing attribute. The class itself is used, because copying a class returns the same object."""


@dataclass(frozen=True, eq=False)
class Patch:
    """One attribute of an object or one entry of a dictionary, with its old and its new value."""

    owner: Any
    name: str
    before: Any
    value: Any

    @property
    def is_in_place(self) -> bool:
        """Whether the new value is still set, that is, other code has not replaced it."""
        return _get(self.owner, self.name) is self.value

    def remove(self) -> None:
        """Restore the old value, unless other code has set a different value since."""
        if self.is_in_place:
            _put(self.owner, self.name, self.before)


class Patches:
    """The attributes that were set and the handles that were registered, in order. Can be copied and pickled."""

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
        """Register a handle, such as a hook's, whose `remove()` is called when everything is undone."""
        self._made.append(handle)

    def restore(self, owner: Any, name: str) -> None:
        """Undo the last patch of one attribute, if there is one."""
        for patch in reversed(self._patches()):
            if patch.owner is owner and patch.name == name:
                self._made.remove(patch)
                patch.remove()
                return

    def values(self) -> list[Any]:
        """Return the values that are set."""
        return [patch.value for patch in self._patches()]

    def undo(self) -> None:
        """Undo everything in reverse order.

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
    """Set one attribute of an object or one entry of a dictionary until `remove()` is called on the result."""
    made = Patch(owner, name, _get(owner, name), value)
    _put(owner, name, value)
    return made


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set one attribute of an object or one entry of a dictionary while the `with` block runs."""
    with Patches() as patches:
        patches.set(owner, name, value)
        yield


def _get(owner: Any, name: str) -> Any:
    """Read an attribute of the object itself (not of its class) or an entry of a dictionary."""
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
