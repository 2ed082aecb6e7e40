"""Ranks on TP=2 x PP=2 are killed, crash and hang in every way; the run ends as an undisturbed one, bit for bit."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.errors import ExitCode
from orchestrator.pages.run_folder import read_run
from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.conftest import shell as shell
from tests.end_to_end.conftest import tiny_run_model as tiny_run_model
from tests.end_to_end.shell import Folder, Shell, is_alive
from tests.faults.disturbed import Disturbed
from tests.faults.soak import WITHOUT_END, differences

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]
Record = Callable[[str, object], None]
KEYS: dict[str, object] = {"cluster": "laptop", "topology__tp": 2, "topology__pp": 2, "topology__dp": 1}
KEYS |= {"optimizer__schedule": "constant", "optimizer__lr": 0.0003, "checkpoint__every_steps": 10}
KEYS |= {"recovery__silent_s": 6, "recovery__restarts": 10}
LESS = 64 << 20  # bytes below what a rank maps, so that its next large piece is refused
# What a test puts before the real sitecustomize: a rank whose file appears is held for ever by C code with the GIL.
HOLDER = """
import ctypes, os, threading, time
from pathlib import Path

def hold(file):
    while not file.exists():
        time.sleep(0.05)
    file.unlink()  # once: the ranks that are started after this one are not held
    ctypes.PyDLL(None).sleep(100000)

if "RANK" in os.environ and "worker" in Path("/proc/self/cmdline").read_text().split("\\0"):
    file = Path(__file__).with_name("hold-" + os.environ["RANK"])
    threading.Thread(target=hold, args=(file,), daemon=True).start()
"""
# Another: a rank that gets SIGALRM sleeps from then on, once it computes in a step; its other threads go on.
SLEEPER = """
import os, signal, time, traceback

def sleep_for_ever(number, frame):
    files = " ".join(one.filename for one in traceback.extract_stack(frame))
    if "pipeline_parallel/schedules" not in files or "distributed_c10d" in files or "p2p_communication" in files:
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        return
    while True:
        time.sleep(1)

if "RANK" in os.environ:
    signal.signal(signal.SIGALRM, sleep_for_ever)
