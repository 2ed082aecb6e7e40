"""What the first rank does before and after the others write: make room, complete the folder, give it its name."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orchestrator.checkpoint.folder import (
    MANIFEST,
    REPLACED_NAME,
    STATE,
    TEMPORARY_NAME,
    free_bytes,
    remove,
    sync_folder,
    sync_tree,
    write_durably,
    write_latest,
)
from orchestrator.checkpoint.layout import Layout, weight_index
from orchestrator.checkpoint.manifest import FileRecord, Manifest, TensorRecord, installed_versions, record_of
from orchestrator.checkpoint.writing import Written


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds besides tensors; the first rank's counts.

    Args:
        room: "adapter" (weights as a PEFT folder) or "model" (weights as a transformers folder).
        state: step, samples consumed, schedule, random states, ...: a JSON-able mapping, written to state.json.
        files: more files of the room by plain name (adapter_config.json; config.json, tokenizer files): their bytes or
            a path to copy from.
        about: what the manifest should say of the writer, JSON-able: topology, data identity.
    """

    room: str
    state: Mapping[str, Any]
    files: Mapping[str, bytes | Path] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


def check_space(checkpoints: Path, layout: Layout) -> None:
    """Find out that a save would not fit. Raises OSError (ENOSPC)."""
    if layout.bytes > free_bytes(checkpoints):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(checkpoints))


def prepare(temporary: Path, layout: Layout) -> None:
    """Clear what crashed saves left, see that there is space, and make the folders."""
    checkpoints = temporary.parent
    checkpoints.mkdir(parents=True, exist_ok=True)
    for path in checkpoints.iterdir():
        aside = REPLACED_NAME.fullmatch(path.name)
        if aside and not (checkpoints / aside.group(1)).exists():
            path.rename(checkpoints / aside.group(1))
        elif aside or TEMPORARY_NAME.fullmatch(path.name):
            remove(path)
    check_space(checkpoints, layout)
    for folder in {(temporary / file.path).parent for file in layout.files}:
        folder.mkdir(parents=True)


def complete(temporary: Path, step: int, layout: Layout, written: Iterable[Written], contents: Contents) -> Path:
    """Write all that is no tensor file, the manifest last; make it all durable."""
    files: dict[str, FileRecord] = {}
    digests: dict[tuple[str, str], str] = {}
    for part in written:
        files |= part.files
        digests |= part.digests
    small = {f"{contents.room}/{name}": _data(source) for name, source in contents.files.items()}
    index = weight_index(layout.files)
    if index is not None:
        small["model/model.safetensors.index.json"] = _json(index)
    small[STATE] = _json(contents.state)
    for path, data in small.items():
        write_durably(temporary / path, data)
        files[path] = record_of(data)
    tensors = {
        (tensor.name, tensor.kind): TensorRecord(tensor, file.path, digests[file.path, tensor.key])
        for file in layout.files
        for tensor in file.tensors
    }
    manifest = Manifest(step, contents.room, installed_versions(), contents.about, files, tensors)
    write_durably(temporary / MANIFEST, manifest.to_bytes())
    sync_tree(temporary)
    return temporary


def publish(temporary: Path, final: Path, token: str) -> None:
    """Give the folder its name, then point ``latest`` at it. At every moment a whole checkpoint can be found."""
    aside = final.with_name(f"{final.name}.replaced-{token}")
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    sync_folder(final.parent)
    write_latest(final.parent, final.name, token)
    remove(aside)


def _data(source: bytes | Path) -> bytes:
    return source.read_bytes() if isinstance(source, Path) else source


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"
