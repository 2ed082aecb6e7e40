"""Safetensors files: their exact layout, and reading boxes of the tensors in them. No pickle is ever opened.

A file is 8 bytes (little-endian length of the header), the header (JSON, padded with spaces to a multiple of 8 bytes)
and the data, without gaps. Format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from orchestrator.errors import DataError
from parallel.shards import Box

# In the order in which the safetensors library lays tensors out (widest first), then by name.
TORCH_DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_CODES = {dtype: code for code, dtype in TORCH_DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the library's own limit
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
EMPTY_DIGEST = hashlib.sha256().hexdigest()


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: ``dtype`` is a safetensors code ("F32"), ``start``/``stop`` bytes in the data section."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    stop: int = 0

    @property
    def bytes(self) -> int:
        """Size of the tensor in the file.

        Example:
            >>> TensorEntry("a", "BF16", (2, 3)).bytes
            12
        """
        return prod(self.shape) * item_bytes(self.dtype)


def item_bytes(dtype: str) -> int:
    """Bytes of one element.

    Example:
        >>> item_bytes("BF16")
        2
    """
    return TORCH_DTYPES[dtype].itemsize


def lay_out(tensors: Iterable[TensorEntry]) -> tuple[TensorEntry, ...]:
    """Give tensors their places in one file, exactly as the safetensors library does.

    Example:
        >>> [(t.key, t.start) for t in lay_out([TensorEntry("b", "F16", (3,)), TensorEntry("a", "F32", (2,))])]
        [('a', 0), ('b', 8)]
    """
    rank = {code: position for position, code in enumerate(TORCH_DTYPES)}
    placed, start = [], 0
    for entry in sorted(tensors, key=lambda entry: (rank[entry.dtype], entry.key.encode())):
        placed.append(TensorEntry(entry.key, entry.dtype, entry.shape, start, start + entry.bytes))
        start += entry.bytes
    return tuple(placed)


def header_bytes(placed: Sequence[TensorEntry]) -> bytes:
    """The first bytes of a file that holds these tensors (see :func:`lay_out`): length, JSON, padding."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for entry in placed:
        offsets = [entry.start, entry.stop]
        table[entry.key] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(path: Path) -> tuple[TensorEntry, ...]:
    """Read and check the header of a safetensors file, in file order.

    Raises:
        DataError: there is no such file, it is truncated or longer than its header says, or it is no safetensors file.
    """
    size = _size(path)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= min(size - 8, MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not text:
        raise DataError(f"{path} is truncated or no safetensors file: {size} bytes, its header needs {8 + length}")
    try:
        table = json.loads(text)
        entries = sorted(
            (
                TensorEntry(key, str(value["dtype"]), tuple(map(int, value["shape"])), *map(int, value["data_offsets"]))
                for key, value in table.items()
                if key != "__metadata__"
            ),
            key=lambda entry: entry.start,
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{path} has a broken safetensors header: {error!r}") from error
    _check_places(path, entries, size - 8 - length)
    return tuple(entries)


def _check_places(path: Path, entries: Sequence[TensorEntry], data_bytes: int) -> None:
    at = 0
    for entry in entries:
        known = entry.dtype in TORCH_DTYPES
        if (
            entry.start != at
            or entry.stop < at
            or min(entry.shape, default=0) < 0
            or (known and entry.stop - entry.start != entry.bytes)
        ):
            raise DataError(f"{path} has a broken safetensors header: {entry.key} at bytes {entry.start}..{entry.stop}")
        at = entry.stop
    if at != data_bytes:
        raise DataError(f"{path} is truncated or damaged: {data_bytes} bytes of data, its header says {at}")


def _size(path: Path) -> int:
    """Raises DataError."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


class TensorFiles:
    """The tensors of some safetensors files, read box by box; only what is asked for is read.

    A box whose elements follow each other in the file is read straight into its tensor; for others the file is mapped.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        """Read the headers.

        Raises:
            DataError: a file is missing, truncated or broken, or two files hold one key.
        """
        self._where: dict[str, tuple[Path, TensorEntry]] = {}
        self._mapped: dict[Path, Any] = {}
        self._sizes: dict[Path, int] = {}
        self._data_starts: dict[Path, int] = {}
        for path in paths:
            entries = read_header(path)
            self._sizes[path] = _size(path)
            self._data_starts[path] = self._sizes[path] - (entries[-1].stop if entries else 0)
            for entry in entries:
                if entry.key in self._where:
                    raise DataError(f"{entry.key} is both in {self._where[entry.key][0]} and in {path}")
                self._where[entry.key] = (path, entry)

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys, file by file in file order."""
        return tuple(self._where)

    def entry(self, key: str) -> TensorEntry:
        """Shape, type and place of a tensor. Raises KeyError when there is none."""
        return self._where[key][1]

    def path(self, key: str) -> Path:
        """The file that holds a tensor. Raises KeyError when there is none."""
        return self._where[key][0]

    def read(self, key: str, box: Box) -> torch.Tensor:
        """Read one box as a new contiguous CPU tensor of shape ``box.size`` in the stored type.

        Raises:
            KeyError: there is no such tensor.
            ValueError: the box does not lie in it.
            DataError: the file has changed since its header was read, or has a type that torch lacks.
        """
        path, entry = self._where[key]
        if len(box.size) != len(entry.shape) or any(
            start < 0 or start + count > whole
            for start, count, whole in zip(box.offset, box.size, entry.shape, strict=True)
        ):
            raise ValueError(f"{key} has shape {entry.shape}: {box} does not lie in it")
        if entry.dtype not in TORCH_DTYPES:
            raise DataError(f"{path}: {key} has type {entry.dtype}, which is not supported")
        try:
            first = first_of_run(entry.shape, box)
            return self._read_strided(path, key, box) if first is None else self._read_run(path, entry, box, first)
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error

    def _read_strided(self, path: Path, key: str, box: Box) -> torch.Tensor:
        if path not in self._mapped:
            self._mapped[path] = safe_open(str(path), framework="pt", device="cpu")
        part = self._mapped[path].get_slice(key)[box.slices]
        return part.clone(memory_format=torch.contiguous_format)  # it is a view of the mapped file

    def _read_run(self, path: Path, entry: TensorEntry, box: Box, first: int) -> torch.Tensor:
        tensor = torch.empty(box.size, dtype=TORCH_DTYPES[entry.dtype])
        content: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        view = memoryview(content)
        with path.open("rb", buffering=0) as file:
            is_same = os.fstat(file.fileno()).st_size == self._sizes[path]
            file.seek(self._data_starts[path] + entry.start + first * item_bytes(entry.dtype))
            while is_same and len(view):
                count = file.readinto(view)  # at most 2 GiB at a time
                is_same = bool(count)
                view = view[count:]
        if not is_same:
            raise DataError(f"{path} has changed since its header was read: {self._sizes[path]} bytes then")
        return tensor


def first_of_run(shape: tuple[int, ...], box: Box) -> int | None:
    """The flat index of a box's first element where its elements follow each other in a row-major tensor, else None.

    Example:
        >>> first_of_run((4, 3), Box((1, 0), (2, 3))), first_of_run((4, 3), Box((1, 1), (1, 2)))
        (3, 4)
        >>> first_of_run((4, 3), Box((0, 0), (4, 2))) is None
        True
    """
    first, stride, is_partial = 0, 1, False
    for start, count, whole in zip(reversed(box.offset), reversed(box.size), reversed(shape), strict=True):
        if is_partial and count > 1:
            return None
        first += start * stride
        stride *= whole
        is_partial |= count < whole
    return first


class FileWriter:
    """Writes one safetensors file front to back, and hashes the file and each tensor while it writes."""

    def __init__(self, path: Path, placed: Sequence[TensorEntry]) -> None:
        """Create the file and write its header. Raises OSError (a file of this name exists, no space, ...)."""
        self.path = path
        self.digests: dict[str, str] = {entry.key: EMPTY_DIGEST for entry in placed}
        self._entries = [entry for entry in placed if entry.bytes]
        self._next = 0
        self._tensor_hash = hashlib.sha256()
        self._file_hash = hashlib.sha256()
        self._file = path.open("xb")
        self._at = 0
        self._threads = ThreadPoolExecutor(2)
        header = header_bytes(placed)
        self._file.write(header)
        self._file_hash.update(header)
        self.bytes = len(header)

    def write(self, data: torch.Tensor) -> None:
        """Append bytes of the data section: a contiguous CPU tensor of any type, in file order; may span tensors."""
        array: Any = data.reshape(-1).view(torch.uint8).numpy()
        view = memoryview(array)
        # Hashing and writing let go of Python's lock: three cores share the work where there are three.
        hashing = [self._threads.submit(self._hash_tensors, view), self._threads.submit(self._file_hash.update, view)]
        try:
            self._file.write(view)
            self._file.flush()
            start_writing(self._file.fileno(), self.bytes, len(view))
        finally:
            for each in hashing:
                each.result()
        self.bytes += len(view)

    def _hash_tensors(self, view: memoryview) -> None:
        while len(view):
            entry = self._entries[self._next]
            part = view[: entry.stop - self._at]
            self._tensor_hash.update(part)
            self._at += len(part)
            view = view[len(part) :]
            if self._at == entry.stop:
                self.digests[entry.key] = self._tensor_hash.hexdigest()
                self._tensor_hash = hashlib.sha256()
                self._next += 1

    def close(self) -> str:
        """Make the file durable; returns its sha256. Raises OSError, also when the disk is full only now."""
        if self._next != len(self._entries):
            raise ValueError(f"{self.path}: {len(self._entries) - self._next} tensors were not written")
        self._threads.shutdown()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._file_hash.hexdigest()

    def abort(self) -> None:
        """Close without making anything durable."""
        self._threads.shutdown()
        with contextlib.suppress(OSError):  # what is still buffered cannot be written either
            self._file.close()


def start_writing(descriptor: int, start: int, size: int) -> None:
    """Let the kernel write a part of a file to its disk while we go on; a no-op where there is no such call.

    Without it all is written at the fsync, while nothing is left to hash.
    """
    if sys.platform == "linux":
        part = (ctypes.c_int64(start), ctypes.c_int64(size))
        ctypes.CDLL(None).sync_file_range(descriptor, *part, SYNC_FILE_RANGE_WRITE)  # refused: the fsync does it


def hash_from_disk(path: Path) -> str:
    """The sha256 of a file's bytes as its disk gives them back, not as the page cache remembers them. Raises OSError.

    The file should be durable already: only clean pages are dropped from the cache.
    """
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()
