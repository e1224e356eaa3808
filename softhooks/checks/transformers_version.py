"""Refuse versions of transformers with which prompts do not work."""

from __future__ import annotations

import transformers
from packaging.version import Version

from softhooks.errors import AttachError

FIRST_UNSUPPORTED = "5.24"
"""The first version of transformers that softhooks does not support. pyproject.toml excludes it too, but pip only warns if
transformers is upgraded later."""


def check_transformers() -> None:
    """Check the version of transformers.

    Raises:
        AttachError: with this version, `generate` would fail, and checks of calls with a cache would have no effect.
    """
    installed = transformers.__version__
    if Version(installed) >= Version(f"{FIRST_UNSUPPORTED}.dev0"):
        raise AttachError(
            "this version of transformers is not supported: it has renamed the argument in which models take a cache.",
            f'Install a supported version: `pip install "transformers<{FIRST_UNSUPPORTED}"`.',
            installed=f"transformers {installed}, with the argument `cache`",
            supported=f"transformers before {FIRST_UNSUPPORTED}, with the argument `past_key_values`",
        )
