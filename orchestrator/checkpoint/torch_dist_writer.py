"""Writing a folder that megatron-core's dist_checkpointing loads: tensor by tensor, in one process, without a GPU."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from orchestrator.checkpoint.folder import write_durably
from orchestrator.checkpoint.layout import FILE_BYTES
from orchestrator.checkpoint.torch_dist import COMMON, METADATA, SUFFIX

CONFIG = "metadata.json"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class _Disk(io.BufferedWriter):
    """A file that remembers why it could not be written: torch's archive hides that behind an error of its own."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


class TorchDistWriter:
    """A new torch_dist folder, as a context: complete and durable when it is left without an error.

    Args:
        folder: exists and is empty.
        common: what is kept once for all ranks (``common.pt``): plain values.
    """

    def __init__(self, folder: Path, common: dict[str, Any], file_bytes: int = FILE_BYTES) -> None:
        self._folder, self._common, self._file_bytes = folder, common, file_bytes
        self._tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._files = 0
        self._file: _Disk | None = None

    def __enter__(self) -> TorchDistWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            if self._file is not None:
                with contextlib.suppress(OSError):  # what is still buffered cannot be written either
                    self._file.close()
            return
        self._close_file()
        metadata = Metadata(self._tensors, storage_data=self._places)
        write_durably(self._folder / METADATA, pickle.dumps(metadata))
        buffer = io.BytesIO()
        torch.save(self._common, buffer)
        write_durably(self._folder / COMMON, buffer.getvalue())
        write_durably(self._folder / CONFIG, json.dumps(FORMAT).encode())  # by which it is known for complete

    def add(self, key: str, lead: tuple[int, ...], axes: tuple[int, ...], data: torch.Tensor) -> None:
        """Append a tensor, which is the one at the indices ``lead`` of leading axes of these sizes.

        Args:
            data: on the CPU, with memory of its own.
        Raises:
            OSError: it cannot be written.
            ValueError: what was added under this key has another type or shape.
        """
        size = torch.Size((*axes, *data.shape))
        offset = torch.Size((*lead, *(0 for _ in data.shape)))
        chunk = ChunkStorageMetadata(offset, torch.Size((*(1 for _ in axes), *data.shape)))
        stored = self._tensors.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=data.dtype), size, []))
        assert isinstance(stored, TensorStorageMetadata), key
        if (stored.size, stored.properties.dtype) != (size, data.dtype):
            held = f"{stored.properties.dtype} {tuple(stored.size)}"
            raise ValueError(f"{key} is {held}: {data.dtype} {tuple(size)} does not belong to it")
        stored.chunks.append(chunk)
        self._append(MetadataIndex(key, offset), data.reshape(chunk.sizes))

    def has(self, key: str) -> bool:
        """Whether something was added under a key."""
        return key in self._tensors

    def add_name(self, key: str, other: str) -> None:
        """Let ``key`` name the tensor that was added as ``other``, too; its bytes are there once."""
        self._tensors[key] = tensor = self._tensors[other]
        assert isinstance(tensor, TensorStorageMetadata), other
        for chunk in tensor.chunks:
            self._places[MetadataIndex(key, chunk.offsets)] = self._places[MetadataIndex(other, chunk.offsets)]

    def add_nothing(self, key: str) -> None:
        """Append an object that says None: an ``_extra_state`` without any state. Raises OSError."""
        self._tensors[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), [None])

    def _append(self, index: MetadataIndex, value: Any) -> None:
        if self._file is None or self._file.tell() >= self._file_bytes:
            self._close_file()
            self._file = _Disk(io.FileIO(self._folder / f"__0_{self._files}{SUFFIX}", "x"))
            self._files += 1
        file, start = self._file, self._file.tell()
        try:
            torch.save(value, file)
        except RuntimeError as error:
            if file.error is None:
                raise
            raise file.error from error
        self._places[index] = _StorageInfo(Path(file.name).name, start, file.tell() - start)

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
