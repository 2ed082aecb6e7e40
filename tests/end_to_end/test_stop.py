"""Stopped in the middle: a polite stop saves, a killed rank ends the others, and the same command goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.pages.run_folder import read_run
from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Folder, Shell, is_alive, is_one_screen, press_ctrl_c, wait_for

MANY = 100_000
SIXTY = {"cluster": "laptop", "topology__dp": 2, "steps": 60, "checkpoint__every_steps": 5, "recovery__silent_s": 4}


def logged(run: Folder) -> int:
    """The last step that metrics.jsonl holds."""
    file = run.path / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.is_file() else 0


@pytest.fixture
def start(shell: Shell) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a run and waits until it has gone two steps beyond ``after``; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(words: list[str], run: Folder, after: int, command: str = "train") -> subprocess.Popen[str]:
        process = shell.start(command, *words)
        started.append(process)
        wait_for(lambda: len(run.pids()) == 2 or process.poll() is not None)
        wait_for(lambda: logged(run) in range(after + 2, MANY) or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()  # its ranks then end by themselves


def test_the_same_command_goes_on_after_ctrl_c_sigterm_and_a_killed_rank(
    start: Callable[..., subprocess.Popen[str]], tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    words = tiny_run_model.words(
        cluster="laptop",
        topology__tp=2,
        topology__pp=1,
        topology__dp=1,
        run_dir=run.path,
        steps=MANY,
        checkpoint__every_steps=0,
        recovery__restarts=0,
    )
    process = start(words, run, after=0)
    press_ctrl_c(process)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 85, err
    first = saved(run)
    assert f"interrupted; {first} of {MANY} steps are saved" in err and "Traceback" not in err

    process = start(words, run, after=first)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 85, err
    assert f"resuming {run.path} after step {first} of {MANY}" in err and f"step {first + 1}/{MANY}" in err
    second = saved(run)
    assert second > first

    process = start(words, run, after=second)
    pids = run.pids()
    os.kill(pids[1], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 86, err
    assert "rank 1 was killed by SIGKILL" in err and "run the same command again" in err
    assert is_one_screen("\n".join(line for line in err.splitlines() if not line.startswith("step ")))
    assert not any(is_alive(pid) for pid in pids)
    assert saved(run, also_logged=False) == second

    process = start(words, run, after=0)
    pids = run.pids()
    os.kill(pids[0], signal.SIGSTOP)  # so that it cannot stop politely in the meantime
    press_ctrl_c(process)
    time.sleep(0.6)
    assert process.poll() is None
    press_ctrl_c(process)
    process.communicate(timeout=30)
    assert process.returncode == 130
    wait_for(lambda: not any(is_alive(pid) for pid in pids), timeout_s=10)
    assert saved(run, also_logged=False) == second and run.metrics
    launches = read_run(run.path).launches
    assert [(one.code, one.cause) for one in launches[:2]] == [(85, "interrupted")] * 2
    assert [(one.code, one.cause, one.rank) for one in launches[2:]] == [(86, "Killed", 1), (130, "Aborted", None)]
    assert "rank 1 was killed by SIGKILL" in (run.path / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def undisturbed(shell: Shell, tiny_run_model: TinyRun) -> Folder:
    """SIXTY steps on two ranks without a pause."""
    folder = Folder(shell.folder / "undisturbed")
    shell.isotrain("train", *tiny_run_model.words(**SIXTY, run_dir=folder.path))
    return folder


def test_a_schedulers_warnings_save_the_step_and_a_resumed_run_ends_with_the_same_bits(
    start: Callable[..., subprocess.Popen[str]],
    shell: Shell,
    undisturbed: Folder,
    tiny_run_model: TinyRun,
    tmp_path: Path,
) -> None:
    run, step = Folder(tmp_path / "run"), 0
    process = start(tiny_run_model.words(**SIXTY, run_dir=run.path), run, after=0)
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 85, err
        step, before = saved(run), step
        assert before < step < 60 and f"interrupted; {step} of 60 steps are saved" in err and "Traceback" not in err
        if number == signal.SIGUSR1:
            process = start([str(run.path)], run, step, command="resume")
    assert f"after step {step} of 60" in shell.isotrain("resume", str(run.path)).err
    assert [one.code for one in read_run(run.path).launches] == [85, 85, 0]
    assert run.losses == undisturbed.losses
    shell.isotrain("verify", str(run.path), str(undisturbed.path))  # 1 where a bit differs


def test_lost_ranks_are_started_again_and_the_adapter_is_that_of_an_undisturbed_run(
    start: Callable[..., subprocess.Popen[str]],
    shell: Shell,
    undisturbed: Folder,
    tiny_run_model: TinyRun,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    run = Folder(tmp_path / "run")
    process = start(tiny_run_model.words(**SIXTY, run_dir=run.path), run, after=8)
    killed = run.pids()
    os.kill(killed[1], signal.SIGKILL)
    killed_at, step = time.monotonic(), logged(run)
    wait_for(lambda: len(run.pids()) == 2 and not set(run.pids()) & set(killed))
    stopped = run.pids()
    wait_for(lambda: logged(run) > step or process.poll() is not None)
    record_property("recovery_s", f"{time.monotonic() - killed_at:.2f}")
    wait_for(lambda: logged(run) >= 20 or process.poll() is not None)
    os.kill(stopped[0], signal.SIGSTOP)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "rank 1 was killed by SIGKILL and left no word; starting again from step " in err
    waits = r"rank 1 waits in \w+ of [\w ]+ \(ranks 0, 1\) at \S+:\d+ in \w+"
    assert re.search(rf"rank 0 gives no sign of life for .*; {waits}; starting again from step \d+", err)
    assert not any(is_alive(pid) for pid in killed + stopped)
    assert run.losses == undisturbed.losses
    shell.isotrain("verify", str(run.path), str(undisturbed.path))  # 1 where a bit differs


def saved(run: Folder, also_logged: bool = True) -> int:
    """The step that ``latest`` holds; after a polite stop it is the last one that was logged."""
    step = int(run.latest.removeprefix("step-"))
    assert step == run.steps[-1]
    if also_logged:
        assert sorted(run.metrics)[-1] == step
    return step
