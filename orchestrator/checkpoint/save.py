"""Saving: whole logical tensors handed to owner ranks, hashed while written, published atomically."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.coverage import CoverageError, prove
from orchestrator.checkpoint.exchange import Peers, exchange, plan_rounds
from orchestrator.checkpoint.folder import (
    MANIFEST,
    REPLACED_NAME,
    STATE,
    TEMPORARY_NAME,
    explain,
    free_bytes,
    list_steps,
    read_latest,
    step_name,
    sync_folder,
    sync_tree,
    write_durably,
    write_latest,
)
from orchestrator.checkpoint.layout import FILE_BYTES, Block, FilePlan, Layout, LogicalTensor, make_layout, weight_index
from orchestrator.checkpoint.manifest import FileRecord, Manifest, TensorRecord, record_of
from orchestrator.checkpoint.tensor_file import DTYPE_CODES, FileWriter
from orchestrator.errors import IsotrainError
from parallel.shards import Box, Shard


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


@dataclass(frozen=True)
class SavePolicy:
    """``keep``: how many checkpoints stay (0: all). ``buffer_bytes``: staged per rank at most, beside training.

    ``file_bytes``: about how big a file gets (an adapter is one file always).
    """

    keep: int = 0
    buffer_bytes: int = 64 * 2**20
    file_bytes: int = FILE_BYTES


@dataclass(frozen=True)
class _Offer:
    """What a rank brings to a save: its pieces, and the settings (the first rank's count)."""

    pieces: list[tuple[LogicalTensor, Box]]
    room: str
    policy: SavePolicy
    token: str


@dataclass(frozen=True)
class _Written:
    """What a rank has written: records by path, and tensor digests by (path, key)."""

    files: dict[str, FileRecord]
    digests: dict[tuple[str, str], str]


def save(
    checkpoints: Path,
    step: int,
    shards: Iterable[Shard],
    contents: Contents,
    *,
    policy: SavePolicy | None = None,
    group: Any = None,
) -> Path:
    """Write ``checkpoints/step-NNNNNN`` and point ``latest`` at it. Every rank of ``group`` calls it.

    Until the last rename nothing that is already there changes; if any rank fails, every rank raises the same error
    and the unfinished folder is removed.

    Args:
        checkpoints: on a file system that all ranks see; made when missing.
        shards: this rank's pieces, weights and optimizer state; their data are read until the call returns.
        group: a process group that carries CPU tensors; the default group if None.
    Returns:
        The published folder.
    Raises:
        CoverageError: the ranks' shards do not make whole tensors.
        ResourceError: no space is left.
        ConfigError: the folder cannot be written.
    """
    peers = Peers.of(group)
    pieces, held, problem = _describe(shards, contents)
    offer = _Offer(pieces, contents.room, policy or SavePolicy(), secrets.token_hex(4))
    offers = peers.agree(offer, problem)
    policy, token = offers[0].policy, offers[0].token
    holdings = prove([other.pieces for other in offers])
    layout = make_layout(holdings, offers[0].room, peers.size, policy.file_bytes)
    temporary = checkpoints / f"{step_name(step)}.tmp-{token}"
    try:
        _on_first(peers, lambda: _prepare(temporary, layout), checkpoints, layout.bytes)
        files = _Files(temporary, layout, peers.rank)
        exchange(plan_rounds(layout, holdings, peers.size, policy.buffer_bytes), held, peers, files.receive)
        written = peers.agree(*files.finish())
        final = checkpoints / step_name(step)
        _on_first(
            peers,
            lambda: _publish(_complete(temporary, step, layout, written, contents), final, token),
            checkpoints,
            layout.bytes,
        )
    except IsotrainError:
        if peers.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if peers.rank == 0:
        _prune(checkpoints, step, policy.keep, token)
    return final


def _describe(
    shards: Iterable[Shard], contents: Contents
) -> tuple[list[tuple[LogicalTensor, Box]], dict[tuple[str, str, Box], Shard], IsotrainError | None]:
    """This rank's pieces, its shards by what they hold, and what is wrong with them (told to all before any raises)."""
    pieces, held = [], {}
    problem: IsotrainError | None = None
    for shard in shards:
        if tuple(shard.data.shape) != shard.box.size or shard.data.dtype not in DTYPE_CODES:
            problem = CoverageError(
                f"checkpoint shard {shard.name} ({shard.kind}): data {tuple(shard.data.shape)} {shard.data.dtype} "
                f"for a box of size {shard.box.size}"
            )
            break
        tensor = LogicalTensor(shard.name, shard.kind, tuple(shard.shape), DTYPE_CODES[shard.data.dtype])
        pieces.append((tensor, shard.box))
        held[shard.name, shard.kind, shard.box] = shard
    try:
        json.dumps([contents.state, contents.about])
    except (TypeError, ValueError) as error:
        problem = IsotrainError(f"the checkpoint's state is not JSON-able: {error}")
    return pieces, held, problem


def _on_first(peers: Peers, action: Callable[[], None], folder: Path, needed_bytes: int) -> None:
    """Do something on the first rank; if it fails, every rank raises the same error."""
    problem = None
    if peers.rank == 0:
        try:
            action()
        except OSError as error:
            problem = explain(error, folder, needed_bytes)
        except IsotrainError as error:
            problem = error
    peers.agree(None, problem)


class _Files:
    """This rank's files, written one after the other; the first failure is kept and the rest is let go by."""

    def __init__(self, folder: Path, layout: Layout, rank: int) -> None:
        self._folder = folder
        self._layout = layout
        self._mine = [file for file, owner in zip(layout.files, layout.owners, strict=True) if owner == rank]
        self._writers: dict[str, FileWriter] = {}
        self._written = _Written({}, {})
        self._problem: IsotrainError | None = None

    def receive(self, block: Block, data: torch.Tensor) -> None:
        """Append a block to its file. Never raises OSError: other ranks are waiting for this one."""
        if self._problem is not None:
            return
        try:
            self._writer(block.file).write(data)
            if block.stop == block.file.data_bytes:
                self._close(block.file)
        except OSError as error:
            self._fail(error)

    def finish(self) -> tuple[_Written, IsotrainError | None]:
        """What was written, and what went wrong. Files without data (headers only) are written here."""
        if self._problem is None:
            try:
                for file in self._mine:
                    if file.path not in self._written.files:
                        self._writer(file)
                        self._close(file)
            except OSError as error:
                self._fail(error)
        return self._written, self._problem

    def _writer(self, file: FilePlan) -> FileWriter:
        if file.path not in self._writers:
            self._writers[file.path] = FileWriter(self._folder / file.path, file.entries)
        return self._writers[file.path]

    def _close(self, file: FilePlan) -> None:
        writer = self._writers[file.path]
        self._written.files[file.path] = FileRecord(writer.bytes, writer.close())
        self._written.digests.update({(file.path, key): digest for key, digest in writer.digests.items()})

    def _fail(self, error: OSError) -> None:
        self._problem = explain(error, self._folder, self._layout.bytes)
        for writer in self._writers.values():
            writer.abort()


def _prepare(temporary: Path, layout: Layout) -> None:
    """Clear what crashed saves left, see that there is space, and make the folders."""
    checkpoints = temporary.parent
    checkpoints.mkdir(parents=True, exist_ok=True)
    for path in checkpoints.iterdir():
        aside = REPLACED_NAME.fullmatch(path.name)
        if aside and not (checkpoints / aside.group(1)).exists():
            path.rename(checkpoints / aside.group(1))
        elif aside or TEMPORARY_NAME.fullmatch(path.name):
            _remove(path)
    if layout.bytes > free_bytes(checkpoints):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary))
    for folder in {(temporary / file.path).parent for file in layout.files}:
        folder.mkdir(parents=True)


