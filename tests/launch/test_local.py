"""Launching with real processes: what ranks do, what the launcher hears, and what it ends with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.exits import RankExit, first_cause, read_exits
from launch.launcher import render
from launch.local import LaunchResult, catching_stops, launch
from launch.request import LaunchRequest
from launch.watch import Patience

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from launch.launcher import render
from launch.local import launch
from launch.request import LaunchRequest
run_dir, world, *program = sys.argv[1:]
request = LaunchRequest(Path(run_dir), tuple(program), int(world), ranks_per_node=int(world))
result = launch(render(request), Path(run_dir), int(world), lambda text: print(text, file=sys.stderr, flush=True))
print(json.dumps([result.code, result.cause and asdict(result.cause)]))
"""


def fake_rank(run_dir: Path, mode: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "tests.launch.fake_rank", str(run_dir), mode)


def run(run_dir: Path, world: int, mode: str) -> LaunchResult:
    request = LaunchRequest(run_dir, fake_rank(run_dir, mode), world, ranks_per_node=world)
    said: list[str] = []
    return launch(render(request), run_dir, world, said.append)


def start_driver(run_dir: Path, world: int, mode: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", DRIVER, str(run_dir), str(world), *fake_rank(run_dir, mode)]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def pids(run_dir: Path) -> list[int]:
    return [json.loads(file.read_text())["pid"] for file in (run_dir / "states").glob("rank-*.json")]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_one_rank_runs_without_torchrun_and_its_output_lies_in_its_log(tmp_path: Path) -> None:
    assert run(tmp_path, 1, "fine") == LaunchResult(0, None)
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "hello from rank 0 of 1" in log and "noise of rank 0" in log
    assert "torch" not in (tmp_path / "logs" / "launcher.log").read_text()


def test_first_rank_alone_speaks_to_the_user(tmp_path: Path) -> None:
    driver = start_driver(tmp_path, 2, "fine")
    out, err = driver.communicate(timeout=120)
    assert json.loads(out) == [0, None]
    assert "hello from rank 0 of 2" in err and "rank 1" not in err and "noise" not in err
    assert "noise of rank 1" in (tmp_path / "logs" / "rank-1.log").read_text()


def test_words_of_launcher_and_rank_do_not_overwrite_each_other_in_a_file(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import sys; print('before', file=sys.stderr, flush=True)\n" + DRIVER]
    argv += [str(tmp_path), "1", *fake_rank(tmp_path, "fine")]
    with (tmp_path / "shown").open("w") as shown:
        subprocess.run([*argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=shown, check=True)
        shown.write("after\n")
    assert (tmp_path / "shown").read_text() == "before\nhello from rank 0 of 1\nafter\n"


def test_launch_ends_with_the_code_of_the_first_cause_not_of_a_lost_peer(tmp_path: Path) -> None:
    result = run(tmp_path, 2, "data-error-on-1")
    assert (result.code, result.cause.rank, result.cause.message) == (65, 1, "DataError on rank 1")  # type: ignore[union-attr]


def test_a_rank_killed_from_outside_is_named_and_the_run_may_be_restarted(tmp_path: Path) -> None:
    result = run(tmp_path, 2, "killed-1")
    assert result.code == 86
    assert result.cause is not None and "rank 1 was killed by SIGKILL" in result.cause.message


@pytest.mark.parametrize(
    ("patience", "cause", "words"),
    [
        (Patience(silent_s=1), "Silent", r"rank \d gives no sign of life for \d s"),
        (Patience(stalled_s=1), "Stalled", "no step was done for 1 s, though all ranks live"),
    ],
)
def test_ranks_that_hang_are_killed_and_may_be_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: Patience, cause: str, words: str
) -> None:
    monkeypatch.setattr("launch.watch.ANSWER_S", 0.1)  # these ranks answer nobody
    request = LaunchRequest(tmp_path, fake_rank(tmp_path, "stubborn"), 2, ranks_per_node=2)
    result = launch(render(request), tmp_path, 2, lambda text: None, patience)
    assert (result.code, result.cause and result.cause.cause) == (86, cause)
    assert result.cause is not None and re.match(words, result.cause.message)
    assert not any(is_alive(pid) for pid in map(int, re.findall(r"process (\d+)", logs(tmp_path))))


def logs(run_dir: Path) -> str:
    return "".join(file.read_text() for file in (run_dir / "logs").glob("rank-*.log"))


def test_a_crashed_rank_is_our_fault_and_a_code_without_an_exit_file_still_counts(tmp_path: Path) -> None:
    crashed = run(tmp_path / "crash", 1, "crash")
    assert crashed.code == 70 and "SIGSEGV" in crashed.cause.message  # type: ignore[union-attr]
    unsaid = run(tmp_path / "unsaid", 1, "unsaid")
    assert unsaid.code == 71 and "ended with code 71" in unsaid.cause.message  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("world", "number"),
    [(1, signal.SIGINT), (1, signal.SIGTERM), (1, signal.SIGUSR2), (2, signal.SIGINT), (2, signal.SIGUSR1)],
)
def test_first_ctrl_c_lets_every_rank_finish_and_save(tmp_path: Path, world: int, number: signal.Signals) -> None:
    driver = start_driver(tmp_path, world, "wait")
    wait_for(lambda: len(pids(tmp_path)) == world)
    driver.send_signal(number)
    out, err = driver.communicate(timeout=60)
    assert json.loads(out)[0] == 85
    assert "press Ctrl-C again" in err
    assert {value.code for value in read_exits(tmp_path).values()} == {85}
    assert len(read_exits(tmp_path)) == world


def test_second_ctrl_c_kills_all_ranks_at_once(tmp_path: Path) -> None:
    driver = start_driver(tmp_path, 2, "stubborn")
    wait_for(lambda: len(pids(tmp_path)) == 2)
    ranks = pids(tmp_path)
    driver.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert driver.poll() is None
    driver.send_signal(signal.SIGINT)
    out, _ = driver.communicate(timeout=20)
    assert json.loads(out) == [130, None]
    assert not any(is_alive(pid) for pid in ranks)


@pytest.mark.parametrize(("under_nohup", "count"), [(False, 1), (True, 0)])
def test_a_lost_terminal_is_a_wish_to_stop_but_not_under_nohup(under_nohup: bool, count: int) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if under_nohup else signal.SIG_DFL)
    try:
        with catching_stops() as stops:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stops.count == count
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_follows_a_scheduler_s_warning_does_not_end_the_save(tmp_path: Path) -> None:
    driver = start_driver(tmp_path, 1, "stubborn")
    wait_for(lambda: len(pids(tmp_path)) == 1)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        driver.send_signal(number)
        time.sleep(0.5)
    assert driver.poll() is None and is_alive(*pids(tmp_path))
    driver.send_signal(signal.SIGTERM)  # now the user insists
    out, _ = driver.communicate(timeout=20)
    assert json.loads(out) == [130, None]


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    driver = start_driver(tmp_path, 1, "wait")
    wait_for(lambda: len(pids(tmp_path)) == 1)
    (rank,) = pids(tmp_path)
    driver.kill()
    driver.communicate()
    wait_for(lambda: not is_alive(rank), timeout_s=10)
    assert read_exits(tmp_path)[0].code == 85


