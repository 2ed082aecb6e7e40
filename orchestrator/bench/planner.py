"""``isotrain bench planner``: the planner's estimates against published runs; fills the tables of docs/planner.md."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from orchestrator.bench.planner_choice import Choice, choices, held, held_by_group
from orchestrator.bench.planner_score import (
    ROWS,
    Prediction,
    Score,
    memory_errors,
    out_of_memory,
    over_groups,
    predict,
    read_rows,
    regrets,
    time_errors,
)
from orchestrator.marks import between_marks
from orchestrator.planning import constants as constants_module
from orchestrator.planning.constants import FITTED, Constants
from orchestrator.planning.devices import catalogue

MARK = "<!-- planner {name}: written by `isotrain bench planner --write docs/planner.md` -->"
WORST = 10


@dataclass(frozen=True)
class Report:
    """All scores of a file of rows."""

    predictions: tuple[Prediction, ...]
    left_out: dict[str, Score]
    choices: tuple[Choice, ...] = ()

    def summary(self) -> dict[str, Any]:
        """As one JSON object: every row with its breakdown and error, and all scores with their counts."""
        found, alarms = out_of_memory(self.predictions)
        times, memories = time_errors(self.predictions), memory_errors(self.predictions)
        swept = regrets(self.predictions)
        return {
            "rows": [_row(one) for one in self.predictions],
            "time": {group: asdict(score) for group, score in times.items()},
            "time_over_groups": asdict(over_groups(times.values())),
            "time_dense_a100_h100": asdict(over_groups(self.dense().values())),
            "time_leaving_the_group_out": {group: asdict(score) for group, score in self.left_out.items()},
            "memory": [{"group": group, "kind": kind, **asdict(score)} for (group, kind), score in memories.items()],
            "memory_over_groups": asdict(over_groups(memories.values())),
            "out_of_memory_found": asdict(found),
            "false_alarms": asdict(alarms),
            "regret": {group: asdict(score) for group, score in swept.items()},
            "regret_over_groups": asdict(over_groups(swept.values())),
            "choice": asdict(held(self.choices)),
            "choice_by_group": {group: asdict(score) for group, score in held_by_group(self.choices).items()},
            "not_chosen": [asdict(one) | {"ratio": one.ratio} for one in self.choices if not one.is_held],
            "not_predicted": [{"row": one.row, "reason": one.reason} for one in self.predictions if one.reason],
            "constants": asdict(FITTED),
        }

    def dense(self) -> dict[str, Score]:
        """Time errors of dense models on A100 and H100."""
        return time_errors(one for one in self.predictions if one.is_dense)

    def tables(self) -> dict[str, str]:
        """The tables of the page, by name, in markdown."""
        return ({"choice": self._choice_table()} if self.choices else {}) | {
            "summary": self._summary_table(),
            "time": self._time_table(),
            "memory": self._memory_table(),
            "regret": table(("group", "regret", "sweeps"), _rows(regrets(self.predictions))),
            "constants": _constants_table(),
            "devices": _devices_table(),
        }

    def _summary_table(self) -> str:
        found, alarms = out_of_memory(self.predictions)
        lines = {
            "step time, mean over groups": over_groups(time_errors(self.predictions).values()),
            "the same, dense models on A100 and H100": over_groups(self.dense().values()),
            "the same, each group left out of the fit": over_groups(self.left_out.values()),
            "memory, mean over groups and kinds": over_groups(memory_errors(self.predictions).values()),
            "top-1 regret, mean over groups": over_groups(regrets(self.predictions).values()),
            "published layouts within 10% of the planner's own best": held(self.choices),
            "runs out of memory that were foreseen": found,
            "runs that ran and were called too large": alarms,
        }
        return table(("score", "value", "of"), [row for row in _rows(lines) if row[2] != "0"])

    def _choice_table(self) -> str:
        rows = []
        for group, score in held_by_group(self.choices).items():
            fitting = sum(one.fits for one in self.choices if one.group == group)
            rows.append((group, f"{score.value:.1%}", str(score.count), str(fitting)))
        return table(("group", "held", "configurations", "fit by estimate"), rows)

    def _time_table(self) -> str:
        times = time_errors(self.predictions)
        rows = []
        for group, score in times.items():
            without = f"{self.left_out[group].value:.1%}" if group in self.left_out else "-"
            rows.append((group, f"{score.value:.1%}", without, str(score.count)))
        return table(("group", "error", "left out", "configurations"), rows)

    def _memory_table(self) -> str:
        rows = [
            (group, kind.split(",")[0].split(" on ")[0], f"{score.value:.1%}", str(score.count))
            for (group, kind), score in memory_errors(self.predictions).items()
        ]
        return table(("group", "reading", "error", "rows"), rows)


def bench(
    rows: Path | None, as_json: bool, do_fit: bool, pages: Sequence[Path], leave_out: bool, choose: bool = False
) -> int:
    """Score a file of rows, print it, and write the tables into pages; with ``do_fit`` find the constants first.

    ``leave_out`` and ``choose`` add the scores that take a minute each: constants fitted without a group, and layouts
    searched for every published configuration.

    Raises:
        DataError: the file cannot be read.
    """
    read, broken = read_rows(rows or ROWS)
    if do_fit:
        from orchestrator.bench.planner_fit import fit

        return _fitted(fit(read), as_json)
    left_out: dict[str, Score] = {}
    if leave_out:
        from orchestrator.bench.planner_fit import leave_one_out

        left_out = leave_one_out(read)
    chosen = tuple(choices(read)) if choose else ()
    report = Report((*broken, *(predict(row) for row in read)), left_out, chosen)
    print(json.dumps(report.summary()) if as_json else _text(report))
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for name, table in report.tables().items():
            text = between_marks(text, MARK.format(name=name), table)
        page.write_text(text, encoding="utf-8")
    return 0


def _fitted(found: Constants, as_json: bool) -> int:
    """Write the fitted constants into the file that holds them."""
    path = Path(str(constants_module.__file__))
    text = path.read_text(encoding="utf-8")
    for name, value in asdict(found).items():
        text = re.sub(rf"(?m)^    {name}: float = .*$", f"    {name}: float = {value:.4g}", text)
    path.write_text(text, encoding="utf-8")
    print(json.dumps(asdict(found)) if as_json else f"written to {path.name}: {found}")
    return 0


def _text(report: Report) -> str:
    """The tables for a terminal, the worst rows, and those that cannot be predicted by reason."""
    parts = [f"{name}\n{table}" for name, table in report.tables().items() if name not in ("constants", "devices")]
    wrong = sorted(report.predictions, key=lambda one: -abs(one.time_error or 0))[:WORST]
    lines = [
        f"  {one.row}: {one.step_s:.3g} s against {one.measured_s:.3g} s; " + _largest(one.causes)
        for one in wrong
        if one.measured_s
    ]
    reasons: dict[str, list[str]] = {}
    for one in report.predictions:
        if one.reason:
            reasons.setdefault(one.reason, []).append(one.row)
    listed = [f"  {len(names)} rows: {reason} ({names[0]})" for reason, names in reasons.items()]
    if lines:
        parts.append("furthest off\n" + "\n".join(lines))
    if listed:
        parts.append("not predicted\n" + "\n".join(listed))
    return "\n\n".join(parts)


def _largest(causes: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in sorted(causes.items(), key=lambda item: -item[1])[:4])


def _row(one: Prediction) -> dict[str, Any]:
    return asdict(one) | {"time_error": one.time_error, "memory_error": one.memory_error}


def _rows(scores: dict[str, Score]) -> list[tuple[str, str, str]]:
    return [(name, f"{score.value:.1%}", str(score.count)) for name, score in scores.items()]


def _constants_table() -> str:
    """Every constant with its meaning, as its class says it."""
    meanings = re.findall(r"(?ms)^ {8}(\w+): (.*?)(?=^ {8}\w+: |\Z)", (Constants.__doc__ or "").split("Args:")[1])
    told = {name: " ".join(meaning.split()) for name, meaning in meanings}
    rows = [(f"`{each.name}`", f"{getattr(FITTED, each.name):.3g}", told[each.name]) for each in fields(Constants)]
    return table(("constant", "value", "what it is"), rows)


def _devices_table() -> str:
    """The catalogue."""
    rows = []
    for one in catalogue().values():
        peak = {name: f"{rate / 1e12:g}" for name, rate in one.peaks.items()}
        rows.append(
            (
                one.kind,
                peak.get("bf16", f"- ({peak.get('fp16', '-')} fp16)"),
                peak.get("fp8", "-"),
                f"{one.memory_bytes / 1e9:g}",
                f"{one.memory_rate / 1e12:.3g}",
                f"{one.link_rate / 1e9:g}",
                str(one.domain),
                f"{one.network_rate / 1e9:g}",
                "yes" if one.calibrated else "no",
            )
        )
    names = ("kind", "bf16", "fp8", "GB", "TB/s", "link GB/s", "domain", "network GB/s", "calibrated")
    return table(names, rows)


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table.

    Example:
        >>> print(table(("a", "b"), [("x", "1")]))
        | a | b |
        | --- | ---: |
        | x | 1 |
    """
    head = ["| " + " | ".join(names) + " |", "| --- |" + " ---: |" * (len(names) - 1)]
    return "\n".join([*head, *("| " + " | ".join(row) + " |" for row in rows)])


if __name__ == "__main__":
    sys.exit(bench(None, False, False, [], False))
