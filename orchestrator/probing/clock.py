"""Clocks of nodes, compared over the network: a file server's stamps may be the server's clock or the writer's."""

from __future__ import annotations

import socket
import socketserver
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

TRIES = 5
ANSWER_S = 10.0


class _Time(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        self.request.sendall(f"{time.time():.6f}\n".encode())


@contextmanager
def telling_time() -> Iterator[int]:
    """Tell this machine's time at a port of all its addresses; the port."""
    with socketserver.ThreadingTCPServer(("", 0), _Time) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, name="clock", daemon=True).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


def clock_offset(host: str, port: int, clock: Callable[[], float] = time.time) -> tuple[float, float]:
    """Our clock minus that of a host, in seconds, and how far off that may be: half of the shortest way there and back.

    Raises:
        OSError, ValueError: it does not answer, or with something else.
    """
    found = []
    for _ in range(TRIES):
        sent = clock()  # before connecting: the other side may tell its time as soon as that is done
        with socket.create_connection((host, port), timeout=ANSWER_S) as connection:
            there = float(connection.makefile().readline())
            came = clock()
        found.append(((came - sent) / 2, (sent + came) / 2 - there))
    within, offset = min(found)
    return offset, within