def test_ranks_do_not_outlive_a_killed_agent(tmp_path: Path) -> None:
    driver = start_driver(tmp_path, 2, "stubborn")
    wait_for(lambda: len(pids(tmp_path)) == 2)
    ranks = pids(tmp_path)
    os.kill(parent_of(ranks[0]), signal.SIGKILL)
    out, _ = driver.communicate(timeout=30)
    assert json.loads(out)[0] == 86
    wait_for(lambda: not any(is_alive(pid) for pid in ranks))  # they have said why, and are ending


def test_ranks_that_save_because_their_agent_was_killed_may_be_started_again(tmp_path: Path) -> None:
    driver = start_driver(tmp_path, 2, "wait")
    wait_for(lambda: len(pids(tmp_path)) == 2)
    ranks = pids(tmp_path)
    os.kill(parent_of(ranks[0]), signal.SIGKILL)
    out, _ = driver.communicate(timeout=30)
    code, cause = json.loads(out)
    assert (code, cause["code"], cause["cause"], cause["step"]) == (86, 86, "Launcher", 3)  # not 85: nobody has asked
    assert cause["message"] == "torchrun was killed by SIGKILL"
    assert {value.code for value in read_exits(tmp_path).values()} == {85}
    wait_for(lambda: not any(is_alive(pid) for pid in ranks))  # they have said why, and are ending


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_program_that_cannot_start_is_said_with_the_log(tmp_path: Path) -> None:
    request = LaunchRequest(tmp_path, (sys.executable, "-c", "raise SystemExit(3)"), 1)
    result = launch(render(request), tmp_path, 1, lambda text: None)
    assert result.code == 70 and "rank 0 ended with code 3" in result.cause.message  # type: ignore[union-attr]


def test_exits_of_an_earlier_launch_are_forgotten(tmp_path: Path) -> None:
    assert run(tmp_path, 1, "crash").code == 70
    assert run(tmp_path, 1, "fine").code == 0


def test_first_cause_is_the_earliest_own_failure() -> None:
    def left(rank: int, code: int, at: float) -> RankExit:
        return RankExit(rank, code, "x", "", "", None, at)

    exits = {0: left(0, 86, 1.0), 1: left(1, 71, 5.0), 2: left(2, 64, 4.0), 3: left(3, 85, 2.0), 4: left(4, 0, 0.5)}
    assert first_cause(exits).rank == 2  # type: ignore[union-attr]
    assert first_cause({0: exits[0], 3: exits[3]}, {5: left(5, 86, 9.0)}).rank == 5  # type: ignore[union-attr]
    assert first_cause({0: exits[0], 3: exits[3]}).rank == 3  # type: ignore[union-attr]
    assert first_cause({4: exits[4]}) is None
