"""The pool: results by rank, errors with their traceback, nothing that outlives its parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.pool import Pool, RankError

ROOT = Path(__file__).resolve().parents[2]


def rank_and_world() -> tuple[str, int]:
    import torch.distributed as dist

    return os.environ["RANK"], dist.get_world_size()


def fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("no more")


def test_ranks_answer_in_their_order_and_a_failure_is_told(pool: Pool) -> None:
    assert pool.run(2, rank_and_world) == [("0", 2), ("1", 2)]
    with pytest.raises(RankError, match=r"rank 1 of 2:(.|\n)*ValueError: no more"):
        pool.run(2, fail_on_rank_one)
    assert pool.run(1, rank_and_world) == [("0", 1)]
    with pytest.raises(ValueError, match="the pool has 4 workers, 5 asked for"):
        pool.run(5, rank_and_world)


@pytest.mark.timeout(100)
def test_a_worker_that_ends_is_noticed_at_once(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"ended without an answer, with these exit codes: \{0: 3\}"):
        pool.run(2, end_rank_zero, timeout_s=200)


def end_rank_zero() -> None:
    if os.environ["RANK"] == "0":
        os._exit(3)
    time.sleep(150)


@pytest.mark.timeout(100)
def test_an_answer_that_does_not_come_is_waited_for_as_long_as_asked(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"ranks \[0\] gave no answer in 1 s"):
        pool.run(1, time.sleep, 150, timeout_s=1)


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_end_with_their_parent_and_print_into_the_log(tmp_path: Path, method: str) -> None:
    program = f"""
import os, signal
from pathlib import Path
from launch.pool import Pool
from tests.launch.test_pool import print_pid
pool = Pool(1, Path({str(tmp_path / "log")!r}), {method!r})
print(pool.run(1, print_pid)[0], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [sys.executable, "-c", program]
    done = subprocess.run(started, env=environment, capture_output=True, text=True, timeout=120)
    pid = int(done.stdout)
    assert (tmp_path / "log").read_text().strip().endswith(f"worker {pid}") and "worker" not in done.stderr
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_alive(pid)


def is_alive(pid: int) -> bool:
    """Whether it runs; one that ended may stay listed until somebody reaps it (proc(5): state Z)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def print_pid() -> int:
    print(f"worker {os.getpid()}", flush=True)
    return os.getpid()
