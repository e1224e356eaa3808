"""Process-wide patches that stay in place while something uses them, such as a wrapper around a function of transformers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from softhooks.patching.patches import Patches

_User = TypeVar("_User")


class SharedPatches(Generic[_User]):
    """Patches with users: they are made for the first user, and undone when the last user is removed.

    Users are held by weak references, compared by identity, and removed when they are garbage collected. Thread-safe.

    Args:
        make: called as `make(patches, *args)` for each added user; makes the patches that do not exist yet.
    """

    def __init__(self, make: Callable[..., None]) -> None:
        self._make = make
        self._patches = Patches()
        self._lock = threading.RLock()
        self._references: dict[int, weakref.ref[_User]] = {}

    def __iter__(self) -> Iterator[_User]:
        users = [reference() for reference in list(self._references.values())]
        return (user for user in users if user is not None)

    def __bool__(self) -> bool:
        return any(True for _ in self)

    def add(self, user: _User, *args: Any) -> None:
        """Add a user and make the patches that it needs; they stay until the user is discarded or garbage collected."""
        key = id(user)
        with self._lock:
            self._references[key] = weakref.ref(user, lambda _: self._leave(key))
            self._make(self._patches, *args)

    def discard(self, user: _User) -> None:
        """Remove a user. Calling it again does nothing."""
        self._leave(id(user))

    def _leave(self, key: int) -> None:
        with self._lock:
            if self._references.pop(key, None) is not None and not self._references:
                self._patches.undo()
