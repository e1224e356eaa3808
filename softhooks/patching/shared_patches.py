"""Patches that hold for the whole process while anybody needs them, such as a wrapped function of transformers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from softhooks.patching.patches import Patches

_User = TypeVar("_User")


class SharedPatches(Generic[_User]):
    """Patches with their users: the first user has them made, and after the last one they are undone.

    Users are held weakly and compared by identity; one that is garbage collected is no user anymore. Safe with several threads.

    Args:
        make: called as `make(patches, *args)` for each user that is added; makes the patches that are not made yet.
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
        """Add a user and make the patches that it needs; they stay until it is discarded or garbage collected."""
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