def _complete(temporary: Path, step: int, layout: Layout, written: Iterable[_Written], contents: Contents) -> Path:
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
    manifest = Manifest(step, contents.room, _versions(), contents.about, files, tensors)
    write_durably(temporary / MANIFEST, manifest.to_bytes())
    sync_tree(temporary)
    return temporary


def _publish(temporary: Path, final: Path, token: str) -> None:
    """Give the folder its name, then point ``latest`` at it. At every moment a whole checkpoint can be found."""
    aside = final.with_name(f"{final.name}.replaced-{token}")
    if final.exists():
        final.rename(aside)
    temporary.rename(final)
    sync_folder(final.parent)
    write_latest(final.parent, final.name, token)
    _remove(aside)


def _prune(checkpoints: Path, step: int, keep: int, token: str) -> None:
    """Delete the oldest before ``step`` beyond ``keep``; never ``latest``, never one of a later step."""
    latest = read_latest(checkpoints)
    older = [path for other, path in list_steps(checkpoints) if other < step and path.name != latest]
    for path in older[: max(0, len(older) - (keep - 1))] if keep else []:
        doomed = path.with_name(f"{path.name}.tmp-{token}")  # a half-deleted folder must not look like a checkpoint
        with contextlib.suppress(OSError):  # that an old one stays is no reason to end a run
            path.rename(doomed)
            _remove(doomed)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _data(source: bytes | Path) -> bytes:
    return source.read_bytes() if isinstance(source, Path) else source


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("isotrain", "torch", "megatron-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
