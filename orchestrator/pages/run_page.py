"""A run as a page: how far it is, its curves, its launches, its ranks, its checkpoints, its job and its plan."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.config.building import job_to_yaml
from orchestrator.pages.attempts import Attempt, attempts_chart, attempts_of, clock
from orchestrator.pages.curves import Point, curve_chart, spread_chart
from orchestrator.pages.document import facts, folded, page, section, tiles, words, write_page
from orchestrator.pages.drawing import figure, seconds
from orchestrator.pages.markup import Markup, table, tag
from orchestrator.pages.plan_page import plan_sections
from orchestrator.pages.run_folder import RunFolder, number, read_run
from orchestrator.planning.memory import GIB

REPORT = "report.html"
NEWEST = 40
"""Rows of a table: the newest launches, starts and checkpoints."""
RECENT = 50
"""Steps that speed is told from."""


CURVES: tuple[tuple[str, str, float, Callable[[float], str]], ...] = (
    ("loss", "loss", 1, figure),
    ("learning_rate", "learning rate", 1, figure),
    ("tokens_per_s", "tokens/s", 1, figure),
    ("grad_norm", "gradient norm", 1, figure),
    ("step_s", "seconds of a step", 1, seconds),
    ("peak_memory_bytes", "memory of the first rank, its peak so far", GIB, "{:.3g} GiB".format),
)
"""Values of a step: their names in metrics.jsonl and here, what they are divided by, and their words."""


def report_end(run_dir: Path) -> None:
    """Write the page of a run that has just ended; whatever is wrong with it, the run has ended all the same."""
    try:
        write_page(run_dir / REPORT, run_page(read_run(run_dir)))
    except Exception as error:  # noqa: BLE001  a picture must not take a run's exit code, or its place in the queue
        print(f"{run_dir / REPORT} was not written: {error!r}", file=sys.stderr, flush=True)


def run_page(run: RunFolder) -> str:
    """The whole page."""
    attempts = attempts_of(run)
    return page(
        f"Run: {run.path.name}",
        f"{run.path}, {state(run, attempts)}",
        tiles(list(_tiles(run, attempts))),
        *([section("What cannot be read", "", words(run.problems))] if run.problems else []),
        *_curves(run),
        *_attempts(run, attempts),
        *_ranks(run),
        *_checkpoints(run),
        *_asked(run),
    )


def state(run: RunFolder, attempts: list[Attempt]) -> str:
    """How the run is, in words."""
    if run.alive:
        return f"running: {run.alive} ranks are on this machine"
    if not attempts:
        return "not started yet"
    last = attempts[-1]
    return f"{last.look[1]} ({clock(last.ended)})"


def _tiles(run: RunFolder, attempts: list[Attempt]) -> Iterator[tuple[str, str, str]]:
    last = run.steps[-1] if run.steps else {}
    of = f"of {run.job.steps:,}" if run.job else ""
    yield "step", f"{int(number(last, 'step') or 0):,}", of
    if (loss := number(last, "loss")) is not None:
        yield "loss", f"{loss:.4f}", "of the last step"
    for name, label, told in (
        ("tokens_per_s", "tokens/s", figure),
        ("mfu", "MFU", "{:.1%}".format),
        ("step_s", "step", seconds),
    ):
        recent = [value for one in run.steps[-RECENT:] if (value := number(one, name)) is not None]
        if recent:
            yield label, told(statistics.median(recent)), f"median of {len(recent)} steps"
    if run.paces:
        most = max(run.paces, key=lambda pace: pace.peak_memory_bytes)
        yield "fullest rank", f"{most.peak_memory_bytes / GIB:.3g} GiB", f"measured, rank {most.rank}"
    yield "launches", str(len(attempts)), f"{sum(one.code not in (0, None) for one in attempts)} ended early"
    saved = run.checkpoints[-1].step if run.checkpoints else 0
    yield "saved step", f"{saved:,}", f"{len(run.checkpoints)} checkpoints"


def _curves(run: RunFolder) -> Iterator[Markup]:
    for name, label, unit, told in CURVES:
        values = [(int(one["step"]), number(one, name)) for one in run.steps if name in one]
        points: list[Point] = [(step, None if value is None else value / unit) for step, value in values]
        if points:
            yield section(label[0].upper() + label[1:], "", curve_chart(points, label, told), half=True)


def _attempts(run: RunFolder, attempts: list[Attempt]) -> Iterator[Markup]:
    if not attempts:
        return
    rows = [
        (str(order), clock(one.started), seconds(one.ended - one.started), one.look[1], one.words, one.ranks)
        for order, one in list(enumerate(attempts, 1))[-NEWEST:]
    ]
    listed = table(["", "started", "lasted", "end", "words", "what ran"], rows)
    note = "Each time that ranks were started: by a user, by Slurm, or again after a failure."
    yield section("Launches", note, attempts_chart(attempts, run.checkpoints), listed)


def _ranks(run: RunFolder) -> Iterator[Markup]:
    if not run.paces:
        return
    first = min(run.paces, key=lambda pace: pace.wait_s)
    note = (
        f"Of the newest {max(pace.steps for pace in run.paces)} steps since the last start. Ranks of one step wait for "
        f"each other inside of it, so who is slow shows by waiting least at its end: here rank {first.rank} on "
        f"{first.host} ({seconds(first.wait_s)})."
    )
    parts = [spread_chart(run.paces)]
    if run.plan:
        parts.append(_memory_table(run))
    yield section("Ranks", note if len(run.paces) > 1 else "Of the newest steps since the last start.", *parts)


def _memory_table(run: RunFolder) -> Markup:
    """Measured peaks beside the plan's estimate, for each stage."""
    assert run.plan is not None
    topology, rows = run.plan.topology, []
    for stage, planned in enumerate(run.plan.memory):
        here = [pace for pace in run.paces if pace.rank // topology.stage_ranks == stage]
        if here:
            most = max(here, key=lambda pace: pace.peak_memory_bytes)
            share = most.peak_memory_bytes / planned.total
            rows.append(
                (
                    str(stage),
                    f"{planned.total / GIB:.2f}",
                    f"{most.peak_memory_bytes / GIB:.2f}",
                    f"{share:.2f}",
                    str(most.rank),
                )
            )
    return table(["stage", "planned GiB", "measured GiB", "measured / planned", "of rank"], rows)


def _checkpoints(run: RunFolder) -> Iterator[Markup]:
    if run.checkpoints:
        rows = [
            (
                f"{one.step:,}",
                "-" if one.loss is None else f"{one.loss:.4f}",
                f"{one.bytes / 2**20:,.1f}",
                clock(one.time),
                one.topology,
            )
            for one in run.checkpoints[-NEWEST:]
        ]
        yield section("Checkpoints", "", table(["step", "loss", "MiB", "saved", "by"], rows), half=True)


def _asked(run: RunFolder) -> Iterator[Markup]:
    if run.starts:
        yield section("Environment", "Of the newest start.", _environment(run), half=bool(run.checkpoints))
    if run.job and run.plan:
        yield from plan_sections(run.plan, run.job, None)
    if run.plan:
        yield section("Why this plan", "", words(run.plan.reasons))
    if run.job:
        note = "The whole job: isotrain train job.yaml run_dir=ANOTHER runs it again."
        yield section("The job", note, folded("show", tag("pre", job_to_yaml(run.job))))


def _environment(run: RunFolder) -> Markup:
    newest = run.starts[-1]
    values = {name: newest.get(name) for name in ("time", "host", "scheduler", "folder", "system", "python")}
    git, packages = newest.get("git"), newest.get("packages")
    if isinstance(git, dict):
        values["commit"] = f"{git.get('commit')}{', with changes' if git.get('changed') else ''}"
    values |= packages if isinstance(packages, dict) else {}
    return facts([(str(name), str(value)) for name, value in values.items() if value])
