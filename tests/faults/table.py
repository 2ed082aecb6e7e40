"""The battery as a page shows it: case, outcome, how long its runs took to recover."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version

from tests.faults.battery import Case
from tests.faults.running import LONGEST_S, Ended

GREEN, RED, LATE, SKIPPED, OPEN, LIMIT = "passes", "**fails**", "**too late**", "not run", "not tested yet", "limit"


def outcome(case: Case, ended: Mapping[str, Ended]) -> str:
    """One word for a case: the worst of its tests, or what stands instead of tests."""
    outcomes = {ended[node].outcome for node in case.tests}
    if "failed" in outcomes:
        return RED
    if _late(case, ended):
        return LATE
    if "skipped" in outcomes:
        return SKIPPED
    if outcomes:
        return GREEN
    return LIMIT if case.limit else OPEN


def is_red(cases: Sequence[Case], ended: Mapping[str, Ended]) -> bool:
    """Whether a case fails, or a run of it recovered too late; one that could not run here is not red."""
    return any(outcome(case, ended) in (RED, LATE) for case in cases)


def table(cases: Sequence[Case], ended: Mapping[str, Ended]) -> str:
    """A line per case, and a sum."""
    lines = ["| | what happens | outcome | tests | s to recover | not held |", "| --: | --- | --- | --: | --: | --- |"]
    lines += [_line(case, ended) for case in cases]
    outcomes = [outcome(case, ended) for case in cases]
    kinds = [kind for kind in (GREEN, RED, LATE, SKIPPED, OPEN, LIMIT) if kind in outcomes]
    counts = ", ".join(f"{outcomes.count(kind)} {kind.strip('*')}" for kind in kinds)
    functions = len({node for case in cases for node in case.tests})
    took_s = sum(one.duration_s for one in ended.values())
    lines += [
        "",
        f"{len(cases)} cases: {counts}. {functions} test functions took {took_s / 60:.0f} minutes on {machine()}.",
    ]
    return "\n".join(lines)


def machine() -> str:
    """Where this was measured."""
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {platform.machine()}, Linux, torch {version('torch').partition('+')[0]} (gloo)"


def _recovered(case: Case, ended: Mapping[str, Ended]) -> list[float]:
    return [value for node in case.tests for value in ended[node].recovery_s]


def _late(case: Case, ended: Mapping[str, Ended]) -> list[float]:
    return [value for value in _recovered(case, ended) if value > LONGEST_S]


def _line(case: Case, ended: Mapping[str, Ended]) -> str:
    tests = [ended[node] for node in case.tests]
    recovered = _recovered(case, ended)
    seconds = ""
    if recovered:
        seconds = f"{statistics.median(recovered):.1f}"
        seconds += f" ({min(recovered):.1f} to {max(recovered):.1f} of {len(recovered)})" if len(recovered) > 1 else ""
    said = [f"**{one.node.rpartition('::')[2]}**: {one.why}" for one in tests if one.outcome != "passed"]
    said += [f"trained again after {value:.1f} s, not within {LONGEST_S:.0f} s" for value in _late(case, ended)]
    said += [case.limit] if case.limit else []
    said += [f"not tested yet: {case.open}"] if case.open else []
    words = "; ".join(said).replace("|", "\\|").replace("\n", " ")
    return f"| {case.number} | {case.title} | {outcome(case, ended)} | {len(case.tests) or ''} | {seconds} | {words} |"
