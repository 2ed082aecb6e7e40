"""``isotrain sweep``: its arguments, and the table at its end."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.command import WIDTH_ELSEWHERE, Command, add_overrides
from orchestrator.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from orchestrator.sweeps.book import Book, Metric
    from orchestrator.sweeps.planning import PlannedSweep


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} should be at least 1")
    return number


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``isotrain sweep``."""
    add_overrides(parser, "; or the folder of a sweep: its words again")
    parser.add_argument("--jobs", type=_at_least_one, metavar="N", help="points that train at once (1; on Slurm: all)")
    parser.add_argument("--best", default="loss", metavar="METRIC[:max]", help="what points are compared by (loss)")
    parser.add_argument("--dry-run", action="store_true", help="plan every point, and start nothing")


def run_sweep(arguments: argparse.Namespace) -> int:
    """Plan all points, run or submit those that are missing, and show how they compare."""
    from launch.environment import rank_environment
    from orchestrator.config.grid import grid
    from orchestrator.config.multirun import is_hydras
    from orchestrator.sweeps.planning import plan_sweep, words_of_folders
    from orchestrator.sweeps.running import run_here
    from orchestrator.sweeps.searching import are_for_slurm, asked_metric, plan_anywhere, plan_only
    from orchestrator.sweeps.sharing import check_sharing, launches

    if rank_environment() is not None:
        raise ConfigError("sweep starts its own ranks, and this process is already one (RANK is set)", "isotrain sweep")
    metric = asked_metric(arguments.best)
    words = words_of_folders(arguments.overrides)
    if any(is_hydras(word) for word in words):
        return _search(words, arguments)
    sweep = plan_sweep(words, grid(words), plan_only if arguments.dry_run else plan_anywhere)
    check_sharing(sweep)
    _say(_summary(sweep, arguments.jobs))
    together = [one for one in launches(sweep.waiting) if len(one.points) > 1]
    for one in together:
        _say(one.words)
    if are_for_slurm(sweep):
        return _sweep_on_slurm(sweep, metric, arguments)
    if arguments.dry_run:
        _show(sweep.folder, sweep.book(metric), arguments.json, 0, {"together": [one.numbers for one in together]})
        return 0
    book, code = run_here(sweep, metric, arguments.jobs or 1, _say)
    return report(sweep.folder, book, arguments.json, code)


def _search(words: Sequence[str], arguments: argparse.Namespace) -> int:
    from orchestrator.sweeps.searching import search

    if arguments.dry_run:
        raise ConfigError("--dry-run: Hydra's sweepers choose points as they go", "leave it out, or the words of hydra")
    jobs = [f"hydra.launcher.jobs={arguments.jobs}"] if arguments.jobs else []
    best = [f"hydra.launcher.best='{arguments.best}'"] if arguments.best != "loss" else []
    folder, book, code = search([*words, *jobs, *best], _say)
    return report(folder, book, arguments.json, code)


def _sweep_on_slurm(sweep: PlannedSweep, metric: Metric, arguments: argparse.Namespace) -> int:
    from orchestrator.sweeps.array import array_script, submit_sweep

    if arguments.dry_run:
        script = array_script(sweep, sweep.waiting, arguments.jobs)
        _show(sweep.folder, sweep.book(metric), arguments.json, 0, {"script": script})
        if not arguments.json:
            print(f"\n{script}", end="")
        return 0
    book, job_id = submit_sweep(sweep, metric, arguments.jobs, _say)
    said = f"job {job_id} is submitted" if job_id else "every point that is missing waits or runs already"
    _show(sweep.folder, book, arguments.json, 0, {"job_id": job_id})
    _say(f"{said}: isotrain status|wait|cancel {sweep.folder}")
    _say(f"then, how they compare: isotrain sweep {sweep.folder}")
    return 0


