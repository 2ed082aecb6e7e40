"""A soak: random faults at random times, by a seed, and then the same steps undisturbed; both must end alike."""

from __future__ import annotations

import hashlib
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end.conftest import make_tiny_run
from tests.end_to_end.shell import Folder, Shell
from tests.faults.disturbed import FAULTS, OF_LAUNCHER, Disturbed, Recovered
from tests.faults.running import LONGEST_S
from tests.faults.table import machine

EVERY, KEPT = 10, 4
WITHOUT_END = 1_000_000


@dataclass(frozen=True)
class Soak:
    """``faults`` at random times in ``minutes``, of a run on TP x PP ranks; ``seed`` decides on both."""

    faults: int
    minutes: float
    seed: int
    tp: int = 2
    pp: int = 2


@dataclass(frozen=True)
class Planned:
    """A fault, ``at_s`` seconds after the first step, or later if the one before is not over."""

    at_s: float
    kind: str
    rank: int


@dataclass(frozen=True)
class Soaked:
    """What came of it.

    ``useful_s``: of the steps that count, each once; ``wall_s``: of everything, from the first command to the last
    save; ``undisturbed_s``: what the same steps took alone, with their start; ``differs``: what is not as in the
    undisturbed run, and what was left behind.
    """

    soak: Soak
    recovered: tuple[Recovered, ...]
    steps: int
    useful_s: float
    wall_s: float
    undisturbed_s: float
    differs: tuple[str, ...]

    @property
    def goodput(self) -> float:
        """The share of the time that went into steps that count."""
        return self.useful_s / self.wall_s

    @property
    def is_red(self) -> bool:
        """Whether the runs differ, or one recovery took too long."""
        return bool(self.differs) or any(one.recovery_s > LONGEST_S for one in self.recovered)


def schedule(soak: Soak) -> list[Planned]:
    """The faults of a soak, the same for the same numbers: every kind as often as every other, in a random order.

    Example:
        >>> [planned.rank for planned in schedule(Soak(faults=3, minutes=1, seed=7))] == [
        ...     planned.rank for planned in schedule(Soak(faults=3, minutes=1, seed=7))]
        True
    """
    at_random = random.Random(soak.seed)
    kinds: list[str] = []
    while len(kinds) < soak.faults:
        kinds += at_random.sample(sorted(FAULTS), len(FAULTS))
    times = sorted(at_random.uniform(0, 60 * soak.minutes) for _ in range(soak.faults))
    ranks = [at_random.randrange(soak.tp * soak.pp) for _ in range(soak.faults)]
    return [
        Planned(at_s, kind, -1 if kind in OF_LAUNCHER else rank)
        for at_s, kind, rank in zip(times, kinds, ranks, strict=False)
    ]


def run_soak(soak: Soak, folder: Path) -> Soaked:
    """Train and disturb in ``folder``; then train as many steps undisturbed, and compare bit for bit."""
    shell, tiny = Shell(folder, folder / "cache"), make_tiny_run(folder)
    keys: dict[str, object] = {"cluster": "laptop", "topology__tp": soak.tp, "topology__pp": soak.pp}
    keys |= {"topology__dp": 1, "optimizer__schedule": "constant", "optimizer__lr": 0.0003}
    keys |= {"checkpoint__every_steps": EVERY, "checkpoint__keep_last": KEPT}
    keys |= {"recovery__silent_s": 6, "recovery__restarts": 10}
    run, alone = Folder(folder / "disturbed"), Folder(folder / "undisturbed")
    words = tiny.words(**keys, run_dir=run.path, steps=WITHOUT_END)
    disturbed = Disturbed(shell, words, run, soak.tp * soak.pp)
    try:
        recovered, wall_s = _disturb(soak, disturbed)
    finally:
        disturbed.kill()
    steps = int(run.latest.removeprefix("step-"))
    _say(f"{len(recovered)} faults, {steps} steps in {wall_s:.0f} s; now the same steps undisturbed")
    started = time.monotonic()
    keys |= {"checkpoint__every_steps": 0}  # one save, at its end: what is saved in between changes no number
    undisturbed = Disturbed(shell, tiny.words(**keys, run_dir=alone.path, steps=steps), alone, soak.tp * soak.pp)
    undisturbed.start()
    try:
        undisturbed.finish(limit_s=10 * wall_s)
    finally:
        undisturbed.kill()
    alone_s = time.monotonic() - started
    useful_s = sum(float(line["step_s"]) for line in run.metrics.values())
    differs = (*differences(run, alone, steps), *disturbed.leftovers())
    return Soaked(soak, tuple(recovered), steps, useful_s, wall_s, alone_s, differs)


