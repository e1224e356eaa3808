"""Who needs something that is there once for the whole process: a wrapped function, a hook that listens everywhere."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

_User = TypeVar("_User")


class Users(Generic[_User]):
    """The users of such a thing, held weakly and told apart by identity. When none is left, it is put back.

    Args:
        put_back: called when the last user is discarded, or collected.

    Attributes:
        lock: held while users come and go; models of several threads share the thing.
    """

    def __init__(self, put_back: Callable[[], None]) -> None:
        self._put_back = put_back
        self.lock = threading.RLock()
        self._references: dict[int, weakref.ref[_User]] = {}

    def __iter__(self) -> Iterator[_User]:
        users = [reference() for reference in list(self._references.values())]
        return (user for user in users if user is not None)

    def __bool__(self) -> bool:
        return any(True for _ in self)

    def add(self, user: _User) -> None:
        """Count a user in, until it is discarded or collected."""
        key = id(user)
        with self.lock:
            self._references[key] = weakref.ref(user, lambda _: self._leave(key))

    def discard(self, user: _User) -> None:
        """Let a user go. Calling it again does nothing."""
        self._leave(id(user))

    def _leave(self, key: int) -> None:
        with self.lock:
            if self._references.pop(key, None) is not None and not self._references:
                self._put_back()
