"""Folders in the format of torch.distributed.checkpoint, which megatron-core calls ``torch_dist``: reading, writing.

``.metadata`` is a pickle that lists tensors and the pieces they are stored in; each piece is what ``torch.save`` makes
of it, one after the other in ``__0_0.distcp`` and so on. To read one needs no trust in it: ``.metadata`` goes through
an unpickler that knows the names of a few classes, and puts inert records in their place; pieces go through torch's
weights-only unpickler. For ``common.pt`` see :mod:`orchestrator.checkpoint.megatron_optimizer`.
"""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import IO, Any

import torch

from orchestrator.checkpoint.coverage import CoverageError, prove
from orchestrator.checkpoint.layout import LogicalTensor
from orchestrator.checkpoint.tensor_file import DTYPE_CODES, TORCH_DTYPES
from orchestrator.checkpoint.unpickling import BROKEN, ListUnpickler, load_tensors, reason
from orchestrator.errors import DataError
from parallel.shards import Box

METADATA = ".metadata"
COMMON = "common.pt"  # what is kept once for all ranks
SUFFIX = ".distcp"


@dataclass(frozen=True)
class Item:
    """One stored piece of a tensor: its ``box``, and the bytes of the file that hold it."""

    box: Box
    file: str
    start: int
    bytes: int


