"""How far a cell is from one process: losses, gradients, weights, each with its worst place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator.certify.projecting import Kept, apart, carried, turned
from orchestrator.checkpoint.folder import step_name
from orchestrator.checkpoint.load import CheckpointReader
from orchestrator.config.building import read_job
from parallel.shards import Box

LOSS_RTOL, TENSOR_RTOL, LOGITS_ATOL = 1e-5, 1e-4, 1e-4
"""Relative; relative in Frobenius norm; absolute, of logits of size 1."""


@dataclass(frozen=True)
class Error:
    """The worst of one kind: ``what`` (loss, gradient, moment, weight, logits; of GaLore subspace and turn), ``where``,
    how large, how large it may be."""

    what: str
    where: str
    value: float
    limit: float

    @property
    def share(self) -> float:
        """1 is exactly at the limit; a number that is none is infinitely far from it."""
        return self.value / self.limit if self.value == self.value else float("inf")


def errors(reference: Path, found: Path, steps: int) -> list[Error]:
    """The worst errors of a run folder against another: every loss, the gradients, the last step's weights.

    Adam's first moment stands for the gradients: it is their mean over the steps, each ``beta1`` times as heavy as the
    next. (Those of step 1 alone say little of an adapter, whose A has none while B is zero.) Moments that GaLore keeps
    are compared in one basis (:mod:`orchestrator.certify.projecting`), which takes the checkpoints of all steps.
    """
    one, other = (_readers(run, steps) for run in (reference, found))
    projected = _projected(reference, one, other)
    worst = [max(_losses(reference, found), key=lambda error: error.share)]
    apart = {error.where for error in projected}
    for what, kind in (("gradient", "exp_avg"), ("moment", "exp_avg_sq"), ("weight", "weight")):
        each = list(_tensors(what, kind, one[-1], other[-1]))
        each = [error for error in each if kind == "weight" or error.where not in apart]
        each += [error for error in projected if error.what == what]
        if each:
            worst.append(max(each, key=lambda error: error.share))
    for what in ("subspace", "turn"):
        if each := [error for error in projected if error.what == what]:
            worst.append(max(each, key=lambda error: error.share))
    return worst


def _readers(run: Path, steps: int) -> list[CheckpointReader]:
    """Of the checkpoints that there are, of which the last is the last step's."""
    folders = [run / "checkpoints" / step_name(step) for step in range(1, steps + 1)]
    return [CheckpointReader(folder) for folder in folders if folder.is_dir() or folder == folders[-1]]


def _projected(reference: Path, ones: Sequence[CheckpointReader], others: Sequence[CheckpointReader]) -> list[Error]:
    """All errors of the matrices that GaLore projects in both runs, and whose shapes are equal."""
    names = sorted(set(ones[0].names("projector")) & set(others[0].names("projector")))
    if not names:
        return []
    first, second = read_job(reference).optimizer.betas
    errors = []
    for name in names:
        if any(ones[0].shape(name, kind) != others[0].shape(name, kind) for kind in ("projector", "exp_avg")):
            continue
        one, other = ([_kept(reader, name) for reader in run] for run in (ones, others))
        moved = carried(one, other, (first, second))
        errors.append(Error("gradient", name, _gap(moved[0].first, other[0].first), TENSOR_RTOL))
        errors.append(Error("moment", name, _gap(moved[-1].second, other[-1].second), TENSOR_RTOL))
        subspace = max(apart(ours.projector, theirs.projector) for ours, theirs in zip(one, other, strict=True))
        errors.append(Error("subspace", name, subspace, TENSOR_RTOL))
        errors.append(Error("turn", name, _turn(one, other, first), TENSOR_RTOL))
    return errors


def _turn(one: Sequence[Kept], other: Sequence[Kept], beta: float) -> float:
    """The largest of the steps in which the reference chose its subspace."""
    before, worst = None, 0.0
    for ours, theirs in zip(one, other, strict=True):
        if before is None or not torch.equal(before.projector, ours.projector):
            gained = ours.first if before is None else ours.first - beta * before.first
            worst = max(worst, turned(ours, theirs.projector, gained / (1 - beta)))
        before = ours
    return worst


def _kept(reader: CheckpointReader, name: str) -> Kept:
    """What GaLore keeps of a matrix in a checkpoint."""
    kinds = ("projector", "exp_avg", "exp_avg_sq")
    return Kept(*(reader.read(name, kind, Box.whole(reader.shape(name, kind))).double() for kind in kinds))


def _gap(expected: torch.Tensor, value: torch.Tensor) -> float:
    """The relative distance in Frobenius norm."""
    size, gap = float(expected.norm()), float((value - expected).norm())
    return gap / size if size else (float("inf") if gap else 0.0)


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
        yield Error(what, name, _gap(expected, value), TENSOR_RTOL)
