"""Suppress warnings of transformers for a short time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Suppress what transformers logs below an error, such as the warning about a newly initialized head."""
    import transformers

    before: Any = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
