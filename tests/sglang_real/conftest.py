"""Prepare the environment for transformers, which imports torchvision. Run these tests with `make test-sglang`."""

from __future__ import annotations

import on_cpu  # noqa: F401
