"""Nodes that a run is lost to again and again: left out, where fewer nodes will do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch.slurm.commands import SlurmError
from launch.slurm.nodes import seen_nodes
from launch.slurm.step import StepResult
from orchestrator.jobs.record import Start, read_faults, write_faults
from orchestrator.runs import latest_step

# A rank's end that may be its node's fault; a rank that lost its peers is not the cause.
BLAMED = frozenset({"Killed", "Crash", "Silent", "Stalled"})
KEPT = 100  # faults of a run, the newest


@dataclass(frozen=True)
class Fault:
    """A start that was lost to a node. ``time``: unix seconds; ``step``: that the newest checkpoint then held."""

    node: str
    cause: str
    job_id: str
    step: int
    time: float


def note_fault(run_dir: Path, node: str, cause: str, job_id: str) -> None:
    """Remember that a start was lost to ``node``."""
    fault = Fault(node, cause, job_id, latest_step(run_dir) or 0, time.time())
    write_faults(run_dir, [*read_faults(run_dir), asdict(fault)][-KEPT:])


def note_end(run_dir: Path, job_id: str, end: StepResult) -> None:
    """Remember it where a node may be what ended a start."""
    if end.node and end.cause is not None and end.cause.cause in BLAMED:
        note_fault(run_dir, end.node, end.cause.cause, job_id)


def note_lost_nodes(run_dir: Path, lost: Start | None, nodes: Sequence[str]) -> list[str]:
    """Remember nodes of a start that came to no end, if Slurm has lost them since.

    Args:
        lost: the start before this one; None where there was none, or it ended by itself.
        nodes: what this start has.
    Returns:
        Their names.
    """
    gone = sorted(set(lost.nodes) - set(nodes)) if lost is not None else []
    if lost is None or not gone:
        return []
    try:
        away = [node.name for node in seen_nodes(",".join(gone)) if not node.is_up]
    except SlurmError:  # Slurm does not answer or knows them no longer: nobody is blamed
        return []
    for node in away:
        note_fault(run_dir, node, "NodeDown", lost.job_id)
    return away


def suspects(run_dir: Path, often: int) -> set[str]:
    """Nodes to which ``often`` of the last ``2 * often - 1`` faults belong; none where ``often`` is 0."""
    newest = [str(fault["node"]) for fault in read_faults(run_dir)][-(2 * often - 1) :] if often else []
    return {node for node in newest if newest.count(node) >= often}


def without(nodes: Sequence[str], bad: set[str], fewest: int) -> list[str]:
    """The nodes that are not bad; all of them where that would be fewer than ``fewest``.

    Example:
        >>> without(["a", "b", "c"], {"b"}, 2), without(["a", "b", "c"], {"b"}, 3)
        (['a', 'c'], ['a', 'b', 'c'])
    """
    good = [node for node in nodes if node not in bad]
    return good if len(good) >= fewest else list(nodes)
