"""A TCP port that stays free until a server of the test takes it."""

from __future__ import annotations

import socket


def reserve() -> tuple[socket.socket, int]:
    """Bind a free port without listening, so that nobody else is given it; return the socket, to close later, and the port.

    Servers that set SO_REUSEADDR, as asyncio and PyTorch's stores do, can listen on the port all the same.
    """
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    return probe, int(probe.getsockname()[1])
