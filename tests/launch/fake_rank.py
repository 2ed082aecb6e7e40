"""A stand-in for a rank: says what it is told to, by the real exits and states. argv: RUN_DIR MODE."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from launch.environment import rank_environment, terminal_descriptor
from launch.exits import write_exit
from launch.output import redirect
from launch.states import enter, leave, state_file
from launch.stop import StopRequest


def main(run_dir: Path, mode: str) -> int:
    me = rank_environment()
    assert me is not None
    redirect(run_dir, me.rank, terminal_descriptor())
    stop = StopRequest.installed()
    enter(run_dir, me.rank)
    print(f"hello from rank {me.rank} of {me.world_size}", file=sys.stderr, flush=True)
    print(f"noise of rank {me.rank}", flush=True)
    code, cause = act(run_dir, mode, me.rank, stop)
    write_exit(run_dir, me.rank, code, cause=cause, message=f"{cause} on rank {me.rank}", step=3)
    leave(run_dir, me.rank)
    return code


def act(run_dir: Path, mode: str, rank: int, stop: StopRequest) -> tuple[int, str]:
    if mode == "data-error-on-1":
        if rank == 1:
            time.sleep(0.3)
            return 65, "DataError"
        while not state_file(run_dir, 1).exists():  # a peer is lost after it was there
            time.sleep(0.02)
        return 86, "PeerLost"
    if mode == "killed-1" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if mode == "unsaid":
        os._exit(71)
    if mode == "killed-1":
        while not stop.requested:
            time.sleep(0.02)
        return 86, "PeerLost"
    if mode == "wait":
        while not stop.requested:
            time.sleep(0.02)
        return 85, "Interrupted"
    if mode == "stubborn":
        time.sleep(60)
    return 0, "done"


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
