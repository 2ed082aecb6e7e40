"""What a run folder says of its run, as far as it can be read; nothing in it is taken for whole or right."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from launch.exits import RankExit, read_exits
from launch.states import rank_pids
from orchestrator.checkpoint.folder import MANIFEST, list_steps
from orchestrator.config.building import read_job
from orchestrator.config.job import JobConfig
from orchestrator.errors import ConfigError, IsotrainError
from orchestrator.history import Launch, history_file
from orchestrator.pace import RankPace
from orchestrator.planning.compare import read_plan
from orchestrator.planning.plan import Plan

Value = TypeVar("Value")
Line = Mapping[str, Any]
LARGEST = 1e15
"""Numbers beyond are damage; what is read are steps, seconds since 1970, and bytes."""
LEAVES_TRACES = ("job.yaml", "plan.json", "metrics.jsonl", "environment.jsonl", "checkpoints")


@dataclass(frozen=True)
class Saved:
    """A checkpoint; ``time``: when its manifest was written, unix seconds."""

    step: int
    time: float
    loss: float | None
    bytes: int
    topology: str


@dataclass(frozen=True)
class RunFolder:
    """All of it. ``problems``: what could not be read, a sentence each.

    Args:
        steps: lines of ``metrics.jsonl`` with a step, ascending.
        starts: lines of ``environment.jsonl``, in their order.
        alive: ranks that are on this machine now.
    """

    path: Path
    job: JobConfig | None
    plan: Plan | None
    steps: tuple[Line, ...]
    starts: tuple[Line, ...]
    launches: tuple[Launch, ...]
    paces: tuple[RankPace, ...]
    exits: Mapping[int, RankExit]
    checkpoints: tuple[Saved, ...]
    alive: int
    problems: tuple[str, ...]


def read_run(run_dir: Path) -> RunFolder:
    """Read a run folder, at any time of its run.

    Raises:
        ConfigError: there is no such folder, or nothing in it tells of a run.
    """
    if not any((run_dir / name).exists() for name in LEAVES_TRACES):
        raise ConfigError(
            f"{run_dir} is no run folder: it has none of {', '.join(LEAVES_TRACES)}", "isotrain report DIR"
        )
    problems: list[str] = []
    job = _or_none("job.yaml", lambda: read_job(run_dir), problems)
    plan = _or_none("plan.json", lambda: read_plan(run_dir / "plan.json"), problems)
    steps = {int(one["step"]): one for one in _lines(run_dir / "metrics.jsonl", problems) if number(one, "step")}
    starts = _lines(run_dir / "environment.jsonl", problems)
    launches = [one for line in _lines(history_file(run_dir), problems) if (one := _record(Launch, line))]
    ranks = plan.ranks_used if plan else math.inf
    return RunFolder(
        path=run_dir,
        job=job,
        plan=plan,
        steps=tuple(steps[step] for step in sorted(steps)),
        starts=tuple(starts),
        launches=tuple(launches),
        paces=tuple(pace for pace in _paces(run_dir) if pace.rank < ranks),
        exits=read_exits(run_dir),
        checkpoints=tuple(_checkpoints(run_dir, problems)),
        alive=len(rank_pids(run_dir)),
        problems=tuple(problems),
    )


def number(line: Line, name: str) -> float | None:
    """A value of a line, where it is a finite number.

    Example:
        >>> number({"loss": 2}, "loss"), number({"loss": None}, "loss"), number({}, "loss")
        (2.0, None, None)
    """
    value = line.get(name)
    return float(value) if isinstance(value, int | float) and _is_usual(value) else None


def _is_usual(value: object) -> bool:
    """Whether a value is no number, or one that can be drawn."""
    return not isinstance(value, bool) and (not isinstance(value, int | float) or -LARGEST < value < LARGEST)


def _or_none(name: str, read: Callable[[], Value], problems: list[str]) -> Value | None:
    try:
        return read()
    except (IsotrainError, OSError, ValueError) as error:
        problems.append(f"{name}: {error}")
        return None


def _lines(file: Path, problems: list[str]) -> list[Line]:
    """The objects in a file of JSON lines; what is none is counted, but for a last one that is being written."""
    try:
        texts = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        problems.append(f"{file.name} cannot be read: {error.strerror}")
        return []
    found = [_object(text) for text in texts if text]
    wrong = sum(one is None for one in (found if texts[-1] == "" else found[:-1]))
    if wrong:
        problems.append(f"{file.name}: {wrong} of {len(found)} lines cannot be read")
    return [one for one in found if one is not None]


def _object(text: str) -> Line | None:
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _record(kind: type[Value], line: Line) -> Value | None:
    """A flat record of what was written from one; None where a value is missing or of another type."""
    try:
        values = {field.name: line[field.name] for field in fields(kind)}  # type: ignore[arg-type]
    except KeyError:
        return None
    expected = {"int": int, "float": int | float, "str": str, "int | None": int | None}
    right = all(isinstance(values[field.name], expected[str(field.type)]) for field in fields(kind))  # type: ignore[arg-type]
    return kind(**values) if right and all(map(_is_usual, values.values())) else None


def _paces(run_dir: Path) -> list[RankPace]:
    found = []
    for file in (run_dir / "paces").glob("rank-*.json"):
        try:
            line = _object(file.read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue  # being replaced just now
        if line and (pace := _record(RankPace, line)):
            found.append(pace)
    return sorted(found, key=lambda pace: pace.rank)


def _checkpoints(run_dir: Path, problems: list[str]) -> list[Saved]:
    found = []
    for step, folder in list_steps(run_dir / "checkpoints"):
        try:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
            written = (folder / MANIFEST).stat().st_mtime
        except (OSError, UnicodeDecodeError):
            text, written = "", 0.0
        manifest = _object(text)
        if manifest is None:
            problems.append(f"checkpoints/{folder.name} has no {MANIFEST} that can be read")
            continue
        about, files = _inner(manifest, "about"), _inner(manifest, "files")
        total = sum(int(number(one, "bytes") or 0) for one in files.values() if isinstance(one, dict))
        axes = " ".join(f"{axis}={size}" for axis, size in _inner(about, "topology").items() if size != 1)
        found.append(Saved(step, written, number(_inner(about, "metrics"), "loss"), total, axes or "1 process"))
    return sorted(found, key=lambda one: one.step)


def _inner(line: Line, name: str) -> Line:
    value = line.get(name)
    return value if isinstance(value, dict) else {}
