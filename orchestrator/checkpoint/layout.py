"""Which logical tensor lies in which file of a checkpoint, and which rank writes that file. Pure.

The files depend on the logical tensors only, never on the ranks: any topology writes the same bytes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from orchestrator.checkpoint.tensor_file import TensorEntry, header_bytes, item_bytes, lay_out

FILE_BYTES = 512 * 2**20
ROOMS = ("adapter", "model")


@dataclass(frozen=True)
class LogicalTensor:
    """A whole tensor of the run: ``dtype`` is a safetensors code, ``kind`` "weight" or an optimizer state's name."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def key(self) -> str:
        """The tensor's key in its file: optimizer files hold several kinds under one name.

        Example:
            >>> LogicalTensor("a.weight", "exp_avg", (2,), "F32").key
            'a.weight.exp_avg'
        """
        return self.name if self.kind == "weight" else f"{self.name}.{self.kind}"

    @property
    def entry(self) -> TensorEntry:
        """The tensor as a not yet placed entry of a file."""
        return TensorEntry(self.key, self.dtype, self.shape)


@dataclass(frozen=True)
class FilePlan:
    """One file: its path in the checkpoint folder and its tensors in file order."""

    path: str
    tensors: tuple[LogicalTensor, ...]

    @cached_property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The places of ``tensors`` (same order)."""
        return lay_out(tensor.entry for tensor in self.tensors)

    @cached_property
    def data_bytes(self) -> int:
        """Bytes of the data section."""
        return sum(entry.bytes for entry in self.entries)

    @cached_property
    def bytes(self) -> int:
        """Bytes of the whole file."""
        return len(header_bytes(self.entries)) + self.data_bytes


@dataclass(frozen=True)
class Layout:
    """The files of a checkpoint that hold tensors, and for each the rank that writes it."""

    files: tuple[FilePlan, ...]
    owners: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.bytes for file in self.files)


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """A sort key that puts layer 2 before layer 10.

    Example:
        >>> sorted(["layers.10.b", "layers.2.b"], key=natural)
        ['layers.2.b', 'layers.10.b']
    """
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name))


def make_layout(tensors: Iterable[LogicalTensor], room: str, ranks: int, file_bytes: int = FILE_BYTES) -> Layout:
    """Place tensors in files of about ``file_bytes`` and share the files out among ranks, balanced by bytes.

    Weights go to ``adapter/adapter_model.safetensors`` (one file: PEFT reads no other) or to ``model/`` under the names
    that transformers reads; every other kind to ``optimizer/part-*``, sorted by name, so that one name's moments lie
    side by side.

    Args:
        room: "adapter" or "model".
        file_bytes: a new file begins when the next tensor would exceed it.
    Raises:
        ValueError: there is no such room, or two tensors have the same name and kind.
    Example:
        >>> weight = LogicalTensor("w", "weight", (2, 2), "F32")
        >>> moment = LogicalTensor("w", "exp_avg", (2, 2), "F32")
        >>> layout = make_layout([weight, moment], "adapter", ranks=2)
        >>> [file.path for file in layout.files], layout.owners
        (['adapter/adapter_model.safetensors', 'optimizer/part-00001-of-00001.safetensors'], (1, 0))
    """
    if room not in ROOMS:
        raise ValueError(f"a checkpoint has no room {room!r} (known: {', '.join(ROOMS)})")
    ordered = sorted(tensors, key=lambda tensor: (natural(tensor.name), tensor.kind))
    twice = {a.key for a, b in itertools.pairwise(ordered) if (a.name, a.kind) == (b.name, b.kind)}
    if twice:
        raise ValueError(f"described twice: {', '.join(sorted(twice))}")
    weights = [tensor for tensor in ordered if tensor.kind == "weight"]
    others = [tensor for tensor in ordered if tensor.kind != "weight"]
    files: list[FilePlan] = []
    if room == "adapter":
        files.append(_file("adapter/adapter_model.safetensors", weights))
    else:
        parts = _cut(weights, file_bytes) or [[]]
        if len(parts) == 1:
            files.append(_file("model/model.safetensors", parts[0]))
        else:
            files += _numbered("model/model", parts)
    files += _numbered("optimizer/part", _cut(others, file_bytes))
    return Layout(tuple(files), assign([file.bytes for file in files], ranks))


def assign(sizes: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Give each item to the rank with the least so far, biggest items first; ties go to the lowest rank.

    No rank then has more than the average plus one item (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969).

    Example:
        >>> assign([10, 30, 20, 10], 2)
        (1, 0, 1, 0)
    """
    load = [0] * ranks
    owners = [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        owners[item] = min(range(ranks), key=lambda rank: (load[rank], rank))
        load[owners[item]] += sizes[item]
    return tuple(owners)


def weight_index(files: Iterable[FilePlan]) -> Mapping[str, object] | None:
    """The ``model.safetensors.index.json`` of a model in several files; None when it needs none."""
    shards = [file for file in files if file.path.startswith("model/model-")]
    if not shards:
        return None
    places = {tensor.key: file.path.removeprefix("model/") for file in shards for tensor in file.tensors}
    return {
        "metadata": {"total_size": sum(file.data_bytes for file in shards)},
        "weight_map": dict(sorted(places.items(), key=lambda item: natural(item[0]))),
    }


def _cut(tensors: Sequence[LogicalTensor], file_bytes: int) -> list[list[LogicalTensor]]:
    parts: list[list[LogicalTensor]] = []
    filled = 0
    for tensor in tensors:
        if not parts or filled + tensor.entry.bytes > file_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += tensor.entry.bytes
    return parts


def _file(path: str, tensors: Sequence[LogicalTensor]) -> FilePlan:
    by_key = {tensor.key: tensor for tensor in tensors}
    return FilePlan(path, tuple(by_key[entry.key] for entry in lay_out(tensor.entry for tensor in tensors)))


def _numbered(stem: str, parts: Sequence[Sequence[LogicalTensor]]) -> list[FilePlan]:
    return [_file(f"{stem}-{number:05d}-of-{len(parts):05d}.safetensors", part) for number, part in enumerate(parts, 1)]


@dataclass(frozen=True)
class Block:
    """A byte range of one file's data section; the unit that is gathered, hashed and written at a time.

    ``number`` counts the owner's blocks, in the order of writing.
    """

    owner: int
    number: int
    file: FilePlan
    start: int
    stop: int


def cut_blocks(layout: Layout, owner: int, block_bytes: int) -> Iterator[Block]:
    """Cut one owner's files into blocks of at most ``block_bytes`` (one element at least), in the order of writing.

    A block ends between tensors, or after a whole row of one where a row fits.
    """
    number = 0
    for file, writer in zip(layout.files, layout.owners, strict=True):
        if writer != owner:
            continue
        start, position = 0, 0
        entries = file.entries
        while start < file.data_bytes:
            stop = min(start + block_bytes, file.data_bytes)
            while entries[position].stop < stop:
                position += 1
            stop = _snap(entries[position], start, stop)
            yield Block(owner, number, file, start, stop)
            start, number = stop, number + 1


def _snap(entry: TensorEntry, start: int, stop: int) -> int:
    """Move ``stop``, which lies in ``entry``, down to the end of a row, or of an element where a row is too long."""
    if stop == entry.stop:
        return stop
    item = item_bytes(entry.dtype)
    row = entry.bytes // entry.shape[0] if entry.shape else item
    for unit in (row, item):
        end = entry.start + (stop - entry.start) // unit * unit
        if end > start:
            return end
    return start + item
