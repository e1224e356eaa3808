"""Refuse versions of transformers that are newer than those softhooks was tested with."""

from __future__ import annotations

import transformers
from packaging.version import Version

from softhooks.errors import AttachError

FIRST_UNSUPPORTED = "5.24"
"""The first version that softhooks does not support.

pyproject.toml excludes it too, but pip only warns if transformers is upgraded later.
"""


def check_transformers() -> None:
    """Check the version of transformers.

    Raises:
        AttachError: softhooks was not tested with this version, and its hooks depend on internals of transformers.
    """
    installed = transformers.__version__
    if Version(installed) >= Version(f"{FIRST_UNSUPPORTED}.dev0"):
        raise AttachError(
            "this version of transformers is not supported: prompts depend on its attention and mask internals, and softhooks "
            "was only tested with older versions.",
            f'Install a supported version: `pip install "transformers<{FIRST_UNSUPPORTED}"`.',
            installed=f"transformers {installed}",
        )
