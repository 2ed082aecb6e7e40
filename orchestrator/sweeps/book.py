"""What a sweep's folder knows of its points: ``sweep.json``, written whole after every change."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from orchestrator.errors import DataError
from orchestrator.runs import write_whole

FILE = "sweep.json"
FORMAT = 1
LONGEST_NAME = 120  # bytes; the number in front makes every folder's name its own

State = Literal["pruned", "waiting", "running", "done", "failed", "interrupted"]


def key_of(override: str) -> str:
    """The key of a word.

    Example:
        >>> key_of("++optimizer.lr=0.1")
        'optimizer.lr'
    """
    return override.partition("=")[0].lstrip("+")


@dataclass(frozen=True)
class Point:
    """One run of a sweep: ``overrides`` are the words that make it differ from the others.

    Example:
        >>> Point(3, ("tuner.r=8", "data.path='/my data/a:b'")).folder
        '003-tuner.r=8+data.path=-my-data-a-b'
    """

    number: int
    overrides: tuple[str, ...]

    @property
    def words(self) -> str:
        """The point for people."""
        return " ".join(self.overrides)

    @property
    def folder(self) -> str:
        """The name of its run folder: no letter in it that a shell, Slurm or a container could take otherwise."""
        plain = [re.sub(r"[^A-Za-z0-9_.=+-]+", "-", text.replace("'", "").lstrip("+")) for text in self.overrides]
        return f"{self.number:03d}-{'+'.join(plain)}"[:LONGEST_NAME].rstrip("-.")


@dataclass(frozen=True)
class Row:
    """How a point is. ``reason``: why it is pruned or how it ended. ``step``: the last one logged, of ``steps``.

    ``seconds``: the time that its steps took. ``value``: of the metric that points are compared by, None where there is
    none.
    """

    point: Point
    state: State
    reason: str = ""
    code: int | None = None
    step: int = 0
    steps: int = 0
    seconds: float = 0.0
    value: float | None = None


@dataclass(frozen=True)
class Metric:
    """A column of metrics.jsonl that points are compared by."""

    name: str = "loss"
    largest: bool = False

    def __str__(self) -> str:
        return f"{self.name}:max" if self.largest else self.name


@dataclass(frozen=True)
class Book:
    """A sweep: ``words`` are those that it was asked for with."""

    words: tuple[str, ...]
    metric: Metric
    rows: tuple[Row, ...]

    @property
    def best(self) -> Row | None:
        """The finished point with the best value; the first of equals."""
        done = [row for row in self.rows if row.state == "done" and row.value is not None]
        sign = -1 if self.metric.largest else 1
        return min(done, key=lambda row: sign * (row.value or 0.0), default=None)

    def ranked(self) -> list[Row]:
        """Finished points, best first, then the others in their order."""
        sign = -1 if self.metric.largest else 1
        done = [row for row in self.rows if row.state == "done" and row.value is not None]
        return sorted(done, key=lambda row: sign * (row.value or 0.0)) + [row for row in self.rows if row not in done]


def is_sweep(folder: Path) -> bool:
    """Whether a folder is a sweep's."""
    return (folder / FILE).is_file()


def read_book(folder: Path) -> Book | None:
    """The book of a folder; None when it holds no sweep.

    Raises:
        DataError: ``sweep.json`` cannot be read.
    """
    if not is_sweep(folder):
        return None
    try:
        values = json.loads((folder / FILE).read_text(encoding="utf-8"))
        rows = tuple(_row(value) for value in values["points"])
        return Book(tuple(values["words"]), Metric(**values["metric"]), rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / FILE} cannot be read: {error}", "restore it, or run_dir=ANOTHER") from error


def _row(value: dict[str, Any]) -> Row:
    known = {name: value[name] for name in ("state", "reason", "code", "step", "steps", "seconds", "value")}
    return Row(Point(value["number"], tuple(value["overrides"])), **known)


def write_book(folder: Path, book: Book) -> None:
    """Replace ``sweep.json``."""
    values = {
        "format": FORMAT,
        "words": list(book.words),
        "metric": asdict(book.metric),
        "best": book.best.point.number if book.best else None,
        "points": row_values(book.rows),
    }
    write_whole(folder / FILE, json.dumps(values, indent=1) + "\n")


def row_values(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON has them."""
    return [
        {"number": row.point.number, "folder": row.point.folder, "overrides": list(row.point.overrides)}
        | {name: value for name, value in asdict(row).items() if name != "point"}
        for row in rows
    ]