def _disturb(soak: Soak, disturbed: Disturbed) -> tuple[list[Recovered], float]:
    """Every fault in its time; then on until the time is over, and a polite end."""
    at_random, recovered = random.Random(soak.seed + 1), []
    first = time.monotonic()
    disturbed.start()
    disturbed.wait_beyond(2 * EVERY)
    started = time.monotonic()
    for number, planned in enumerate(schedule(soak), start=1):
        _sleep_until(started + planned.at_s)
        recovered.append(disturbed.hit(planned.kind, planned.rank, at_random))
        took_s = recovered[-1].recovery_s
        _say(f"{number}/{soak.faults} after step {recovered[-1].step}: {planned.kind}: trains again in {took_s:.1f} s")
    _sleep_until(started + 60 * soak.minutes)
    disturbed.stop()
    return recovered, time.monotonic() - first


def differences(run: Folder, alone: Folder, steps: int) -> list[str]:
    """What is not the same bit for bit: what was learned, the optimizer's state, and every step's loss."""
    found = []
    ours, theirs = (digests(folder.checkpoint(steps)) for folder in (run, alone))
    found += [f"{name} differs" for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)]
    losses, undisturbed = run.losses, alone.losses
    wrong = [step for step in range(1, steps + 1) if losses.get(step) != undisturbed.get(step)]
    return found + ([f"the loss of {len(wrong)} steps differs, first of step {wrong[0]}"] if wrong else [])


def digests(checkpoint: Path) -> dict[str, str]:
    """SHA-256 of every tensor file."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    assert files
    return {str(file.relative_to(checkpoint)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def table(soaked: Soaked) -> str:
    """What came of it, for a page."""
    soak, times = soaked.soak, [one.recovery_s for one in soaked.recovered]
    lines = ["| fault | times | mean s to recover | longest |", "| --- | --: | --: | --: |"]
    for kind in FAULTS:
        of_kind = [one.recovery_s for one in soaked.recovered if one.kind == kind]
        if of_kind:
            lines.append(f"| {kind} | {len(of_kind)} | {statistics.mean(of_kind):.1f} | {_longest(of_kind)} |")
    lines.append(f"| **all** | {len(times)} | **{statistics.mean(times):.1f}** | {_longest(times)} |")
    same = (
        "the same as without any fault, bit for bit"
        if not soaked.differs
        else "**differ**: " + ", ".join(soaked.differs)
    )
    lines += [
        "",
        f"{soak.faults} faults in {soaked.wall_s / 60:.0f} minutes (seed {soak.seed}), TP={soak.tp} x PP={soak.pp} on "
        f"{machine()}. Goodput {soaked.goodput:.0%} ({soaked.steps} steps). Mean time to recover "
        f"{statistics.mean(times):.1f} s, from the fault to the first new step. Adapter, Adam moments and all losses: "
        f"{same}.",
    ]  # fmt: skip
    return "\n".join(lines)


def _longest(times: Sequence[float]) -> str:
    """The longest time, marked where it is too long.

    Example:
        >>> _longest([12.0, 14.06]), _longest([12.0, 31.0])
        ('14.1', '**31.0: too late**')
    """
    longest = f"{max(times):.1f}"
    return f"**{longest}: too late**" if max(times) > LONGEST_S else longest


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
