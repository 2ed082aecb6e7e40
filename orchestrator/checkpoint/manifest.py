"""The manifest: what a checkpoint holds, who wrote it, and the digests that prove it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from orchestrator.checkpoint.layout import LogicalTensor
from orchestrator.checkpoint.tensor_file import item_bytes
from orchestrator.errors import DataError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class FileRecord:
    """Size and sha256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """A logical tensor, the file that holds it and the sha256 of its row-major bytes: equal on every topology."""

    tensor: LogicalTensor
    file: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that ``manifest.json`` says.

    ``room`` is "adapter" or "model"; ``files`` goes by path in the checkpoint folder (manifest.json itself not among
    them); ``tensors`` by (name, kind); ``about`` is what the caller wants kept (topology, data identity).
    """

    step: int
    room: str
    versions: Mapping[str, str | None]
    about: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    tensors: Mapping[tuple[str, str], TensorRecord]

    def to_bytes(self) -> bytes:
        """The file's text; ``sha256`` in it is that of all the rest, so that the manifest proves itself too."""
        table = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "room": self.room,
            "versions": dict(self.versions),
            "about": dict(self.about),
            "files": {path: vars(record) for path, record in sorted(self.files.items())},
            "tensors": [
                {**vars(record.tensor), "file": record.file, "sha256": record.sha256}
                for _, record in sorted(self.tensors.items())
            ],
        }
        return json.dumps({"sha256": _digest(table), **table}, indent=1, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read and check ``manifest.json``.

        Raises:
            DataError: it is missing, was written by a later isotrain, or is damaged.
        """
        try:
            table = json.loads(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}: this is no whole checkpoint") from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path} is damaged: {error}") from error
        version = table.get("format_version") if isinstance(table, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise DataError(
                f"{path.parent} has format_version {version}, this isotrain reads up to {FORMAT_VERSION}",
                "pip install --upgrade isotrain",
            )
        if not isinstance(table, dict) or not isinstance(version, int):
            raise DataError(f"{path} is damaged: it has no format_version")
        expected = table.pop("sha256", None)
        actual = _digest(table)
        if expected != actual:
            raise DataError(f"{path} is damaged: it says sha256 {expected}, its content has {actual}")
        try:
            for name in [table["room"], *table["files"], *(item["file"] for item in table["tensors"])]:
                parts = PurePosixPath(name)
                if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
                    raise DataError(f"{path} names {name!r}, which lies outside of the checkpoint")
            return cls._from_table(table)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{path} is damaged: it is no manifest: {error!r}") from error

    @classmethod
    def _from_table(cls, table: Mapping[str, Any]) -> Manifest:
        files = {name: FileRecord(**record) for name, record in table["files"].items()}
        tensors = {}
        for item in table["tensors"]:
            tensor = LogicalTensor(item["name"], item["kind"], tuple(item["shape"]), item["dtype"])
            item_bytes(tensor.dtype)  # KeyError: no type of ours
            tensors[tensor.name, tensor.kind] = TensorRecord(tensor, item["file"], item["sha256"])
            if item["file"] not in files or min(tensor.shape, default=0) < 0:
                raise ValueError(f"tensor {tensor.name} of shape {list(tensor.shape)} in {item['file']}")
        step, about, versions = int(table["step"]), dict(table["about"]), dict(table["versions"])
        return cls(step, str(table["room"]), versions, about, files, tensors)


def record_of(data: bytes) -> FileRecord:
    """The record of a file with these bytes."""
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def _digest(table: Mapping[str, Any]) -> str:
    text = json.dumps(table, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def installed_versions() -> dict[str, str | None]:
    """What a manifest says of its writer's libraries; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in ("isotrain", "torch", "megatron-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
