"""What a point's metrics.jsonl says: how far it is, how long its steps took, and the number that it is compared by."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from orchestrator.sweeps.book import Metric, Row

FEWEST_STEPS = 10


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl; none when it has not begun."""
    try:
        text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # it is being written
        if isinstance(values, dict):
            lines.append(values)
    return lines


def last_mean(values: list[float]) -> float | None:
    """The mean of the last tenth of the steps, of 10 at least (or of all, where there are fewer); None without any.

    Example:
        >>> last_mean([9.0] * 5 + [1.0] * 10), last_mean([4.0, 2.0]), last_mean([])
        (1.0, 3.0, None)
    """
    last = values[-max(FEWEST_STEPS, len(values) // 10) :]
    return math.fsum(last) / len(last) if last else None


def curve(lines: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Steps and the values of one column, where it has a number."""
    return [(line["step"], float(line[name])) for line in lines if isinstance(line.get(name), (int, float))]


def measured(row: Row, run_dir: Path, metric: Metric) -> Row:
    """The row with what its run has logged by now."""
    lines = read_metrics(run_dir)
    if not lines:
        return dataclasses.replace(row, step=0, seconds=0.0, value=None)
    seconds = math.fsum(line.get("step_s") or 0.0 for line in lines)
    value = last_mean([number for _, number in curve(lines, metric.name)])
    return dataclasses.replace(row, step=lines[-1]["step"], seconds=round(seconds, 3), value=value)
