"""The memory of a run: that of torch's allocator on a GPU, and the peak of the process on a CPU."""

from __future__ import annotations

import platform
import sys

import torch
from torch import nn

_MOST_AT_START = 500 * 2**20


class Memory:
    """Reads the memory in use.

    Attributes:
        device: `cuda` if there is a GPU, otherwise `cpu`.
        at_start: the memory that is in use before the model is loaded; the results are relative to it.
    """

    def __init__(self) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        nn.Linear(1, 1).to(
            self.device
        )  # initializes the device, and draws the random numbers that PEFT's comparison draws
        self.at_start = 0
        if self.device == "cuda":
            used = torch.cuda.max_memory_reserved()
            if used > _MOST_AT_START:
                raise RuntimeError(
                    f"this process has already reserved {used // 2**20} MB of GPU memory; start each run in a new process."
                )
            torch.cuda.reset_peak_memory_stats()
            self.at_start = torch.cuda.max_memory_reserved()

    @property
    def allocated(self) -> int:
        """The bytes in tensors; on a CPU the peak of the process so far."""
        return (torch.cuda.memory_allocated() if self.device == "cuda" else _process_peak()) - self.at_start

    @property
    def reserved(self) -> int:
        """The bytes that the allocator holds; on a CPU the peak of the process so far."""
        return (torch.cuda.memory_reserved() if self.device == "cuda" else _process_peak()) - self.at_start

    @property
    def peak(self) -> int:
        """The most bytes that the allocator has held; on a CPU the peak of the process."""
        return (torch.cuda.max_memory_reserved() if self.device == "cuda" else _process_peak()) - self.at_start

    @property
    def accelerator(self) -> str:
        """The name of the GPU, or `CPU` with its architecture."""
        return torch.cuda.get_device_name(0) if self.device == "cuda" else f"CPU ({platform.machine()})"

    def release(self) -> None:
        """Return unused GPU memory to the device."""
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _process_peak() -> int:
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
