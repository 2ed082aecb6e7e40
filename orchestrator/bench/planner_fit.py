"""Fitting the planner's constants to published runs: each in turn, a little up or down, while the error falls."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from orchestrator.bench.planner_rows import Unreadable, setup_of_row
from orchestrator.bench.planner_score import ODD, Score, predict, read_off, reading, time_errors
from orchestrator.planning.constants import FITTED, Constants
from orchestrator.planning.memory import stage_memory
from orchestrator.planning.setup import Setup
from orchestrator.planning.timing import step_time

OF_MEMORY = ("slack", "context_gb")
SHARES = ("matmul", "matmul_low", "attention", "memory", "link", "network", "hidden", "expert")
"""Constants that are shares of a physical limit: at most 1."""
ROWS_OF_GROUP = 40
"""Rows of a group that the fit looks at: evenly chosen, so that big sweeps take no longer than small tables."""
STEPS = (0.12, 0.05, 0.02)
STEPS_AGAIN = (0.05,)
"""Relative steps of a constant, one after the other; those of a fit that starts from fitted constants."""

MOST_ERROR = 0.4
"""Errors count as at most this: rows that are slow for a reason that is not modelled (a fault, a crowded network) would
otherwise bend every constant towards them."""

Loss = Callable[[Constants], float]


@dataclass(frozen=True)
class Known:
    """A measured row as a setup. ``measured``: seconds, or 1e9 bytes of what the ``kind`` of reading counts."""

    setup: Setup
    measured: float
    kind: str = ""


def fit(rows: Sequence[dict[str, Any]], start: Constants = FITTED, steps: Sequence[float] = STEPS) -> Constants:
    """The constants with which the mean error over groups is smallest nearby, of time and then of memory."""
    times, memories = known_times(rows), known_memories(rows)
    timed = descend(start, lambda constants: time_loss(times, constants), steps, but=OF_MEMORY)
    return descend(timed, lambda constants: memory_loss(memories, constants), steps, only=OF_MEMORY)


def leave_one_out(rows: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """For every group with times: its error with constants that were fitted to all other groups."""
    times = known_times(rows)
    found: dict[str, Score] = {}
    for group in times:
        others = {name: known for name, known in times.items() if name != group}

        def loss(constants: Constants, others: dict[str, list[Known]] = others) -> float:
            return time_loss(others, constants)

        constants = descend(FITTED, loss, STEPS_AGAIN, but=OF_MEMORY)
        its = [predict(row, constants) for row in rows if row.get("group") == group]
        found |= time_errors(its)
    return found


def descend(
    start: Constants, loss: Loss, steps: Sequence[float], but: Sequence[str] = (), only: Sequence[str] = ()
) -> Constants:
    """Move one constant at a time while that helps, in smaller and smaller steps.

    Example:
        >>> found = descend(Constants(latency_s=1.0), lambda one: abs(one.latency_s - 2), [0.5, 0.1, 0.01])
        >>> round(found.latency_s, 1)
        2.0
    """
    names = [name for name in asdict(start) if name not in but and (not only or name in only)]
    best, least = start, loss(start)
    for step in steps:
        moved = True
        while moved:
            moved = False
            for name in names:
                for factor in (1 + step, 1 / (1 + step)):
                    value = getattr(best, name) * factor
                    if (name in SHARES and value > 1) or (name == "slack" and value < 1):
                        continue
                    tried = replace(best, **{name: value})
                    error = loss(tried)
                    if error < least * (1 - 1e-4):
                        best, least, moved = tried, error, True
                        break
    return best


def time_loss(known: dict[str, list[Known]], constants: Constants) -> float:
    """The mean over groups of the mean error of step time."""
    return statistics.mean(
        statistics.mean(_error(step_time(one.setup, constants).total_s, one.measured) for one in group)
        for group in known.values()
    )


def memory_loss(known: dict[str, list[Known]], constants: Constants) -> float:
    """The mean over groups of the mean error of memory; what torch hands out is the same for all constants."""

    def shown(one: Known) -> float:
        fullest = max(stage_memory(one.setup, constants), key=lambda stage: stage.total)
        return read_off(fullest, one.kind) / 1e9

    return statistics.mean(
        statistics.mean(_error(shown(one), one.measured) for one in group) for group in known.values()
    )


def _error(estimated: float, measured: float) -> float:
    return min(abs(estimated / measured - 1), MOST_ERROR)


def known_times(rows: Sequence[dict[str, Any]]) -> dict[str, list[Known]]:
    """Rows with a step time by group, each configuration once, with the median of what was measured."""
    seconds: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    setups: dict[tuple[str, str], Setup] = {}
    for row in rows:
        setup, target = _setup(row, "time"), row.get("target") or {}
        if setup is not None and target.get("step_s"):
            key = (str(row.get("group")), str(row.get("config_key")))
            seconds[key].append(float(target["step_s"]))
            setups.setdefault(key, setup)
    groups: defaultdict[str, list[Known]] = defaultdict(list)
    for key, measured in seconds.items():
        groups[key[0]].append(Known(setups[key], statistics.median(measured)))
    return {group: _some(known) for group, known in groups.items()}


def known_memories(rows: Sequence[dict[str, Any]]) -> dict[str, list[Known]]:
    """Rows by group whose memory reading counts more than the allocator hands out."""
    groups: defaultdict[str, list[Known]] = defaultdict(list)
    for row in rows:
        setup, measured = _setup(row, "memory"), row.get("measured") or {}
        kind = reading(row)
        if setup is not None and measured.get("mem_gb") and kind != "allocated":
            groups[str(row.get("group"))].append(Known(setup, float(measured["mem_gb"]), kind))
    return {group: _some(known) for group, known in groups.items()}


def _setup(row: dict[str, Any], metric: str) -> Setup | None:
    if not (row.get("scorable") or {}).get(metric):
        return None
    try:
        return setup_of_row(row)
    except (Unreadable, *ODD):
        return None


def _some(known: list[Known]) -> list[Known]:
    """At most ROWS_OF_GROUP, evenly chosen."""
    return known[:: -(-len(known) // ROWS_OF_GROUP)]
