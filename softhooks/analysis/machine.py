"""What `softhooks doctor` finds on this machine: versions of packages, devices, and kernels for attention."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Any

import torch
from packaging.requirements import Requirement
from transformers.utils import import_utils

_OPTIONAL = (
    "bitsandbytes", "datasets", "lightning", "lm-eval", "matplotlib", "mlflow-skinny", "optuna", "peft", "sentence-transformers",
    "setfit", "trl", "vllm", "wandb",
)  # fmt: skip


def versions() -> list[dict[str, Any]]:
    """Return the installed versions of what softhooks requires and of packages that it works with.

    Returns:
        for each package, `name`, `version` (None if it is not installed), `needs` and whether the version is `supported`.
        Packages that are not required are listed only if they are installed.
    """
    found = [
        {"name": "python", "version": platform.python_version(), "needs": "", "supported": True},
        {"name": "softhooks", "version": version("softhooks"), "needs": "", "supported": True},
    ]
    for requirement in map(Requirement, requires("softhooks") or ()):
        if requirement.marker is None:
            installed = _version(requirement.name)
            supported = installed is not None and requirement.specifier.contains(installed, prereleases=True)
            needs = str(requirement.specifier)
            found.append({"name": requirement.name, "version": installed, "needs": needs, "supported": supported})
    known = {one["name"] for one in found}
    for name in _OPTIONAL:
        installed = _version(name)
        if installed is not None and name not in known:
            found.append({"name": name, "version": installed, "needs": "", "supported": True})
    return found


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def devices() -> list[str]:
    """Describe the devices that torch can use."""
    found = [f"cpu: {torch.get_num_threads()} threads"]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        half = ", bfloat16" if torch.cuda.is_bf16_supported() else ""
        found.append(f"cuda:{number}: {about.name}, {about.total_memory / 2**30:.0f} GiB{half}")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def attention_kernels() -> dict[str, bool]:
    """Return the attention implementations of transformers, and whether they can run on this machine."""
    return {
        "eager": True,
        "sdpa": True,
        "flex_attention": bool(import_utils.is_torch_flex_attn_available()),
        "flash_attention_2": bool(import_utils.is_flash_attn_2_available()),
        "flash_attention_3": bool(import_utils.is_flash_attn_3_available()),
    }
