"""Proving a checkpoint on disk, and comparing the training state of two, whatever topologies wrote them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.folder import MANIFEST, STATE
from orchestrator.checkpoint.hf_reader import read_json
from orchestrator.checkpoint.load import CheckpointReader, check_extra, check_file, locate_checkpoint
from orchestrator.checkpoint.manifest import Manifest, TensorRecord
from orchestrator.checkpoint.tensor_file import item_bytes, read_header
from orchestrator.errors import DataError
from parallel.shards import Box, flat_boxes

BUFFER_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found: ``problems`` is empty for a good checkpoint."""

    folder: Path
    step: int | None
    files: int
    tensors: int
    bytes: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


@dataclass(frozen=True)
class Difference:
    """A tensor that differs: ``largest`` is the largest absolute difference (nan where just one side is nan).

    It is None where shapes or types differ; ``reason`` tells.
    """

    name: str
    kind: str
    reason: str
    largest: float | None = None


@dataclass(frozen=True)
class Comparison:
    """How two checkpoints differ: tensors in one only, tensors that differ, keys of state.json that differ."""

    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    different: tuple[Difference, ...]
    state: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Whether both hold the same training state, bit for bit."""
        return not (self.only_in_first or self.only_in_second or self.different or self.state)


def verify_newest(path: Path) -> Report:
    """:func:`verify` of a checkpoint, or of the newest one of a run.

    Raises:
        ConfigError: there is none. DataError: ``latest`` names none.
    """
    folder, faults = locate_checkpoint(path)
    report = verify(folder)
    if not report.good and folder != path and not folder.exists():
        return verify_newest(path)  # a run that trains has taken it away, and has a newer one
    return replace(report, warnings=(*faults, *report.warnings))


def verify(folder: Path) -> Report:
    """Hash every file and every logical tensor again; all problems are listed, none is raised."""
    try:
        manifest = Manifest.read(folder / MANIFEST)
    except DataError as error:
        return Report(folder, None, 0, 0, 0, (str(error),))
    problems = []
    for path, record in manifest.files.items():
        try:
            check_file(folder / path, record, verify=True)
        except DataError as error:
            problems.append(str(error))
    warnings: tuple[str, ...] = ()
    try:
        warnings = check_extra(folder, manifest)
        if not problems:
            reader = CheckpointReader(folder)
            problems += _unlisted(folder, manifest)
            problems += [problem for record in manifest.tensors.values() for problem in _prove(reader, record)]
    except DataError as error:
        problems.append(str(error))
    total = sum(record.bytes for record in manifest.files.values())
    return Report(folder, manifest.step, len(manifest.files), len(manifest.tensors), total, tuple(problems), warnings)


def compare(first: Path, second: Path) -> Comparison:
    """Compare two checkpoint folders by their digests; only tensors that differ are read, block by block.

    Raises:
        DataError: one of them is damaged.
    """
    one, two = CheckpointReader(first, verify=True), CheckpointReader(second, verify=True)
    a, b = one.manifest.tensors, two.manifest.tensors
    different = tuple(
        _difference(one, two, a[key], b[key])
        for key in sorted(a.keys() & b.keys())
        if (a[key].tensor, a[key].sha256) != (b[key].tensor, b[key].sha256)
    )
    states = read_json(first / STATE), read_json(second / STATE)
    keys = sorted(states[0].keys() | states[1].keys())
    changed = tuple(key for key in keys if len({_canonical(_meaning(key, state.get(key))) for state in states}) > 1)
    return Comparison(_keys(a.keys() - b.keys()), _keys(b.keys() - a.keys()), different, changed)


def _prove(reader: CheckpointReader, record: TensorRecord) -> Iterator[str]:
    """Problems of one tensor: its digest, and that the file places it as the manifest says."""
    digest = hashlib.sha256()
    try:
        for box in _blocks(record):
            data = reader.read(record.tensor.name, record.tensor.kind, box)
            content: Any = data.reshape(-1).view(torch.uint8).numpy()
            digest.update(content)
    except (KeyError, ValueError) as error:
        yield f"{record.tensor.key} is not in {record.file} as the manifest says: {error}"
        return
    if digest.hexdigest() != record.sha256:
        yield f"{record.tensor.key} in {record.file}: sha256 {digest.hexdigest()}, {record.sha256} was written"


def _unlisted(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Tensors that the files hold and the manifest does not name: it has lost them, or they are foreign."""
    listed = {(record.file, record.tensor.key) for record in manifest.tensors.values()}
    for file in sorted({file for file, _ in listed}):
        for entry in read_header(folder / file):
            if (file, entry.key) not in listed:
                yield f"{file} holds {entry.key}, which the manifest does not name"


def _difference(one: CheckpointReader, two: CheckpointReader, a: TensorRecord, b: TensorRecord) -> Difference:
    name, kind = a.tensor.name, a.tensor.kind
    if a.tensor != b.tensor:
        return Difference(name, kind, f"{a.tensor.shape} {a.tensor.dtype} and {b.tensor.shape} {b.tensor.dtype}")
    largest = 0.0
    for box in _blocks(a):
        left, right = (reader.read(name, kind, box).to(torch.float64) for reader in (one, two))
        gap = torch.where(left.isnan() & right.isnan() | (left == right), 0.0, (left - right).abs()).max().item()
        largest = gap if gap != gap or gap > largest else largest
        if largest != largest:
            break
    return Difference(name, kind, f"values differ by up to {largest:.3g}", largest)


def _blocks(record: TensorRecord) -> Iterator[Box]:
    """Boxes that cover a tensor in row-major order, each of at most BUFFER_BYTES."""
    shape = record.tensor.shape
    total = Box.whole(shape).elements
    step = max(1, BUFFER_BYTES // item_bytes(record.tensor.dtype))
    for start in range(0, total, step):
        for box, _ in flat_boxes(shape, start, min(total, start + step)):
            yield box


def _keys(pairs: set[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(name if kind == "weight" else f"{name}.{kind}" for name, kind in sorted(pairs))


def _meaning(key: str, value: Any) -> object:
    """What of a value of state.json is training state: not where data lie or moments lay, nor a constant rate's end.

    Example:
        >>> _meaning("data", {"path": "/here", "sha256": "5ha", "rows": 7})
        {'sha256': '5ha', 'rows': 7}
    """
    aside = {"data": {"path"}, "schedule": {"distributed"}}.get(key, set())
    if key == "schedule" and isinstance(value, dict) and value.get("schedule") == "constant":
        aside = aside | {"steps", "min_lr"}
    return {name: one for name, one in value.items() if name not in aside} if isinstance(value, dict) else value


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)
