"""What a certificate looks like: a grid on a terminal, a table on a page, and certificate.json."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from orchestrator.certify.command import SEED, STEPS, Cell, Request
from orchestrator.certify.comparing import LOGITS_ATOL, LOSS_RTOL, TENSOR_RTOL
from orchestrator.certify.grid import BATCH
from orchestrator.errors import ConfigError, ExitCode
from orchestrator.marks import between_marks
from orchestrator.metrics import jsonable
from orchestrator.planning.certified import SHIPPED, Pair, pairs, with_family
from orchestrator.runs import write_whole
from parallel.families import read_model

if TYPE_CHECKING:
    from rich.console import Group

VERSIONS = ("isotrain", "torch", "megatron-core", "transformers", "peft", "numpy")
COLUMN_WIDTH, PAGE_WIDTH = 12, 120


MARK = "<!-- certified {name} -->"


def certified(request: Request, out: Path, page: Path | None, as_json: bool, for_package: bool = False) -> int:
    """Certify, show the grid, write the certificate; 1 when a cell is red.

    Args:
        page: a page with two marks ``<!-- certified FAMILY -->``, between which the grid is put.
        for_package: this is the certificate that the package shall carry.
    Raises:
        ConfigError: as :func:`orchestrator.certify.command.certify`, or the page has no such marks.
    """
    from rich.console import Console

    from orchestrator.certify.command import certify, small_config

    config = small_config(request.job, request.ranks)
    mark_of_page = MARK.format(name=config["model_type"])
    if page is not None and page.read_text(encoding="utf-8").count(mark_of_page) != 2:
        raise ConfigError(f"{page} has no two marks {mark_of_page}", f"write {mark_of_page} twice into {page}")
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, about itself
    began = time.monotonic()
    with _Ticker(sys.stderr) as ticker:
        cells = certify(request, ticker)
    value = certificate(cells, config, request.ranks, time.monotonic() - began)
    write_certificate(out, value)
    if page is not None:
        write_whole(page, between_marks(page.read_text(encoding="utf-8"), mark_of_page, markdown(cells)))
    if for_package:
        ship(read_model(config).family, cells)
    if as_json:
        print(json.dumps(_finite({"code": int(bool(counts(cells)["red"])), "certificate": str(out), **value})))
    else:
        console = Console(highlight=False, width=None if sys.stdout.isatty() else PAGE_WIDTH)
        console.print(render(cells, console.width))
    print(f"certificate: {out}", file=sys.stderr)
    return int(ExitCode.RED if counts(cells)["red"] else ExitCode.DONE)


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


def certificate(cells: Sequence[Cell], config: dict[str, Any], ranks: int, seconds: float) -> dict[str, Any]:
    """All that is in certificate.json."""
    return {
        "format_version": 1,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "seconds": round(seconds, 1),
        "versions": {name: version(name) for name in VERSIONS},
        "tolerances": {"loss": LOSS_RTOL, "tensor": TENSOR_RTOL, "logits": LOGITS_ATOL},
        "seed": SEED,
        "steps": STEPS,
        "global_sequences": BATCH,
        "up_to": ranks,
        "model": config,
        "counts": counts(cells),
        "cells": [asdict(cell) for cell in cells],
    }


def write_certificate(file: Path, value: dict[str, Any]) -> None:
    """Write certificate.json, whole or not at all; a number that is none becomes null."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def counts(cells: Sequence[Cell]) -> dict[str, int]:
    """How many cells are green, red and refused."""
    return {verdict: sum(cell.verdict == verdict for cell in cells) for verdict in ("green", "red", "refused")}


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


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else jsonable(value)
