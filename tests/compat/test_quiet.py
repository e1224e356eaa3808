"""Suppressed warnings of transformers come back, also after an error."""

import contextlib

import transformers

from softhooks.compat.quiet import without_warnings


def test_the_verbosity_is_restored_after_an_error() -> None:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    try:
        with contextlib.suppress(KeyError), without_warnings():
            assert transformers.logging.get_verbosity() == transformers.logging.ERROR
            raise KeyError
        assert transformers.logging.get_verbosity() == transformers.logging.INFO
    finally:
        transformers.logging.set_verbosity(before)
