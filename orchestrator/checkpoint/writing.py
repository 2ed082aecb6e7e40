"""The files that one rank writes of a checkpoint."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator.checkpoint.folder import explain_save
from orchestrator.checkpoint.layout import Block, FilePlan, Layout
from orchestrator.checkpoint.manifest import FileRecord
from orchestrator.checkpoint.tensor_file import FileWriter, hash_from_disk
from orchestrator.errors import IsotrainError, ResourceError


@dataclass(frozen=True)
class Written:
    """What a rank has written: records by path, and tensor digests by (path, key)."""

    files: dict[str, FileRecord]
    digests: dict[tuple[str, str], str]


class RankFiles:
    """This rank's files, written one after the other; the first failure is kept and the rest is let go by.

    One block is written and hashed beside the caller, who meanwhile fetches the next: a slow disk would hold up the
    other ranks, too.
    """

    def __init__(self, folder: Path, layout: Layout, rank: int) -> None:
        self._folder = folder
        self._layout = layout
        self._mine = [file for file, owner in zip(layout.files, layout.owners, strict=True) if owner == rank]
        self._writers: dict[str, FileWriter] = {}
        self._written = Written({}, {})
        self._problem: IsotrainError | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: Future[None] | None = None

    def receive(self, block: Block, data: torch.Tensor) -> None:
        """Append a block to its file, once the one before it is written.

        Never raises OSError: other ranks are waiting for this one.
        """
        self._wait()
        self._pending = self._thread.submit(self._append, block, data)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()

    def _append(self, block: Block, data: torch.Tensor) -> None:
        if self._problem is not None:
            return
        try:
            self._writer(block.file).write(data)
            if block.stop == block.file.data_bytes:
                self._close(block.file)
        except OSError as error:
            self._fail(error)

    def finish(self, readback: bool) -> tuple[Written, IsotrainError | None]:
        """What was written, and what went wrong. Files without data (headers only) are written here.

        Args:
            readback: hash the files again as the disk gives them back.
        """
        self._wait()
        self._thread.shutdown()
        if self._problem is None:
            try:
                for file in self._mine:
                    if file.path not in self._written.files:
                        self._writer(file)
                        self._close(file)
                if readback:
                    self._problem = self._read_back()
            except OSError as error:
                self._fail(error)
        return self._written, self._problem

    def _read_back(self) -> IsotrainError | None:
        for path, record in self._written.files.items():
            found = hash_from_disk(self._folder / path)
            if found != record.sha256:
                return ResourceError(
                    f"{self._folder / path} was written with sha256 {record.sha256}, and the disk gives back {found}; "
                    "nothing was published, what was saved before is untouched",
                    "check the disk, or set run_dir=DIR on another one, then run it again",
                )
        return None

    def _writer(self, file: FilePlan) -> FileWriter:
        if file.path not in self._writers:
            self._writers[file.path] = FileWriter(self._folder / file.path, file.entries)
        return self._writers[file.path]

    def _close(self, file: FilePlan) -> None:
        writer = self._writers[file.path]
        self._written.files[file.path] = FileRecord(writer.bytes, writer.close())
        self._written.digests.update({(file.path, key): digest for key, digest in writer.digests.items()})

    def _fail(self, error: OSError) -> None:
        self._problem = explain_save(error, self._folder, self._layout.bytes)
        for writer in self._writers.values():
            writer.abort()
