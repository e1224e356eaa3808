"""A worker that never ends, with a child that never ends: `hang.py FOLDER [orphaned]`; writes their ids to `hangN.txt`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    """Ignore SIGTERM and sleep; if orphaned, kill the launcher first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    rank = os.environ["RANK"]
    part = Path(sys.argv[1]) / f"{rank}.part"
    part.write_text(f"{os.getpid()} {child.pid}")
    part.rename(part.with_name(f"hang{rank}.txt"))
    while not all((part.parent / f"hang{other}.txt").exists() for other in range(int(os.environ["WORLD_SIZE"]))):
        time.sleep(0.05)
    if sys.argv[2:] == ["orphaned"] and rank == "0":
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


if __name__ == "__main__":
    main()
