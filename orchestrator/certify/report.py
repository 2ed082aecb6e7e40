"""What a certificate looks like: a grid on a terminal, a table on a page, and certificate.json."""

from __future__ import annotations

import json
import sys
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from orchestrator.certify.command import Cell, Request
from orchestrator.certify.keeping import Growing, about, counts
from orchestrator.errors import ConfigError, ExitCode
from orchestrator.marks import between_marks
from orchestrator.planning.certified import SHIPPED, Pair, pairs, with_family
from orchestrator.runs import write_whole
from parallel.families import read_model

if TYPE_CHECKING:
    from rich.console import Group

COLUMN_WIDTH, PAGE_WIDTH = 12, 120
MARK = "<!-- certified {name} -->"


@dataclass(frozen=True)
class Outputs:
    """Where a certificate goes. ``page``: one with two marks ``<!-- certified FAMILY -->``, between which the grid is
    put; ``for_package``: it is the one that the package shall carry; ``resume``: cells that ``file`` has are kept."""

    file: Path
    page: Path | None = None
    as_json: bool = False
    for_package: bool = False
    resume: bool = False


def certified(request: Request, outputs: Outputs) -> int:
    """Certify, show the grid, write the certificate; 1 when a cell is red.

    Raises:
        ConfigError: as :func:`orchestrator.certify.command.certify`, the page has no such marks, or there is nothing
            that could be gone on with.
    """
    from orchestrator.certify.command import certify, small_config

    config = small_config(request.job, request.ranks)
    page, mark_of_page = outputs.page, MARK.format(name=config["model_type"])
    if page is not None and page.read_text(encoding="utf-8").count(mark_of_page) != 2:
        raise ConfigError(f"{page} has no two marks {mark_of_page}", f"write {mark_of_page} twice into {page}")
    growing = Growing.begun(outputs.file, about(request, config), outputs.resume)
    if outputs.resume:
        print(f"certify: {len(growing.known)} green cells are kept", file=sys.stderr)
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about itself
    try:
        with _Ticker(sys.stderr) as ticker:
            cells = certify(request, ticker, known=growing.known, keep=growing.add)
    except (Exception, KeyboardInterrupt):
        if part := growing.keep():
            print(f"certify: what is done is in {part}; the same command with --resume goes on", file=sys.stderr)
        raise
    value = growing.finish(cells)
    if page is not None:
        write_whole(page, between_marks(page.read_text(encoding="utf-8"), mark_of_page, markdown(cells)))
    if outputs.for_package:
        ship(read_model(config).family, cells)
    _show(cells, value, outputs)
    return int(ExitCode.RED if counts(cells)["red"] else ExitCode.DONE)


def _show(cells: Sequence[Cell], value: dict[str, Any], outputs: Outputs) -> None:
    from rich.console import Console

    if outputs.as_json:
        print(json.dumps({"code": int(bool(counts(cells)["red"])), "certificate": str(outputs.file), **value}))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else PAGE_WIDTH)
        console.print(render(cells, console.width))
    print(f"certificate: {outputs.file}", file=sys.stderr)


class _Ticker:
    """A progress bar on a terminal; elsewhere a line every tenth of the way."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._said, self._progress = stream, -1, None
        if stream.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self._progress = Progress(console=Console(file=stream), transient=True)
            self._task = self._progress.add_task("certify")

    def __enter__(self) -> _Ticker:
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, done: int, of: int, name: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=of, description=name)
        elif done * 10 // of > self._said:
            self._said = done * 10 // of
            print(f"certify: {done} of {of} cells{f', next {name}' if name else ''}", file=self._stream, flush=True)


def ship(family: str, cells: Sequence[Cell]) -> None:
    """Write into the package which pairs of features a whole certificate covers: green together, and nowhere red."""
    green: dict[str, set[Pair]] = {}
    for cell in cells:
        if cell.verdict == "green":
            green.setdefault(cell.tuner, set()).update(pairs(cell.features))
    for cell in cells:
        if cell.verdict == "red" and cell.tuner in green:
            green[cell.tuner] -= pairs(cell.features)
    write_whole(SHIPPED, with_family(family, green))


def mark(cell: Cell) -> str:
    """A cell in a few letters: the worst error where it is green, what is wrong where it is red."""
    worst = cell.worst
    if cell.verdict == "refused":
        return "-"
    if worst is None:
        return "failed"
    return f"{worst.value:.0e}" if cell.verdict == "green" else f"{worst.what} {worst.value:.0e}"


def render(cells: Sequence[Cell], width: int) -> Group:
    """The grid for a terminal of ``width`` columns: tuners down, topologies across, in as many blocks as it takes."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    styles = {"green": "green", "red": "bold red", "refused": "dim"}
    tuners, names = _axes(cells)
    by_place = {(cell.tuner, cell.layout.name): cell for cell in cells}
    each = max(1, (width - 16) // (COLUMN_WIDTH + 3))
    parts: list[Any] = []
    for start in range(0, len(names), each):
        table = Table("tuner")
        for name in names[start : start + each]:
            table.add_column(name, overflow="fold")
        for tuner in tuners:
            row = [by_place[tuner, name] for name in names[start : start + each]]
            table.add_row(tuner, *(Text(mark(cell), styles[cell.verdict]) for cell in row))
        parts.append(table)
    return Group(*parts, Text("\n".join(_notes(cells))))


def markdown(cells: Sequence[Cell]) -> str:
    """The grid for a page: topologies down, tuners across, and why cells are refused."""
    tuners, names = _axes(cells)
    by_place = {(cell.tuner, cell.layout.name): cell for cell in cells}
    lines = [f"| topology | {' | '.join(tuners)} |", f"| --- |{' ---: |' * len(tuners)}"]
    for name in names:
        row = [by_place[tuner, name] for tuner in tuners]
        lines.append(
            f"| {name} | " + " | ".join(("**red** " if c.verdict == "red" else "") + mark(c) for c in row) + " |"
        )
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(cells))])


def _axes(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    """Tuners, and those topologies that not every tuner is refused on."""
    names = dict.fromkeys(cell.layout.name for cell in cells if cell.verdict != "refused")
    return list(dict.fromkeys(cell.tuner for cell in cells)), list(names)


def _notes(cells: Sequence[Cell]) -> list[str]:
    """How many of each, every red cell with the place of its worst error, every reason to refuse."""
    totals = counts(cells)
    notes = [f"{totals['green']} green, {totals['red']} red, {totals['refused']} refused by the plan"]
    for cell in cells:
        if cell.verdict == "red" and cell.worst:
            worst = cell.worst
            notes.append(f"red: {cell.tuner} on {cell.layout.name}: {worst.what} {worst.value:.3g} at {worst.where}")
        elif cell.verdict == "red":
            notes.append(f"red: {cell.tuner} on {cell.layout.name}: {cell.reason.strip().splitlines()[-1]}")
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for cell in cells:
        if cell.verdict == "refused":
            reasons[cell.reason.splitlines()[0]].append(f"{cell.tuner} on {cell.layout.name}")
    for reason, places in sorted(reasons.items()):
        more = f" and {len(places) - 1} more" if len(places) > 1 else ""
        notes.append(f"refused: {places[0]}{more}: {reason}")
    return notes
