"""``python -m orchestrator.bench WHAT``: what tables of docs/ are made by (benchmarks, checkpoints, planner)."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from launch.environment import child_environment, rank_variables, usable_cores
from orchestrator.bench.case import SHAPES, Case, Measured
from orchestrator.errors import ExitCode, ResourceError
from orchestrator.marks import between_marks

SIDES = ("theirs", "ours")
PRECISIONS = ("fp32", "bf16")
CASE_LIMIT_S, FIRST_STEP_LIMIT_S, POLL_S = 1800, 600, 0.02
MARK = "<!-- {name}: written by `python -m orchestrator.bench {name}` -->"


@dataclass(frozen=True)
class Row:
    """One line of the table: medians over the rounds. ``loss_gap`` is the largest relative gap between the losses."""

    precision: str
    labels: str
    theirs_tokens_per_s: float
    ours_tokens_per_s: float
    speed_ratio: float
    theirs_peak_mb: float
    ours_peak_mb: float
    memory_ratio: float
    loss_gap: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a markdown table or JSON, and write the table into a page where one is named."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.bench", description=main.__doc__)
    parser.add_argument("what", choices=tuple(WHAT))
    parser.add_argument("--rounds", type=int, default=3, help="processes per cell of the table (3)")
    parser.add_argument(
        "--threads", type=int, help="CPU threads of each rank, the same for all sides (the cores; share: dealt out)"
    )
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps of each process (6)")
    parser.add_argument("--layers", type=int, default=16, help="layers of the state that checkpoint saves (16)")
    parser.add_argument("--width", type=int, default=1024, help="its width (1024)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    parser.add_argument("--write", type=Path, action="append", default=[], metavar="PAGE", help="fill its marks there")
    options = parser.parse_args(arguments)
    if options.threads is None:
        options.threads = threads_of(options.what, usable_cores())
    text, summary, code = WHAT[options.what](options)
    print(json.dumps(summary) if options.json else text)
    for path in options.write:
        page = between_marks(path.read_text(encoding="utf-8"), MARK.format(name=options.what), text)
        path.write_text(page, encoding="utf-8")
    return code


def threads_of(what: str, cores: int) -> int:
    """Threads of each rank: as many as leave no core to two ranks of the side that runs most of them at once.

    Example:
        >>> threads_of("train", 8), threads_of("share", 8), threads_of("share", 1)
        (8, 4, 1)
    """
    from orchestrator.bench import sharing

    return max(1, cores // sharing.AT_ONCE) if what == "share" else cores


def _train(options: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    rows = compare(options.rounds, options.threads, options.steps)
    return table(rows), {"threads": options.threads, "rows": [asdict(row) for row in rows]}, 0


def _first_step(options: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    times = [first_step_s() for _ in range(options.rounds)]
    text = f"first step after {statistics.median(times):.1f} s (of {', '.join(f'{each:.1f}' for each in times)})"
    return text, {"first_step_s": times, "median_s": statistics.median(times)}, 0


def _checkpoint(options: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from orchestrator.bench import checkpointing

    rows, costs, state_bytes = checkpointing.measure(options.rounds, options.layers, options.width)
    summary = {"bytes": state_bytes, "rows": [asdict(row) for row in rows], "costs": asdict(costs)}
    return checkpointing.table(rows, costs, state_bytes), summary, 0


def _kills(options: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from orchestrator.bench import killing

    outcomes = [one for asynchronous in (False, True) for one in killing.kill_everywhere(asynchronous)]
    code = 0 if all(one.good for one in outcomes) else int(ExitCode.RED)
    return killing.table(outcomes), {"code": code, "outcomes": [asdict(one) for one in outcomes]}, code


def _plan(options: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from orchestrator.bench import planning

    planned = planning.measure(options.rounds)
    return planning.table(planned), asdict(planned), 0


def _share(options: argparse.Namespace) -> tuple[str, dict[str, Any], int]:
    from orchestrator.bench import sharing

    sides = sharing.measure(options.rounds, options.steps, options.threads)
    text = sharing.table(sides, options.rounds, options.steps, options.threads)
    return text, {"steps": options.steps, "sides": [asdict(side) for side in sides]}, 0


WHAT = {
    "train": _train,
    "first-step": _first_step,
    "checkpoint": _checkpoint,
    "kills": _kills,
    "plan": _plan,
    "share": _share,
}


def compare(rounds: int, threads: int, steps: int) -> list[Row]:
    """Run every cell ``rounds`` times in fresh processes, the two sides taking turns."""
    found: dict[Case, list[Measured]] = {}
    for number, precision, labels, side in product(range(rounds), PRECISIONS, SHAPES, SIDES):
        case = Case(side, precision, labels, threads, steps=steps)
        found.setdefault(case, []).append(measured(case))
        print(f"round {number + 1}/{rounds} {precision} {labels} {side}: {found[case][-1].tokens_per_s:.0f} tokens/s",
              file=sys.stderr, flush=True)  # fmt: skip
    return [
        row(precision, labels, *(found[Case(side, precision, labels, threads, steps=steps)] for side in SIDES))
        for precision, labels in product(PRECISIONS, SHAPES)
    ]


def measured(case: Case) -> Measured:
    """One cell in a process of its own.

    Raises:
        ResourceError: the process failed; the message ends with what it said last.
    """
    threads = {"OMP_NUM_THREADS": str(case.threads), "HF_HUB_OFFLINE": "1"}
    ours = rank_variables(1, case.threads) if case.side == "ours" else {}  # as the launcher starts a rank
    environment = child_environment(ours | threads)
    program = [sys.executable, "-W", "ignore", "-m", "orchestrator.bench.case", json.dumps(asdict(case))]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=CASE_LIMIT_S, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ResourceError(
            f"the benchmark's process {case.side} {case.precision} {case.labels} ended with {done.returncode}: {said}",
            f"python -m orchestrator.bench.case '{json.dumps(asdict(case))}'",
        )
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return Measured(**{**answer, "losses": tuple(answer["losses"])})


def row(precision: str, labels: str, theirs: list[Measured], ours: list[Measured]) -> Row:
    """Medians, and the ratios ours / theirs.

    Example:
        >>> one = Measured(tokens_per_s=100.0, peak_bytes=2_000_000, ready_s=1.0, losses=(2.0,))
        >>> two = Measured(tokens_per_s=150.0, peak_bytes=1_000_000, ready_s=1.0, losses=(2.0,))
        >>> row("fp32", "all", [one], [two]).speed_ratio, row("fp32", "all", [one], [two]).memory_ratio
        (1.5, 0.5)
    """
    speeds = [statistics.median(each.tokens_per_s for each in side) for side in (theirs, ours)]
    peaks = [statistics.median(each.peak_bytes for each in side) / 1e6 for side in (theirs, ours)]
    gap = max(abs(a - b) / abs(a) for a, b in zip(theirs[0].losses, ours[0].losses, strict=True))
    return Row(
        precision, labels, speeds[0], speeds[1], speeds[1] / speeds[0], peaks[0], peaks[1], peaks[1] / peaks[0], gap
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as a markdown table."""
    lines = [
        "| precision | labels | tokens/s theirs | ours | ratio | peak MB theirs | ours | ratio | losses differ by |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in rows:
        speed = f"{each.theirs_tokens_per_s:.0f} | {each.ours_tokens_per_s:.0f} | {each.speed_ratio:.2f}"
        memory = f"{each.theirs_peak_mb:.0f} | {each.ours_peak_mb:.0f} | {each.memory_ratio:.2f}"
        lines.append(f"| {each.precision} | {each.labels} | {speed} | {memory} | {each.loss_gap:.0e} |")
    return "\n".join(lines)


def first_step_s() -> float:
    """Seconds from ``isotrain train`` (one process, warm caches) to the first line of its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        program = [sys.executable, "-m", "orchestrator", "train", "experiment=demo", "cluster=one", "topology.pp=1"]
        overrides = ["topology.dp=1", "steps=1", f"run_dir={run_dir}"]
        began = time.perf_counter()
        process: Any = subprocess.Popen([*program, *overrides], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        took = _until_lines(run_dir / "metrics.jsonl", process, began)
        process.wait(timeout=FIRST_STEP_LIMIT_S)
    return took


def _until_lines(path: Path, process: Any, began: float) -> float:
    while not (path.is_file() and path.stat().st_size):
        if process.poll() not in (None, 0) or time.perf_counter() - began > FIRST_STEP_LIMIT_S:
            process.kill()
            raise ResourceError(
                f"no first step after {time.perf_counter() - began:.0f} s: isotrain train ended with {process.poll()}",
                " ".join(process.args),
            )
        time.sleep(POLL_S)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
