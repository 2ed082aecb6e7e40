"""What one base for several points of a sweep saves: the same sweep one after another, at once, and in turns."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.environment import child_environment
from orchestrator.errors import ResourceError

POINTS, AT_ONCE = 4, 2
WORDS = (
    *("model=smollm2_135m", "data=lighthouse", "cluster=one", "batch.global_sequences=4", "batch.sequence_tokens=128"),
    *("tuner.r=8,16", "optimizer.lr=1e-4,3e-4", "checkpoint.every_steps=0", "metrics.progress=false"),
)
SIDES: Mapping[str, tuple[str, ...]] = {
    "one after another": (),
    f"{AT_ONCE} at a time (`--jobs {AT_ONCE}`)": ("--jobs", str(AT_ONCE)),
    "in turns on one base (`sweep.share_base=true`)": ("sweep.share_base=true",),
}
LIMIT_S = 3600


@dataclass(frozen=True)
class Swept:
    """One sweep. ``cpu_s``: of all its processes. ``peak_bytes``: of all ranks that ran at once.

    ``losses``: of every step of every point.
    """

    wall_s: float
    cpu_s: float
    peak_bytes: int
    losses: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Side:
    """A way to run the sweep: medians over the rounds; ``loss_gap``: the largest relative one to the first way."""

    name: str
    wall_s: float
    cpu_s: float
    peak_bytes: float
    loss_gap: float


def measure(rounds: int, steps: int, threads: int) -> list[Side]:
    """Run every side ``rounds`` times in fresh processes, taking turns."""
    found: dict[str, list[Swept]] = {name: [] for name in SIDES}
    for number in range(rounds):
        for name, words in SIDES.items():
            found[name].append(swept(words, steps, threads))
            wall_s = found[name][-1].wall_s
            print(f"round {number + 1}/{rounds} {name}: {wall_s:.1f} s", file=sys.stderr, flush=True)
    first = next(iter(found.values()))[0]
    return [side(name, runs, first) for name, runs in found.items()]


def swept(words: Sequence[str], steps: int, threads: int) -> Swept:
    """Run the sweep once in a new folder.

    Raises:
        ResourceError: it failed; the message ends with what it said last.
    """
    environment = child_environment({"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "ISOTRAIN_LEDGER": ""})
    with tempfile.TemporaryDirectory() as folder:
        argv = [*WORDS, f"steps={steps}", f"run_dir={folder}/sweep", *words]
        program = [sys.executable, "-m", "orchestrator", "sweep", *argv, "--json"]
        began, spent = time.perf_counter(), _children_cpu_s()
        done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        wall_s, cpu_s = time.perf_counter() - began, _children_cpu_s() - spent
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
            raise ResourceError(f"the sweep ended with {done.returncode}: {said}", f"isotrain sweep {' '.join(argv)}")
        points = [point["folder"] for point in json.loads(done.stdout)["points"]]
        logged = [_logged(Path(folder) / "sweep" / point) for point in points]
    peaks = [max(int(line["peak_memory_bytes"]) for line in lines) for lines in logged]
    peak = sum(sorted(peaks)[-AT_ONCE:]) if "--jobs" in words else max(peaks)
    return Swept(wall_s, cpu_s, peak, tuple(tuple(line["loss"] for line in lines) for lines in logged))


def _children_cpu_s() -> float:
    """Of all processes that have ended below this one, and were waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _logged(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def side(name: str, runs: Sequence[Swept], first: Swept) -> Side:
    """Medians, and how far losses are from the first side's.

    Example:
        >>> runs = [Swept(wall_s, 4.0, 8, ((2.0,),)) for wall_s in (3.0, 1.0, 2.0)]
        >>> side("a", runs, Swept(3.0, 4.0, 8, ((4.0,),)))
        Side(name='a', wall_s=2.0, cpu_s=4.0, peak_bytes=8, loss_gap=0.5)
    """
    gaps = [
        abs(one - other) / abs(other)
        for run in runs
        for losses, theirs in zip(run.losses, first.losses, strict=True)
        for one, other in zip(losses, theirs, strict=True)
    ]
    wall_s, cpu_s, peak = (
        statistics.median(getattr(run, key) for run in runs) for key in ("wall_s", "cpu_s", "peak_bytes")
    )
    return Side(name, wall_s, cpu_s, peak, max(gaps))


def table(sides: Sequence[Side], rounds: int, steps: int, threads: int) -> str:
    """The sides as a markdown table."""
    first = sides[0]
    lines = [
        f"| {POINTS} points of {steps} steps, SmolLM2-135M, {threads} threads a rank, median of {rounds} "
        "| wall s | ratio | CPU s | ratio | peak MB of all ranks | losses differ by |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in sides:
        pairs = ((one.wall_s, first.wall_s), (one.cpu_s, first.cpu_s))
        times = " | ".join(f"{ours:.1f} | {ours / theirs:.2f}" for ours, theirs in pairs)
        lines.append(f"| {one.name} | {times} | {one.peak_bytes / 1e6:.0f} | {one.loss_gap:.0e} |")
    return "\n".join(lines)
