"""Compare: two plan.json files side by side, what differs in layout, time and memory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestrator.errors import DataError
from orchestrator.planning.advice import differences
from orchestrator.planning.memory import GIB
from orchestrator.planning.plan import Plan

LAYOUT = (
    *("vpp", "sp", "cp_comm", "micro_sequences", "micro_batches", "recompute", "distributed", "precision", "engine"),
    "ranks_used",
)


def read_plan(path: Path) -> Plan:
    """The plan in a file: plan.json of a run.

    Raises:
        DataError: there is no such file, or it is no plan.
    """
    try:
        return Plan.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read: {error}", "isotrain plan --compare RUN/plan.json OTHER/plan.json"
        ) from error


def comparison(one: Plan, other: Plan) -> dict[str, Any]:
    """What differs, for machines: each value as a pair, the first plan's first."""
    pairs = {"topology": (str(one.topology), str(other.topology))}
    pairs |= {key: (getattr(one, key), getattr(other, key)) for key in LAYOUT}
    memory = {
        owner: (max(asdict(stage)[owner] for stage in one.memory), max(asdict(stage)[owner] for stage in other.memory))
        for owner in asdict(one.memory[0])
    }
    return {
        "layout": {key: pair for key, pair in pairs.items() if pair[0] != pair[1]},
        "step_s": (one.step_time.total_s, other.step_time.total_s),
        "causes_s": {key: (value, getattr(other.step_time, key)) for key, value in asdict(one.step_time).items()},
        "most_memory_bytes": {owner: pair for owner, pair in memory.items() if any(pair)},
        "same_run": (one.global_sequences, one.sequence_tokens) == (other.global_sequences, other.sequence_tokens),
    }


def compared(one: Plan, other: Plan) -> list[str]:
    """The comparison as lines of text."""
    found = comparison(one, other)
    lines = [f"{key}: {pair[0]} -> {pair[1]}" for key, pair in found["layout"].items()] or ["the same layout"]
    first, second = found["step_s"]
    lines.append(f"step: {first:.3g} s -> {second:.3g} s ({second / first:.2f} times)")
    lines += [f"  {line}" for line in differences(one.step_time, other.step_time)]
    needs = [max(stage.total for stage in plan.memory) / GIB for plan in (one, other)]
    lines.append(f"fullest rank: {needs[0]:.2f} GiB -> {needs[1]:.2f} GiB")
    for owner, (before, after) in found["most_memory_bytes"].items():
        if abs(after - before) > needs[0] * GIB / 100:
            lines.append(f"  {owner:<12} {before / GIB:8.2f} GiB -> {after / GIB:.2f} GiB")
    if not found["same_run"]:
        lines.append("these are two different runs: their global batches or rows differ")
    return lines