def _summary(sweep: PlannedSweep, jobs: int | None) -> str:
    counts = {"pruned": "impossible", "done": "finished already", "waiting": "to run"}
    there = {state: sum(one.state == state for one in sweep.points) for state in counts}
    words = [f"{count} {counts[state]}" for state, count in there.items() if count]
    at_once = f", {jobs} at a time" if jobs and there["waiting"] > jobs else ""
    return f"sweep of {len(sweep.points)} points in {sweep.folder}: {', '.join(words)}{at_once}"


def report(folder: Path, book: Book, as_json: bool, code: int) -> int:
    """Draw the picture, show the table, say which point is best and what to type next; returns ``code``."""
    from orchestrator.config.building import read_job
    from orchestrator.sweeps.picture import write_picture

    picture = write_picture(folder, book)
    _show(folder, book, as_json, code, {"plot": str(picture)} if picture else {})
    best = book.best
    if best is not None:
        _say(f"best {book.metric.name}: {best.value:.4f}, point {best.point.number}: {best.point.words}")
        run = folder / best.point.folder
        kind = "merged model" if read_job(run).tuner.name == "full" else "peft adapter"
        _say(f"next: isotrain export {shlex.quote(str(run))} --to {kind}")
    elif any(row.state == "done" for row in book.rows):
        _say(f"no finished point has a number for {book.metric.name}: --best NAME takes a column of metrics.jsonl")
    if picture:
        _say(f"plot: {picture}")
    if code:
        _say(f"hint: {_what_next(folder, book)}")
    return code


def _what_next(folder: Path, book: Book) -> str:
    """The command after a sweep that is not whole: a point that gave up does so again where nothing is changed."""
    missing = [row for row in book.rows if row.state in ("failed", "interrupted", "waiting")]
    gave_up = [row for row in missing if row.code == ExitCode.GAVE_UP]
    if gave_up and len(gave_up) == len(missing):
        run = shlex.quote(str(folder / gave_up[0].point.folder))
        return f"isotrain resume {run} KEY=VALUE   (with the same job it would give up again)"
    return f"isotrain sweep {shlex.quote(str(folder))}   (does what is missing)"


def _show(folder: Path, book: Book, as_json: bool, code: int, more: dict[str, Any] | None = None) -> None:
    from orchestrator.sweeps.book import row_values

    if not as_json:
        _print_table(book)
        return
    best = book.best
    values = {"code": code, "run_dir": str(folder), "best": row_values([best])[0] if best else None}
    wrong = [f"point {row.point.number} {row.state}" for row in book.rows if row.state in ("failed", "interrupted")]
    error = {"error": ", ".join(wrong) or "interrupted"} if code else {}
    print(json.dumps(values | {"points": row_values(book.rows)} | (more or {}) | error))


def _print_table(book: Book) -> None:
    """Finished points first, the best of them on top."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from orchestrator.sweeps.book import key_of

    keys = list(dict.fromkeys(key_of(text) for row in book.rows for text in row.point.overrides))
    columns = ("point", *keys, "state", "code", "step", book.metric.name, "seconds", "why")
    table = Table(*columns, box=None, pad_edge=False)
    for row in book.ranked():
        values = {key_of(text): text.partition("=")[2] for text in row.point.overrides}
        cells: Sequence[str] = (
            *(str(row.point.number), *(values.get(key, "") for key in keys), row.state),
            *("" if row.code is None else str(row.code), f"{row.step}/{row.steps}" if row.steps else ""),
            *("" if row.value is None else f"{row.value:.4f}", f"{row.seconds:.1f}" if row.seconds else ""),
            row.reason,
        )
        table.add_row(*map(Text, cells), style="bold" if row == book.best else None)
    Console(width=None if sys.stdout.isatty() else WIDTH_ELSEWHERE).print(table)


SWEEP = Command(
    "Train a job once for each combination of several values, and compare; goes on where it was stopped.",
    "isotrain sweep model=smollm2_135m data=lighthouse tuner.r=8,16 optimizer.lr=1e-4,3e-4 run_dir=runs/sweep",
    add_sweep,
    run_sweep,
)
