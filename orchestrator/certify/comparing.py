"""How far a cell is from one process: losses, gradients, weights, each with its worst place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.folder import step_name
from orchestrator.checkpoint.load import CheckpointReader
from parallel.shards import Box

LOSS_RTOL, TENSOR_RTOL, LOGITS_ATOL = 1e-5, 1e-4, 1e-4
"""Relative; relative in Frobenius norm; absolute, of logits of size 1."""


@dataclass(frozen=True)
class Error:
    """The worst of one kind: ``what`` (loss, gradient, weight, logits), ``where``, how large, how large it may be."""

    what: str
    where: str
    value: float
    limit: float

    @property
    def share(self) -> float:
        """1 is exactly at the limit; a number that is none is infinitely far from it."""
        return self.value / self.limit if self.value == self.value else float("inf")


def errors(reference: Path, found: Path, steps: int) -> list[Error]:
    """The worst errors of a run folder against another: every loss, step 1's gradients, the last step's weights.

    Adam's first moment after one step is the gradient times ``1 - beta1``, so it stands for the gradient.
    """
    worst = [max(_losses(reference, found), key=lambda error: error.share)]
    for what, kind, step in (("gradient", "exp_avg", 1), ("moment", "exp_avg_sq", steps), ("weight", "weight", steps)):
        folders = [run / "checkpoints" / step_name(step) for run in (reference, found)]
        each = list(_tensors(what, kind, CheckpointReader(folders[0]), CheckpointReader(folders[1])))
        if each:
            worst.append(max(each, key=lambda error: error.share))
    return worst


def _losses(reference: Path, found: Path) -> Iterator[Error]:
    expected, there = (_lines(run / "metrics.jsonl") for run in (reference, found))
    if len(expected) != len(there):
        yield Error("loss", f"{len(there)} steps, not {len(expected)}", float("inf"), LOSS_RTOL)
    for one, other in zip(expected, there, strict=False):
        gap = abs(other["loss"] - one["loss"]) / abs(one["loss"])
        yield Error("loss", f"step {one['step']}", gap, LOSS_RTOL)
        norm = abs(other["grad_norm"] - one["grad_norm"]) / abs(one["grad_norm"])
        yield Error("gradient norm", f"step {one['step']}", norm, TENSOR_RTOL)


def _lines(file: Path) -> list[dict[str, float]]:
    nan = float("nan")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: nan if value is None else value for key, value in line.items()} for line in lines]


def _tensors(what: str, kind: str, one: CheckpointReader, other: CheckpointReader) -> Iterator[Error]:
    """Relative Frobenius distances of all tensors of a kind; what one side lacks is infinitely far."""
    names, there = set(one.names(kind)), set(other.names(kind))
    for name in sorted(names ^ there):
        yield Error(what, f"{name} is on one side only", float("inf"), TENSOR_RTOL)
    for name in sorted(names & there):
        shape = one.shape(name, kind)
        if other.shape(name, kind) != shape:
            yield Error(what, f"{name} has another shape", float("inf"), TENSOR_RTOL)
            continue
        expected, value = (reader.read(name, kind, Box.whole(shape)).double() for reader in (one, other))
        size, gap = float(expected.norm()), float((value - expected).norm())
        yield Error(what, name, gap / size if size else (float("inf") if gap else 0.0), TENSOR_RTOL)
