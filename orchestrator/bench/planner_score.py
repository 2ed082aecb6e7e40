"""Scores of the planner's estimates on published runs: as the rows' authors ask for them to be averaged."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.bench.planner_rows import Unreadable, setup_of_row
from orchestrator.errors import DataError
from orchestrator.planning.constants import FITTED, Constants
from orchestrator.planning.memory import StageMemory, stage_memory
from orchestrator.planning.search import ALIKE
from orchestrator.planning.setup import Setup
from orchestrator.planning.timing import step_time

ROWS = Path(__file__).resolve().parents[2] / "tests" / "data" / "measured.jsonl.xz"
SWEEPS = ("vtrain-multi", "vtrain-single", "bigscience-a100", "hf-ultrascale")
ODD = (ArithmeticError, LookupError, TypeError, ValueError, AttributeError)
"""What arithmetic on a row says whose sizes are no sizes; such a row is listed with it."""
OPENERS: dict[str, Any] = {".gz": gzip.open, ".xz": lzma.open}
DENSE = ("A100", "H100")


@dataclass(frozen=True)
class Prediction:
    """One row: what was measured, what is estimated, and by which causes and owners. ``reason``: why it has no
    estimate. Times are in seconds, memory in 1e9 bytes."""

    row: str
    group: str
    reason: str = ""
    step_s: float = 0.0
    measured_s: float | None = None
    memory_gb: float = 0.0
    measured_gb: float | None = None
    memory_kind: str = ""
    fits: bool = True
    ran_out: bool | None = None
    causes: dict[str, float] = field(default_factory=dict)
    owners: dict[str, float] = field(default_factory=dict)
    key: str = ""
    sweep: str = ""
    is_dense: bool = False
    stages: int = 1

    @property
    def time_error(self) -> float | None:
        """Relative, with its sign; None where no time was measured."""
        return self.step_s / self.measured_s - 1 if self.measured_s and not self.reason else None

    @property
    def memory_error(self) -> float | None:
        """Relative, with its sign; None where no memory was measured."""
        return self.memory_gb / self.measured_gb - 1 if self.measured_gb and not self.reason else None


@dataclass(frozen=True)
class Score:
    """A mean, and over how many rows (for groups: configurations) it was taken."""

    value: float
    count: int


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[Prediction]]:
    """The rows of a file of one JSON object a line (also ``.gz`` and ``.xz``), and the lines that hold none.

    Raises:
        DataError: there is no such file, or it cannot be unpacked.
    """
    rows, broken = [], []
    try:
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    broken.append(Prediction(f"line {number}", "", f"no JSON: {error}"))
                    continue
                if isinstance(value, dict):
                    rows.append(value)
                else:
                    broken.append(Prediction(f"line {number}", "", "no JSON object"))
    except (OSError, EOFError, lzma.LZMAError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "isotrain bench planner --rows FILE.jsonl") from error
    return rows, broken


def predict(row: dict[str, Any], constants: Constants = FITTED) -> Prediction:
    """Estimate one row; one that cannot be read has a reason instead."""
    name, group = str(row.get("id")), str(row.get("group") or "")
    try:
        setup = setup_of_row(row)
        return _predicted(row, setup, constants)
    except Unreadable as error:
        return Prediction(name, group, str(error))
    except ODD as error:
        return Prediction(name, group, f"odd sizes: {type(error).__name__}: {error}")


def _predicted(row: dict[str, Any], setup: Setup, constants: Constants) -> Prediction:
    scorable, measured = row.get("scorable") or {}, row.get("measured") or {}
    target, model = row.get("target") or {}, row.get("model") or {}
    time, memory = step_time(setup, constants), stage_memory(setup, constants)
    kind = str(measured.get("mem_kind") or "")
    fullest = max(memory, key=lambda stage: stage.total)
    shown = memory[-1] if "LAST" in kind else fullest
    keys = [model.get("name"), row.get("gpu"), setup.ranks, row.get("gbs"), row.get("seq")]
    capacity = capacity_of(row, setup)
    if not math.isfinite(time.total_s) or time.total_s <= 0:
        raise Unreadable("odd sizes: they lead to no finite time")
    return Prediction(
        row=str(row.get("id")),
        group=str(row.get("group") or ""),
        step_s=time.total_s,
        measured_s=_positive(target.get("step_s")) if scorable.get("time") else None,
        memory_gb=read_off(shown, reading(row)) / 1e9,
        measured_gb=_positive(measured.get("mem_gb")) if scorable.get("memory") else None,
        memory_kind=kind,
        fits=fullest.total <= capacity,
        ran_out=bool(measured.get("oom")) if scorable.get("oom") else None,
        causes={name: value for name, value in asdict(time).items() if value},
        owners={name: value / 1e9 for name, value in asdict(shown).items() if value},
        key=str(row.get("config_key") or row.get("id")),
        sweep=" ".join(map(str, keys)) if row.get("group") in SWEEPS else "",
        stages=setup.pp,
        is_dense=not setup.shape.experts and setup.device.kind.startswith(DENSE),
    )


GIBIBYTE = 2**30
"""Devices are sold by GB and hold as many GiB."""


def capacity_of(row: dict[str, Any], setup: Setup) -> float:
    """Bytes of one device of a row."""
    return (_positive(row.get("hbm_gb")) or setup.device.memory_bytes / 1e9) * GIBIBYTE


def reading(row: dict[str, Any]) -> str:
    """What a row's reading counts: all of a device, what torch has reserved of it, or has allocated.

    Where only "GB" is printed, what the program itself could print: the fork of Megatron-LM with zero-bubble schedules
    takes ``torch.cuda.max_memory_allocated`` for a stage's memory; InternEvo prints none, so it was read from outside.

    Example:
        >>> reading({"framework": "InternEvo", "measured": {"mem_kind": "GPU memory, integer GB"}})
        'all'
    """
    kind, name = str((row.get("measured") or {}).get("mem_kind") or ""), str(row.get("framework") or "").lower()
    if "allocated" in kind or "zero-bubble" in name:
        return "allocated"
    return "all" if "nvidia-smi" in kind or "internevo" in name else "reserved"


def read_off(memory: StageMemory, counted: str) -> int:
    """The bytes that a reading counts."""
    return memory.total if counted == "all" else int(getattr(memory, counted))


def _positive(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else None


def time_errors(predictions: Iterable[Prediction]) -> dict[str, Score]:
    """Mean absolute relative error of step time per group, over the medians of equal configurations."""
    measured: defaultdict[tuple[str, str], list[Prediction]] = defaultdict(list)
    for one in predictions:
        if one.time_error is not None:
            measured[one.group, one.key].append(one)
    errors: defaultdict[str, list[float]] = defaultdict(list)
    for (group, _), same in measured.items():
        seconds = statistics.median(one.measured_s or 0.0 for one in same)
        errors[group].append(abs(statistics.median(one.step_s for one in same) / seconds - 1))
    return {group: Score(statistics.mean(values), len(values)) for group, values in sorted(errors.items())}


def memory_errors(predictions: Iterable[Prediction]) -> dict[tuple[str, str], Score]:
    """Mean absolute relative error of memory per group and kind of reading: kinds are never mixed."""
    errors: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for one in predictions:
        if one.memory_error is not None:
            errors[one.group, one.memory_kind].append(abs(one.memory_error))
    return {key: Score(statistics.mean(values), len(values)) for key, values in sorted(errors.items())}


def over_groups(scores: Iterable[Score]) -> Score:
    """The mean of means; the count is that of all rows."""
    every = list(scores)
    return Score(statistics.mean(one.value for one in every) if every else 0.0, sum(one.count for one in every))


def out_of_memory(predictions: Iterable[Prediction]) -> tuple[Score, Score]:
    """The share of runs out of memory that were foreseen, and the share of runs that ran and were called too large."""
    labelled = [one for one in predictions if one.ran_out is not None and not one.reason]
    out, ran = [one for one in labelled if one.ran_out], [one for one in labelled if not one.ran_out]

    def share(some: Sequence[Prediction]) -> Score:
        return Score(sum(not one.fits for one in some) / len(some) if some else 0.0, len(some))

    return share(out), share(ran)


def regrets(predictions: Iterable[Prediction]) -> dict[str, Score]:
    """How much longer the layout takes that is liked best than the best measured one: mean over a group's sweeps."""
    sweeps: defaultdict[tuple[str, str], list[Prediction]] = defaultdict(list)
    for one in predictions:
        if one.sweep and one.time_error is not None:
            sweeps[one.group, one.sweep].append(one)
    found: defaultdict[str, list[float]] = defaultdict(list)
    for (group, _), every in sweeps.items():
        if len({one.key for one in every}) < 2:
            continue
        fitting = [one for one in every if one.fits] or every
        near = ALIKE["cuda"] * min(one.step_s for one in fitting)
        liked = min((one for one in fitting if one.step_s <= near), key=lambda one: (one.stages, one.step_s))
        found[group].append((liked.measured_s or 0.0) / min(one.measured_s or 0.0 for one in every) - 1)
    return {group: Score(statistics.mean(values), len(values)) for group, values in sorted(found.items())}