@dataclass(frozen=True)
class Stored:
    """A tensor of a folder: ``dtype`` is a safetensors code, or torch's name where safetensors has none.

    ``items`` are sorted by their offsets: a tensor of all layers and experts has thousands.
    """

    dtype: str
    shape: tuple[int, ...]
    items: tuple[Item, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return [item.box.offset[0] for item in self.items]

    @cached_property
    def _longest(self) -> int:
        return max((item.box.size[0] for item in self.items), default=0)

    def around(self, box: Box) -> tuple[Item, ...]:
        """The pieces that may have a part in ``box``, by its first axis; none of the others has.

        Example:
            >>> rows = [Item(Box((row, 0), (1, 4)), "__0_0.distcp", 0, 0) for row in range(9)]
            >>> [item.box.offset[0] for item in Stored("F32", (9, 4), tuple(rows)).around(Box((3, 1), (2, 1)))]
            [3, 4]
        """
        if not self.shape:
            return self.items
        first = bisect_right(self._starts, box.offset[0] - self._longest)
        return self.items[first : bisect_left(self._starts, box.offset[0] + box.size[0])]


class TorchDistReader:
    """The tensors of a folder by their keys, read box by box; of the files only the pieces that are asked for.

    What is said of a tensor is checked when it is asked for: optimizers store theirs in ways of their own. ``objects``
    are the keys of what is no tensor (``_extra_state``, random states), which is not read.
    """

    def __init__(self, folder: Path) -> None:
        """Read ``.metadata``.

        Raises:
            DataError: it is missing or broken, or asks for code to run.
        """
        self.folder = folder
        self._listed, self._places, self.objects = _read_metadata(folder / METADATA)
        self._known: dict[str, Stored] = {}

    @property
    def keys(self) -> Collection[str]:
        """The keys of all tensors."""
        return self._listed.keys()

    def stored(self, key: str) -> Stored:
        """What is said of a tensor.

        Raises:
            KeyError: there is no such tensor.
            DataError: it leads out of the folder, or the tensor's pieces do not make it whole.
        """
        if key not in self._known:
            listed = self._listed[key]
            try:
                self._known[key] = tensor = _stored(key, listed, self._places)
            except BROKEN as error:
                raise DataError(f"{self.folder / METADATA}: {key} is listed wrongly: {reason(error)}") from error
            _check_whole(self.folder, key, tensor)
        return self._known[key]

    def read(self, key: str, box: Box) -> torch.Tensor:
        """Read one box: a new CPU tensor of shape ``box.size`` in the stored type.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the box does not lie in it.
            DataError: a file is missing or damaged, holds another tensor than ``.metadata`` says, or asks for code.
        """
        tensor = self.stored(key)
        if box.intersect(Box.whole(tensor.shape)) != box:
            raise ValueError(f"{key} has shape {tensor.shape}: {box} does not lie in it")
        if tensor.dtype not in TORCH_DTYPES:
            raise DataError(f"{self.folder}: {key} has type {tensor.dtype}, which is not supported")
        result = torch.empty(box.size, dtype=TORCH_DTYPES[tensor.dtype])
        for item in tensor.around(box):
            if (common := item.box.intersect(box)) is not None:
                data = self._load(key, tensor.dtype, item)
                inside, target = (common.shift(tuple(-n for n in each.offset)) for each in (item.box, box))
                result[target.slices] = data[inside.slices]
        return result

    def _load(self, key: str, dtype: str, item: Item) -> torch.Tensor:
        path = self.folder / item.file
        try:
            with path.open("rb") as file:
                window = io.BufferedReader(_Window(file, item.start, item.bytes))
                data = load_tensors(window)
        except FileNotFoundError as error:
            raise DataError(f"{path} is missing: a piece of {key} is in it") from error
        except BROKEN as error:
            raise DataError(f"{path} is damaged, or asks for code to run, at {key}: {reason(error)}") from error
        count = prod(item.box.size)
        if type(data) is not torch.Tensor or DTYPE_CODES.get(data.dtype) != dtype or data.numel() != count:
            raise DataError(f"{path} is damaged: at {key} it does not hold the {dtype} {item.box.size} of {METADATA}")
        return data.reshape(item.box.size)  # old versions leave leading axes of one away


def _read_metadata(path: Path) -> tuple[dict[str, Any], dict[tuple[str, Any], Any], tuple[str, ...]]:
    """What is listed of each tensor, where each of its pieces lies by ``(key, offset)``, and what else is listed."""
    try:
        with path.open("rb") as file:
            metadata = ListUnpickler(file).load()
        listed = metadata.state["storage_data"].items()
        places = {(index.state["fqn"], index.state.get("offset")): info.state for index, info in listed}
        every = metadata.state["state_dict_metadata"].items()
        tensors = {key: one.state for key, one in every if type(one).__name__ == "TensorStorageMetadata"}
        return tensors, places, tuple(str(key) for key, _ in every if key not in tensors)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: this is no torch_dist checkpoint") from error
    except BROKEN as error:
        raise DataError(f"{path} is no list of tensors, and nothing in it is run: {reason(error)}") from error


def _stored(key: str, tensor: Mapping[str, Any], places: Mapping[Any, Any]) -> Stored:
    items = []
    for chunk in tensor["chunks"]:
        box = Box(tuple(map(int, chunk.state["offsets"])), tuple(map(int, chunk.state["sizes"])))
        place = places[key, box.offset]
        if place.get("transform_descriptors"):
            raise ValueError(f"{key} is stored {place['transform_descriptors']}")
        items.append(Item(box, str(place["relative_path"]), int(place["offset"]), int(place["length"])))
    dtype = tensor["properties"].state
    dtype = dtype[0] if isinstance(dtype, tuple) else dtype["dtype"]
    return Stored(str(dtype), tuple(tensor["size"]), tuple(sorted(items, key=lambda item: item.box.offset)))


def _check_whole(folder: Path, key: str, tensor: Stored) -> None:
    whole = Box.whole(tensor.shape)
    for item in tensor.items:
        if Path(item.file).name != item.file or "\\" in item.file or not item.file.endswith(SUFFIX):
            raise DataError(f"{folder / METADATA} names {item.file!r}: only {SUFFIX} files beside it are read")
        if len(item.box.size) != len(tensor.shape) or item.box.intersect(whole) != item.box:
            raise DataError(f"{folder / METADATA}: {key} has shape {tensor.shape}, a piece of it is {item.box}")
    elements = sum(item.box.elements for item in tensor.items)
    if elements != whole.elements:
        raise DataError(f"{folder / METADATA}: {key} has {whole.elements} elements, its pieces have {elements}")
    logical = LogicalTensor(key, "weight", tensor.shape, tensor.dtype)
    try:
        prove([[(logical, item.box) for item in tensor.items]])
    except CoverageError as error:
        raise DataError(f"{folder / METADATA}: {error}") from error


class _Window(io.RawIOBase):
    """Some bytes of a file as a file of their own; what lies behind them cannot be read."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        self._file.seek(self._start + self._at)
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]  # of a buffered reader
        self._at += count
        return count
