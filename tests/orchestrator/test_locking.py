"""One launch in a run folder: the second is refused by name, what a dead one left is taken over."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from orchestrator.errors import ConfigError
from orchestrator.locking import locked, read_holder, still_mine

HOLD = """
import sys, time
from pathlib import Path
from orchestrator.locking import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
ROOT = Path(__file__).resolve().parents[2]
LONGER_THAN_A_TEST_S = 3600


def elsewhere(run_dir: Path, host: str = "node7") -> Path:
    """What a launch on another host leaves in a shared folder, where the kernel's lock does not reach."""
    words = {"host": host, "job": "Slurm job 42", "since": "2026-01-01 00:00:00 UTC", "token": "ab"}
    (run_dir / ".lock").write_text(json.dumps(words))
    return run_dir / ".lock"


def test_the_second_process_is_told_who_holds_the_folder_and_a_killed_one_leaves_it(tmp_path: Path) -> None:
    environment = os.environ | {"SLURM_JOB_ID": "77", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    here = os.uname().nodename
    with (
        pytest.raises(ConfigError, match=f"is training in .*Slurm job 77 on {here}, since") as caught,
        locked(tmp_path),
    ):
        pass
    assert caught.value.hint == f"wait for it, or run_dir={tmp_path}-2"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_holder(tmp_path) is not None
    with locked(tmp_path):
        holder = read_holder(tmp_path)
        assert holder is not None and holder.job == f"process {os.getpid()}"
    assert read_holder(tmp_path) is None


def test_a_holder_elsewhere_that_beats_is_refused_and_a_silent_one_taken_over(tmp_path: Path) -> None:
    path = elsewhere(tmp_path)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.05):
            os.utime(path)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(ConfigError, match="Slurm job 42 on node7"), locked(tmp_path, lease_s=5):
            pass
    finally:
        done.set()
        beating.join()
    with locked(tmp_path, lease_s=0.4):
        holder = read_holder(tmp_path)
        assert holder is not None and holder.host == os.uname().nodename


def test_a_job_that_its_scheduler_has_started_anew_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path, lease_s=LONGER_THAN_A_TEST_S):
        holder = read_holder(tmp_path)
        assert holder is not None and holder.host == os.uname().nodename


def test_a_lock_from_long_ago_is_taken_over_at_once(tmp_path: Path) -> None:
    os.utime(elsewhere(tmp_path), (1e9, 1e9))
    with locked(tmp_path, lease_s=LONGER_THAN_A_TEST_S):
        holder = read_holder(tmp_path)
        assert holder is not None and holder.host == os.uname().nodename


def test_a_holder_beats_and_finds_out_that_it_was_taken_for_dead(tmp_path: Path) -> None:
    with locked(tmp_path, beat_s=0.05):
        check = still_mine(tmp_path)
        before = (tmp_path / ".lock").stat().st_mtime_ns
        deadline = time.monotonic() + 10
        while (tmp_path / ".lock").stat().st_mtime_ns == before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        check()
        elsewhere(tmp_path)
        with pytest.raises(ConfigError, match=r"another isotrain is training in .*Slurm job 42 on node7"):
            check()
        (tmp_path / ".lock").write_text("")  # and has ended since
        with pytest.raises(ConfigError, match="another isotrain is training in"):
            check()
        elsewhere(tmp_path)
    assert read_holder(tmp_path) is not None  # it is the other's


@pytest.mark.parametrize("text", ["", "rubbish", "[]", '{"host": "a"}'])
def test_a_lock_that_says_nothing_holds_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / ".lock").write_text(text)
    with locked(tmp_path, lease_s=60):
        assert read_holder(tmp_path) is not None


def test_of_two_that_write_at_once_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has no locks: the one that finds the other's words leaves."""
    refuse = OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def flock(*arguments: object) -> None:
        raise refuse

    monkeypatch.setattr("orchestrator.locking.fcntl.flock", flock)
    writing = threading.Timer(0.3, elsewhere, (tmp_path,))
    writing.start()
    with pytest.raises(ConfigError, match="Slurm job 42 on node7"), locked(tmp_path):
        pass
    writing.join()
    (tmp_path / ".lock").unlink()
    with locked(tmp_path):
        assert read_holder(tmp_path) is not None


def test_two_processes_of_one_scheduled_job_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same job on another of its nodes is no restart of it: it is watched."""
    path = elsewhere(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    touching = threading.Timer(0.4, os.utime, (path,))
    touching.start()
    with pytest.raises(ConfigError, match="Slurm job 42 on node7"), locked(tmp_path, lease_s=5):
        pass
    touching.join()
