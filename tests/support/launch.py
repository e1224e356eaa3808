"""Start a script in two processes on this machine, as `torchrun` and `accelerate launch` do, with a timeout."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import ports
import psutil
import torch

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "processes"
TIMEOUT = 300
MARK = "SOFTHOOKS_TEST_LAUNCH"
"""The environment variable that marks the processes of a launch."""


def launch(
    *command: str | Path, processes: int = 2, accelerate: bool = False, timeout: float = TIMEOUT
) -> tuple[int, str]:
    """Run a script, or `-m module`, in several processes; return the exit status and all that they print.

    Args:
        timeout: after how many seconds they are killed, the launcher, its workers and what those have started.
    """
    reservation, port = ports.reserve()
    if accelerate:
        # With `--cpu` it starts one process whatever it is asked for, unless there is MPI.
        starter = [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            str(processes),
            "--num_machines",
            "1",
        ]
        starter += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_ip", "127.0.0.1"]
        starter += ["--main_process_port", str(port)]
    else:
        starter = ["torch.distributed.run", "--nproc-per-node", str(processes), "--master-addr", "127.0.0.1"]
        starter += ["--master-port", str(port)]
    mark = secrets.token_hex(8)
    environment = os.environ | {
        MARK: mark,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }
    started = subprocess.Popen(
        [sys.executable, "-m", *starter, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    with reservation:
        try:
            output, _ = started.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            _kill(mark)
            output, _ = started.communicate(timeout=60)
            output += f"\nkilled after {timeout} seconds"
    return started.returncode, output


def _kill(mark: str) -> None:
    """Kill a launcher and all processes that it has started.

    They are identified by their environment: each worker leads a process group of its own, and the workers of a dead
    launcher have no parent.
    """
    found = True
    while found:
        found = False
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
                    found = True


def leave() -> None:
    """Leave the process group.

    Models must be gone by then: the destructor of a DDP model's reducer joins gloo's threads while it holds the
    interpreter's lock, for which those may wait; the process then hangs, or dies of it.
    """
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def results(folder: Path, *command: str | Path, **options: Any) -> list[dict[str, Any]]:
    """Run a script that writes `rank0.pt` and `rank1.pt` into a folder, and read what it wrote."""
    status, output = launch(*command, **options)
    assert status == 0, output[-6000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(options.get("processes", 2))]
