"""A certificate that is written as it grows, and what of an earlier one still counts: no cell is lost."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import launch
import orchestrator
import parallel
from orchestrator.certify.command import SEED, STEPS, Cell, Places, Request
from orchestrator.certify.comparing import LOGITS_ATOL, LOSS_RTOL, TENSOR_RTOL, Error
from orchestrator.certify.grid import BATCH, Layout
from orchestrator.config.building import job_to_yaml
from orchestrator.errors import ConfigError
from orchestrator.metrics import jsonable
from orchestrator.runs import write_whole

VERSIONS = ("isotrain", "torch", "megatron-core", "transformers", "peft", "numpy")
EVERY_S = 20.0  # between two writes of what is done so far


def about(request: Request, config: dict[str, Any]) -> dict[str, Any]:
    """What decides on every number of a certificate: two with the same can be put together.

    Args:
        config: the small model's ``config.json``.
    """
    return {
        "versions": {name: version(name) for name in VERSIONS},
        "source": source_digest(),
        "job": hashlib.sha256(job_to_yaml(request.job).encode()).hexdigest(),
        "tolerances": {"loss": LOSS_RTOL, "tensor": TENSOR_RTOL, "logits": LOGITS_ATOL},
        "seed": SEED,
        "steps": STEPS,
        "global_sequences": BATCH,
        "up_to": request.ranks,
        "model": config,
    }


def source_digest() -> str:
    """SHA-256 of isotrain's own modules, so that a cell that other code trained does not count."""
    found = hashlib.sha256()
    for package in (launch, orchestrator, parallel):
        root = Path(package.__path__[0])
        for file in sorted(root.rglob("*.py")):
            found.update(f"{root.name}/{file.relative_to(root)}\n".encode() + file.read_bytes())
    return found.hexdigest()


def counts(cells: Sequence[Cell]) -> dict[str, int]:
    """How many cells are green, red and refused."""
    return {verdict: sum(cell.verdict == verdict for cell in cells) for verdict in ("green", "red", "refused")}


class Growing:
    """A certificate that cells are added to; ``known`` are those that an earlier one already holds green.

    Until it is whole it grows beside ``file``, in ``FILE.part``, so that ``file`` is a whole certificate at any time.

    Args:
        facts: those of :func:`about`.
        seconds: what the known cells took.
    """

    def __init__(self, file: Path, facts: dict[str, Any], known: Places, seconds: float) -> None:
        self.known = known
        self._file, self._facts, self._cells = file, facts, dict(known)
        self._began = time.monotonic() - seconds
        self._written = time.monotonic()

    @classmethod
    def begun(cls, file: Path, facts: dict[str, Any], resume: bool) -> Growing:
        """A new one; with ``resume``, one that goes on with what there is of ``file``.

        Raises:
            ConfigError: that is no certificate, or one of something else.
        """
        there = [place for place in (_part(file), file) if resume and place.exists()]
        return cls(file, facts, *_known(there[0], facts)) if there else cls(file, facts, {}, 0.0)

    def add(self, cell: Cell) -> None:
        """Another cell; what there is is written now and then."""
        self._cells[cell.tuner, cell.layout.name] = cell
        if time.monotonic() - self._written > EVERY_S:
            self.keep()

    def keep(self) -> Path | None:
        """Write what there is, where there is something new; where it lies."""
        if len(self._cells) == len(self.known):
            return None
        self._written = time.monotonic()
        self._write(_part(self._file), list(self._cells.values()))
        return _part(self._file)

    def finish(self, cells: Sequence[Cell]) -> dict[str, Any]:
        """Write the whole, with known cells that were not asked for this time; what was written."""
        asked = {(cell.tuner, cell.layout.name) for cell in cells}
        others = [cell for place, cell in self.known.items() if place not in asked]
        value = self._write(self._file, [*cells, *others])
        _part(self._file).unlink(missing_ok=True)
        return value

    def _write(self, file: Path, cells: Sequence[Cell]) -> dict[str, Any]:
        value: dict[str, Any] = finite({
            "format_version": 1,
            "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": round(time.monotonic() - self._began, 1),
            **self._facts,
            "counts": counts(cells),
            "cells": [asdict(cell) for cell in cells],
        })  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(value, indent=1, allow_nan=False) + "\n")
        return value


def _part(file: Path) -> Path:
    return file.with_name(f"{file.name}.part")


def _known(file: Path, facts: dict[str, Any]) -> tuple[Places, float]:
    """The green cells of a certificate, and the seconds that it took so far."""
    anew = f"leave --resume out, or --out {file.with_stem(file.stem + '-2')}"
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        there = {key: value.get(key) for key in facts}
        cells = [_cell(each) for each in value["cells"] if each["verdict"] == "green"]
        seconds = float(value["seconds"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"--resume: {file} is no certificate that can be gone on with ({error})", anew) from error
    wrong = [key for key, fact in facts.items() if there[key] != finite(fact)]
    if wrong:
        raise ConfigError(f"--resume: {file} is of another {', '.join(wrong)}; its cells do not count here", anew)
    return {(cell.tuner, cell.layout.name): cell for cell in cells}, seconds


def _cell(value: dict[str, Any]) -> Cell:
    layout = value["layout"]
    return Cell(
        value["tuner"],
        Layout(layout["name"], tuple(layout["words"]), layout["ranks"]),
        value["verdict"],
        tuple(Error(**error) for error in value["errors"]),
        value["reason"],
        tuple(value["features"]),
    )


def finite(value: Any) -> Any:
    """A value as JSON has it: lists for tuples, null for numbers that are none."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else jsonable(value)
