"""Canary: what torchrun's own restarts do with a killed gloo worker, by default and with a store for each attempt.

isotrain starts torchrun with ``--max-restarts 0`` and starts ranks again itself, because of what the first test finds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.faults
STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
LIMIT_S = 120
WORKER = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt:
    time.sleep(3 * int(os.environ["RANK"]))  # never all at once: rank 0 finds what the attempt before has left
dist.init_process_group("gloo", timeout=timedelta(seconds=30))
value = torch.ones(1)
for _ in range(5):
    dist.all_reduce(value)
rank = dist.get_rank()
if attempt == 0 and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
for _ in range(5):
    dist.all_reduce(value)
dist.barrier()
Path(sys.argv[1], f"done-{attempt}-{rank}").touch()
os._exit(0)  # threads of gloo may end an orderly exit with SIGABRT
"""


def recovers(folder: Path, **variables: str) -> tuple[bool, str]:
    """Whether both workers finish after one was killed; and what was said. Too long is no recovery."""
    worker = folder / "worker.py"
    worker.write_text(WORKER)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    argv = [sys.executable, *torchrun, "--nproc-per-node", "2", "--max-restarts", "2", str(worker), str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != STORE} | variables
    with (folder / "said").open("w+") as said:
        process = subprocess.Popen(argv, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            process.terminate()  # the agent then ends its workers
            process.wait()
        said.seek(0)
        text = said.read()
    return process.returncode == 0 and len(list(folder.glob("done-[12]-[01]"))) == 2, text


def test_restarts_of_torchrun_do_not_recover_a_killed_gloo_worker_by_default(tmp_path: Path) -> None:
    recovered, said = recovers(tmp_path)
    assert not recovered, (
        f"torch {torch.__version__} recovers a killed gloo worker with --max-restarts, which 2.13 did not: good news. "
        f"Restarts of its own are still kept off in launch/launcher.py; look again at what orchestrator/recovery.py "
        f"does better, change docs/reliability.md, and turn this test round.\n{said}"
    )


def test_restarts_of_torchrun_recover_it_when_its_store_is_not_shared(tmp_path: Path) -> None:
    recovered, said = recovers(tmp_path, **{STORE: "1"})
    assert recovered, (
        f"torch {torch.__version__} no longer recovers a killed gloo worker with {STORE}=1, which 2.13 did: whoever "
        f"starts ranks by hand with torchrun --max-restarts should be told; change docs/reliability.md.\n{said}"
    )