"""


@dataclass(frozen=True)
class PlantedShell(Shell):
    """A shell whose Pythons look into a folder first."""

    planted: Path

    @staticmethod
    def of(shell: Shell, planted: Path, text: str) -> PlantedShell:
        """With ``text`` for a sitecustomize."""
        planted.mkdir()
        (planted / "sitecustomize.py").write_text(text)
        return PlantedShell(shell.folder, shell.cache, planted)

    @property
    def environment(self) -> dict[str, str]:
        mine = super().environment
        return mine | {"PYTHONPATH": f"{self.planted}:{mine['PYTHONPATH']}"}


@pytest.fixture
def disturb(shell: Shell, tiny_run_model: TinyRun, tmp_path: Path) -> Iterator[Callable[..., Disturbed]]:
    """Starts a run that goes on until it is stopped; whatever still runs at the end is killed."""
    started: list[Disturbed] = []

    def begin(within: Shell = shell, **keys: object) -> Disturbed:
        run = Folder(tmp_path / "run")
        words = tiny_run_model.words(**KEYS | keys, run_dir=run.path, steps=WITHOUT_END)
        started.append(Disturbed(within, words, run, 4))
        started[0].start()
        started[0].wait_beyond(20)
        return started[0]

    yield begin
    for one in started:
        one.kill()


def check_same(disturbed: Disturbed, shell: Shell, tiny: TinyRun, folder: Path) -> None:
    """End the run, and train as many steps alone: the same bits, and nothing left behind."""
    steps = disturbed.stop()
    alone = Folder(folder / "alone")
    shell.isotrain("train", *tiny.words(**KEYS, run_dir=alone.path, steps=steps))
    assert differences(disturbed.run, alone, steps) == []
    assert disturbed.leftovers() == []


def test_every_rank_may_be_killed_and_two_at_once(
    disturb: Callable[..., Disturbed], shell: Shell, tiny_run_model: TinyRun, tmp_path: Path, record_property: Record
) -> None:
    disturbed, at_random = disturb(), random.Random(0)
    for rank in range(4):
        recovered = disturbed.hit("a rank is killed (SIGKILL)", rank, at_random)
        assert f"rank {rank} was killed by SIGKILL and left no word; starting again from step " in disturbed.said
        record_property("recovery_s", f"{recovered.recovery_s:.2f}")
    before = disturbed.said
    recovered = disturbed.hit("two ranks are killed", 1, at_random)
    record_property("recovery_s", f"{recovered.recovery_s:.2f}")
    said = disturbed.said[len(before) :]
    assert any(f"rank {rank} was killed by SIGKILL" in said for rank in (1, 2))
    assert disturbed.codes == []  # the command has never ended
    check_same(disturbed, shell, tiny_run_model, tmp_path)


def test_crashes_and_a_held_interpreter_are_told_apart_and_recovered_from(
    disturb: Callable[..., Disturbed], shell: Shell, tiny_run_model: TinyRun, tmp_path: Path, record_property: Record
) -> None:
    planted = tmp_path / "planted"
    disturbed, at_random = disturb(PlantedShell.of(shell, planted, HOLDER)), random.Random(0)
    for kind, name in (("a rank crashes (SIGSEGV)", "SIGSEGV"), ("a rank aborts (SIGABRT)", "SIGABRT")):
        recovered = disturbed.hit(kind, 1, at_random)
        assert f"rank 1 was killed by {name} and left no word" in disturbed.said
        record_property("recovery_s", f"{recovered.recovery_s:.2f}")
    held, step = disturbed.pids(), disturbed.step
    (planted / "hold-2").touch()
    disturbed.wait_until(lambda: not any(map(is_alive, held.values())))
    disturbed.wait_beyond(max(step, disturbed.step))
    assert "rank 2 gives no sign of life for " in disturbed.said
    assert [one.cause for one in read_run(disturbed.run.path).launches] == ["Crash", "Crash", "Silent"]
    check_same(disturbed, shell, tiny_run_model, tmp_path)


def test_a_rank_that_sleeps_in_a_step_is_named_with_what_the_others_wait_for(
    disturb: Callable[..., Disturbed], shell: Shell, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    """It still beats, so that only the missing steps tell. A start must take less than ``recovery.stalled_s``."""
    disturbed = disturb(PlantedShell.of(shell, tmp_path / "planted", SLEEPER), recovery__stalled_s=60)
    asleep = disturbed.pids()
    os.kill(asleep[1], signal.SIGALRM)
    disturbed.wait_until(lambda: not any(map(is_alive, asleep.values())))
    disturbed.wait_beyond(disturbed.step)
    (told,) = (line for line in disturbed.said.splitlines() if line.startswith("no step was done for 60 s"))
    assert "though all ranks live; rank 1 is at sitecustomize.py:10 in sleep_for_ever; " in told
    waits = re.findall(r"rank ([\d, ]+) waits in \w+ of (?:tp|pp) \(ranks \d, \d\) at \S+:\d+ in \w+;", told)
    assert sorted(rank for ranks in waits for rank in ranks.split(", ")) == ["0", "2", "3"], told
    assert re.search(r"; starting again from step \d+$", told), told
    (launch,) = read_run(disturbed.run.path).launches
    assert (launch.cause, launch.rank) == ("Stalled", 1)
    check_same(disturbed, shell, tiny_run_model, tmp_path)


def test_a_rank_at_the_limit_of_its_memory_says_so_and_the_same_command_goes_on(
    disturb: Callable[..., Disturbed], shell: Shell, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    disturbed = disturb()
    pid = disturbed.pids()[1]
    limit = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize() - LESS
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))  # of what it maps: nothing more from now on
    disturbed.wait_until(lambda: disturbed.launcher.poll() is not None)
    assert disturbed.launcher.returncode == ExitCode.RESOURCES
    assert "out of memory: " in disturbed.said and "can't allocate memory" in disturbed.said
    assert "hint: batch.micro_sequences=1" in disturbed.said
    disturbed.wait_beyond(disturbed.step)  # types the command again
    check_same(disturbed, shell, tiny_run_model, tmp_path)


def test_a_killed_launcher_leaves_no_rank_and_the_same_command_goes_on(
    disturb: Callable[..., Disturbed], shell: Shell, tiny_run_model: TinyRun, tmp_path: Path, record_property: Record
) -> None:
    disturbed, at_random = disturb(), random.Random(0)
    kinds = (
        "the launcher is killed; the same command again",
        "torchrun's agent is killed",
        "a rank is killed, and the newest checkpoint damaged",
    )
    for kind in kinds:  # hit() waits until no rank of before is left
        recovered = disturbed.hit(kind, 0, at_random)
        record_property("recovery_s", f"{recovered.recovery_s:.2f}")
    assert disturbed.codes == [-signal.SIGKILL]
    assert "torchrun was killed by SIGKILL; starting again from step " in disturbed.said
    assert "is not usable" in disturbed.said
    check_same(disturbed, shell, tiny_run_model, tmp_path)
