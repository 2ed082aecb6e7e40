"""Canaries: what torchrun's own restarts do with a killed gloo worker, and its agent with a signal.

isotrain starts torchrun with ``--max-restarts 0`` and starts ranks again itself, because of what the first test finds:
workers of the next attempt find addresses of the one before. Which of two connects to the other goes by addresses, so
that a job comes back only by luck of the ports, and the fewer workers, the more often. Ranks end by themselves when
their agent is gone, because of what the last test finds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.end_to_end.shell import is_alive, wait_for

pytestmark = pytest.mark.faults
STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
LIMIT_S = 90
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
WORKER = """
import os, signal, sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
folder, attempt = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
store, rank, size = next(dist.rendezvous("env://"))
if store.check(["met"]):
    (folder / f"stale-{attempt}-{rank}").touch()
dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
store.set("met", "1")
dist.all_reduce(torch.ones(1))
if attempt == 0 and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
(folder / f"done-{attempt}-{rank}").touch()
os._exit(0)  # threads of gloo may end an orderly exit with SIGABRT
"""
ENDLESS = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1], "being").write_text(str(os.getpid()))
Path(sys.argv[1], "being").rename(Path(sys.argv[1], "pid"))
while True:
    time.sleep(1)
"""


@dataclass(frozen=True)
class Restarted:
    """How a job of two workers ended, of which one was killed in the first attempt.

    ``is_stale``: workers of a later attempt met in the store of the first; ``recovered``: all came to their end.
    """

    is_stale: bool
    recovered: bool
    said: str


def restarted(folder: Path, **variables: str) -> Restarted:
    """Run it under torchrun; one that takes too long has not recovered."""
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    argv = [*TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1", str(worker), str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != STORE} | variables
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(argv, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.terminate()  # the agent then ends its workers
            process.wait()
        said.seek(0)
        recovered = process.returncode == 0 and len(list(folder.glob("done-1-[01]"))) == 2
        return Restarted(any(folder.glob("stale-1-[01]")), recovered, said.read())


def test_workers_that_torchrun_starts_again_meet_in_the_store_of_the_attempt_before(tmp_path: Path) -> None:
    found = restarted(tmp_path)
    assert found.is_stale, (
        f"torch {torch.__version__} gives workers that it starts again a store of their own, which 2.13 did not: good "
        f"news. Its restarts are still kept off in launch/launcher.py; look again at what orchestrator/recovery.py "
        f"does better, change docs/reliability.md, and turn this test round.\n{found.said}"
    )


def test_restarts_of_torchrun_recover_a_killed_worker_when_its_store_is_not_shared(tmp_path: Path) -> None:
    found = restarted(tmp_path, **{STORE: "1"})
    assert found.recovered and not found.is_stale, (
        f"torch {torch.__version__} no longer recovers a killed gloo worker with {STORE}=1, which 2.13 did: whoever "
        f"starts ranks by hand with torchrun --max-restarts should be told; change docs/reliability.md.\n{found.said}"
    )


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGKILL"])
def test_a_signal_kills_the_agent_and_leaves_its_worker_alive(tmp_path: Path, name: str) -> None:
    (tmp_path / "worker.py").write_text(ENDLESS)
    with (tmp_path / "said").open("w") as said:
        argv = [*TORCHRUN, "--nproc-per-node", "1", str(tmp_path / "worker.py"), str(tmp_path)]
        agent = subprocess.Popen(argv, stdout=said, stderr=said)
    file = tmp_path / "pid"
    wait_for(lambda: file.exists() or agent.poll() is not None)
    assert file.exists(), (tmp_path / "said").read_text()
    worker = int(file.read_text())
    try:
        number = signal.Signals[name]
        agent.send_signal(number)
        assert (agent.wait(40), is_alive(worker)) == (-number, True), (
            f"torch {torch.__version__}'s agent does otherwise with {name} than 2.13's, which ended at once and left "
            f"its worker to itself: look again at orchestrator/torchrun.py, and at what docs/launch.md says of signals."
        )
    finally:
        agent.kill()
        if is_alive(worker):
            os.kill(worker, signal.SIGKILL)
