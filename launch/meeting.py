"""Ranks of several machines meet: the first one binds a free port and publishes it, the others read where it is."""

from __future__ import annotations

import json
import os
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from launch.environment import RankEnvironment

if TYPE_CHECKING:
    import torch.distributed as dist

LOOK_AGAIN_S = 0.1


def meet(file: Path, host: str, me: RankEnvironment, timeout: timedelta) -> dist.Store:
    """Open the store of a launch. Every rank calls it, with the same file and host.

    The port is the system's choice at the moment of binding, so no two launches on a machine can clash.

    Args:
        file: on a file system that all ranks see; of this launch alone, and not there yet.
        host: an address of the first rank's machine that the others can reach.
        me: who this process is.
        timeout: how long to wait for the first rank, and the store's own patience.
    Raises:
        ConnectionError: the first rank has not come.
    """
    from torch.distributed import TCPStore

    if me.rank == 0:
        store = TCPStore(host, 0, me.world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        _publish(file, store.port)
        return store
    port = _read(file, timeout)
    return TCPStore(host, port, me.world_size, is_master=False, timeout=timeout, wait_for_workers=False)


def _publish(file: Path, port: int) -> None:
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(json.dumps({"port": port}) + "\n", encoding="utf-8")
    aside.replace(file)


def _read(file: Path, timeout: timedelta) -> int:
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            return int(json.loads(file.read_text(encoding="utf-8"))["port"])
        except FileNotFoundError:
            pass
        if time.monotonic() > deadline:
            raise ConnectionError(f"timed out waiting for rank 0 to say where ranks meet ({file})")
        time.sleep(LOOK_AGAIN_S)
