"""Process-wide patches, such as wrappers around functions of transformers, that several models share."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from softhooks.patching.patches import Patches

_User = TypeVar("_User")


class SharedPatches(Generic[_User]):
    """Patches that are undone when their last user, an object that needs them, is discarded or garbage-collected.

    Users are held by weak references and compared by identity. Thread-safe.

    Args:
        make: called as `make(patches, *args)` for each new user, to make the patches that do not exist yet.
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
        """Add a user, and make the patches that it needs."""
        key = id(user)
        with self._lock:
            self._references[key] = weakref.ref(user, lambda _: self._leave(key))
            self._make(self._patches, *args)

    def discard(self, user: _User) -> None:
        """Remove a user, if it has not been removed yet."""
        self._leave(id(user))

    def _leave(self, key: int) -> None:
        with self._lock:
            if self._references.pop(key, None) is not None and not self._references:
                self._patches.undo()
