"""The ledger: what runs took and held, beside what their plans said; later plans of similar jobs are held against it.

One SQLite file for all runs of a user on a machine (``launch.environment.ledger_file``). Any number of runs write at
once: SQLite locks the file for each line. It is a convenience: where it is broken, full or read-only a run goes on
without, and says so.
"""

from __future__ import annotations

import json
import math
import socket
import sqlite3
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from orchestrator.config.job import JobConfig
from orchestrator.planning.plan import History, Plan
from orchestrator.planning.shape import shape_of
from parallel.specs import ModelSpec

PATIENCE_S = 10.0
"""How long a writer waits for others."""
NEWEST = 50
"""How many similar runs count, the newest."""
FEWEST_STEPS = 2
"""Steps beside the first, which warms up, that make a measurement."""
TABLE = """CREATE TABLE IF NOT EXISTS runs (
    id INTEGER PRIMARY KEY, at REAL NOT NULL, host TEXT NOT NULL, likeness TEXT NOT NULL, topology TEXT NOT NULL,
    steps INTEGER NOT NULL, estimated_s REAL NOT NULL, measured_s REAL NOT NULL,
    estimated_bytes INTEGER NOT NULL, peak_bytes INTEGER NOT NULL, plan TEXT NOT NULL)"""
INDEX = "CREATE INDEX IF NOT EXISTS by_likeness ON runs (likeness, id)"


@dataclass(frozen=True)
class Measured:
    """What a run took: the median of its steps' seconds without the first, of how many, and its fullest rank's peak."""

    step_s: float
    steps: int
    peak_bytes: int


def likeness(job: JobConfig, model: ModelSpec, plan: Plan) -> str:
    """What similar runs have in common: device, precision, kind and size of the model, tuner, and which axes are cut.

    Sizes are alike within the square root of two.
    """
    kind = "latent" if model.latent else "experts" if model.is_moe else "dense"
    size = round(math.log2(shape_of(model).parameters()))
    tuner = f"{job.tuner.name}{'-' + job.tuner.quantise if job.tuner.quantise else ''}"
    tuner += f" {job.objective.name}" if job.objective.name != "sft" else ""
    axes = "+".join(axis for axis, count in vars(plan.topology).items() if count > 1) or "one"
    device = (plan.cluster.gpu if plan.cluster else None) or plan.device
    return f"{device} {plan.precision} {kind} 2^{size} {tuner} {plan.recompute} {axes}"


def steps_of(metrics: Path, first_step: int) -> list[float]:
    """Seconds of the steps from ``first_step`` on that a metrics file has; none where there is no such file."""
    try:
        lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []
    return [float(line["step_s"]) for line in lines if line["step"] >= first_step]


def measured(step_s: Sequence[float], peak_bytes: int) -> Measured | None:
    """What steps of one launch tell; None where they are too few.

    Example:
        >>> measured([9.0, 1.0, 3.0, 2.0], 100)
        Measured(step_s=2.0, steps=3, peak_bytes=100)
        >>> measured([9.0, 1.0], 100) is None
        True
    """
    warm = step_s[1:]
    return Measured(statistics.median(warm), len(warm), peak_bytes) if len(warm) >= FEWEST_STEPS else None


def append(file: Path, alike: str, plan: Plan, found: Measured) -> str:
    """Append a run; returns why it could not be, or nothing."""
    most = max(stage.total for stage in plan.memory)
    row = (
        *(time.time(), socket.gethostname(), alike, str(plan.topology), found.steps),
        *(plan.step_time.total_s, found.step_s, most, found.peak_bytes),
        replace(plan, rejected=()).to_json(),
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(file, timeout=PATIENCE_S)) as ledger, ledger:
            ledger.execute("BEGIN IMMEDIATE")
            ledger.execute(TABLE)
            ledger.execute(INDEX)
            ledger.execute(f"INSERT INTO runs VALUES (NULL{', ?' * len(row)})", row)
    except (sqlite3.Error, OSError) as error:
        return f"this run is not in the ledger {file}: {error}"
    return ""


def history(file: Path | None, alike: str) -> tuple[History | None, str]:
    """What similar runs took in terms of their estimates, None where there is none; and why it cannot be known."""
    if file is None or not file.is_file():
        return None, ""
    words = "SELECT measured_s / estimated_s, 1.0 * peak_bytes / estimated_bytes FROM runs WHERE likeness = ? "
    try:
        with _reading(file) as ledger:
            rows = ledger.execute(words + "ORDER BY id DESC LIMIT ?", (alike, NEWEST)).fetchall()
    except sqlite3.Error as error:
        return None, f"the ledger {file} cannot be read: {error}"
    if not rows:
        return None, ""
    times, peaks = (statistics.median(column) for column in zip(*rows, strict=True))
    return History(len(rows), times, peaks), ""


@contextmanager
def _reading(file: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=PATIENCE_S)) as ledger:
        yield ledger


def corrected(plan: Plan, job: JobConfig, model: ModelSpec, file: Path | None) -> Plan:
    """A plan with what similar runs say of its estimates, in its reasons; the choice stays, for layouts that nobody has
    run have nothing said of them."""
    found, problem = history(file, likeness(job, model, plan))
    if problem:
        return replace(plan, reasons=(*plan.reasons, problem))
    if found is None:
        return plan
    plan = replace(plan, history=found)
    runs = f"{found.runs} similar run{'s' if found.runs > 1 else ''}"
    words = (
        f"{runs} in the ledger: steps took {found.time:.2f} and memory {found.memory:.2f} times the estimate; with "
        f"that {plan.expected_step_s:.3g} s per step and {plan.expected_bytes / 2**30:.1f} GiB on the fullest rank"
    )
    return replace(plan, reasons=(*plan.reasons, words))
