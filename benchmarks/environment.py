"""The environment of a measurement: versions, processor, memory. Never a host, a user or a path."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import softhooks

_PACKAGES = ("torch", "transformers", "peft")


def versions() -> dict[str, str]:
    """The versions of the packages involved."""
    own = {"softhooks": softhooks.__version__, "python": platform.python_version()}
    return own | {name: metadata.version(name) for name in _PACKAGES}


def machine() -> dict[str, Any]:
    """The machine."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(_memory() / 1e9),
        "threads": 1,
        "system": f"{platform.system()} {platform.machine()}",
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
