"""Run SGLang's server on a CPU, without the packages that it imports but does not use there.

SGLang imports `sgl_kernel`, whose CPU build is not on PyPI, but calls it only on processors with AMX; without AMX it computes
with torch. torchvision's wheel on PyPI is built for CUDA, so that its operators do not load; SGLang uses none of them for text.
SGLang's processes are spawned, and import this module again. Usage: `python on_cpu.py --model-path MODEL ...`.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "SGLANG_USE_CPU_ENGINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_COMPILE_DISABLE": "1",  # otherwise the first request compiles for a minute
}


class Kernels(types.ModuleType):
    """A module that has every function; each raises an error when it is called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_args: object, **_kwargs: object) -> None:
            raise NotImplementedError(f"sgl_kernel.{name}: the kernels are not installed")

        return missing


def replace_kernels() -> None:
    """Define what SGLang and torchvision need in order to be imported."""
    kernels = Kernels("sgl_kernel")
    kernels.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    sys.modules["sgl_kernel"] = kernels
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if "sgl_kernel" not in sys.modules:
    replace_kernels()


def serve() -> None:
    """Do what `python -m sglang.launch_server` does."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    run_server(prepare_server_args(sys.argv[1:]))


if __name__ == "__main__":
    serve()
