"""Errors at the edge: the right code, a hint, one screen, and an exit file for every rank."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.environment import LaunchError
from launch.exits import INTERNAL, INTERRUPTED, OWN_CODES, PEER_LOST, RESOURCES
from launch.local import ABORTED
from orchestrator.errors import ConfigError, DataError, ExitCode, Interrupted
from orchestrator.supervise import Explanation, explain, outcome
from parallel.specs import SpecError

ROOT = Path(__file__).resolve().parents[2]


def make(kind: type[BaseException], *words: object) -> BaseException:
    return kind(*words)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a", "b"), 64),
        (SpecError("a", "b"), 64),
        (LaunchError("a", "b"), 64),
        (DataError("a"), 65),
        (MemoryError(), 71),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), 71),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), 71),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 71),
        (Interrupted("saved"), 85),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"), 86),
        (ConnectionResetError("Connection reset by peer"), 86),
        (KeyboardInterrupt(), 130),
        (ValueError("plain"), 70),
        (FileNotFoundError("x"), 70),
        (AssertionError(), 70),
    ],
)
def test_every_kind_of_error_has_its_code(error: BaseException, code: int) -> None:
    assert explain(error).code == code


def test_an_out_of_memory_of_torch_is_one() -> None:
    import torch

    assert explain(torch.OutOfMemoryError("CUDA out of memory")).code == 71
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60)
    assert explain(raised.value).code == 71


def test_a_lost_peer_of_torch_is_one() -> None:
    import torch.distributed as dist

    assert explain(dist.DistNetworkError("x")).code == 86


def test_a_full_disk_is_said_with_the_place_and_what_is_free(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "gone" / "file"))
    assert str(tmp_path / "gone" / "file") in explain(error).message and "MiB free" in explain(error).message


def test_a_full_disk_that_is_not_named_is_not_guessed() -> None:
    assert explain(OSError(errno.ENOSPC, "No space left on device")).message == "No space left on device"


def test_a_real_full_device_is_no_space() -> None:
    with pytest.raises(OSError) as raised, Path("/dev/full").open("w") as full:
        full.write("x")
        full.flush()
    assert explain(raised.value).code == 71


def test_numbers_of_the_launcher_are_the_exit_codes() -> None:
    assert (INTERNAL, RESOURCES, INTERRUPTED, PEER_LOST, ABORTED) == (
        ExitCode.INTERNAL,
        ExitCode.RESOURCES,
        ExitCode.INTERRUPTED,
        ExitCode.PEER_LOST,
        ExitCode.ABORTED,
    )
    assert {code for code in ExitCode if code} == OWN_CODES


def test_our_faults_keep_their_traceback_in_a_file() -> None:
    said: list[Explanation] = []

    def work() -> int:
        raise ZeroDivisionError("surprise")

    assert outcome(work, said.append) == 70
    file = Path(said[0].hint.rpartition(" ")[2])
    assert "ZeroDivisionError: surprise" in said[0].message and "in work" in file.read_text()
    assert len(said[0].render().splitlines()) == 2
    file.unlink()


RANK = """
import sys
from pathlib import Path
from orchestrator.supervise import guarded, leave_process
from orchestrator.errors import *
import errno
def work():
    print("to the log")
    print("to the user", file=sys.stderr)
    {body}
leave_process(guarded(Path(sys.argv[1]), {rank}, work))
"""


def run_rank(run_dir: Path, body: str, rank: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    code = RANK.format(body=body, rank=rank)
    environment = os.environ | variables
    return subprocess.run(
        [sys.executable, "-c", code, str(run_dir)], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("body", "code", "cause"),
    [
        ("return 0", 0, "done"),
        ("return 85", 85, "interrupted"),
        ("raise DataError('row 3 is bad', 'data.on_bad_row=skip')", 65, "DataError"),
        ("raise Interrupted('saved step 3')", 85, "Interrupted"),
        ("raise RuntimeError('Connection closed by peer')", 86, "PeerLost"),
        ("raise KeyError('x')", 70, "KeyError"),
        ("[1] * 10**15", 71, "OutOfMemory"),
    ],
)
def test_every_rank_leaves_its_cause_and_ends_with_its_code(tmp_path: Path, body: str, code: int, cause: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3}\n{"st')
    done = run_rank(tmp_path, body)
    left = json.loads((tmp_path / "exits" / "rank-0.json").read_text())
    assert (done.returncode, left["code"], left["cause"], left["step"]) == (code, code, cause, 3)
    assert not (tmp_path / "states" / "rank-0.json").exists()


def test_the_first_rank_speaks_by_hand_and_its_traceback_stays_in_the_log(tmp_path: Path) -> None:
    done = run_rank(tmp_path, "raise DataError('row 3 is bad', 'data.on_bad_row=skip')")
    assert done.stderr == "to the user\nrow 3 is bad\nhint: data.on_bad_row=skip\n" and done.stdout == ""
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "to the log" in log and "to the user" in log and "Traceback" in log


def test_other_ranks_are_silent(tmp_path: Path) -> None:
    done = run_rank(tmp_path, "raise DataError('row 3 is bad')", rank=2)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 65)
    assert "row 3 is bad" in (tmp_path / "logs" / "rank-2.log").read_text()


def test_an_exit_that_cannot_be_written_does_not_change_the_code(tmp_path: Path) -> None:
    (tmp_path / "exits").touch()
    assert run_rank(tmp_path, "raise DataError('x')").returncode == 65
    assert "the exit file could not be written" in (tmp_path / "logs" / "rank-0.log").read_text()
