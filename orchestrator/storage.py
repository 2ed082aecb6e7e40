"""Copies to and from object stores and other file systems, by fsspec URLs (``s3://``, ``gcs://``, ``file://``).

A copy is proven: every file is read back where it went and hashed. It is published by its last file (a checkpoint's
manifest, an export's marker), so that what is there without it is known for unfinished, and is gone on with.
"""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from orchestrator.checkpoint.folder import LATEST, MANIFEST, MARKER, NO_SPACE
from orchestrator.checkpoint.load import hash_file
from orchestrator.checkpoint.manifest import FileRecord, Manifest, record_of
from orchestrator.errors import ConfigError, DataError, ResourceError

NEWEST = f"checkpoints/{LATEST}"  # in a run folder
PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "http": "aiohttp",
    "https": "aiohttp",
}
BLOCK_BYTES = 8 * 2**20
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
# What clients of stores raise for a bad line, where they do not raise OSError as fsspec asks them to.
FOREIGN = (
    *(("gcsfs.retry", "HttpError"), ("botocore.exceptions", "BotoCoreError")),
    *(("aiohttp", "ClientError"), ("azure.core.exceptions", "AzureError")),
)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Retry:
    """How often an operation is tried when it fails in a way that may pass, and what is waited: doubled each time."""

    attempts: int = 5
    first_wait_s: float = 1.0
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Sent:
    """What a copy did: files and bytes that were written, and files that were there already and proven."""

    files: int
    bytes: int
    kept: int


def is_url(text: str) -> bool:
    """Whether a name is a URL and no path of this machine.

    Example:
        >>> is_url("s3://bucket/x"), is_url("runs/x")
        (True, False)
    """
    return "://" in text


class Place:
    """A folder behind a URL or a path; operations that fail in passing are tried again."""

    def __init__(self, url: str, retry: Retry | None = None) -> None:
        """Find the file system; nothing is read.

        Raises:
            ConfigError: there is no file system for this URL, or its package is not installed.
        """
        self.url = url.rstrip("/")
        self._retry = retry or Retry()
        self._local = not is_url(url) or url.startswith(("file://", "local://"))
        options: dict[str, Any] = {"auto_mkdir": True} if self._local else {}
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as error:
            protocol = url.partition("://")[0]
            package = PACKAGES.get(protocol)
            raise ConfigError(f"{url} needs a package: {error}", f"pip install {package or protocol}") from error
        except ValueError as error:
            raise ConfigError(f"{url} cannot be opened: {error}", "s3://BUCKET/PATH, gcs://... or a folder") from error

    def files(self) -> dict[str, int]:
        """All files below, by relative path, with their bytes; empty where nothing is there."""

        def find() -> dict[str, int]:
            self._system.invalidate_cache()
            found = self._system.find(self._root, detail=True)
            start = len(self._root.rstrip("/")) + 1
            return {path[start:]: int(info["size"]) for path, info in found.items()}

        return self._try("be listed", find)

    def read(self, path: str) -> bytes:
        """A small file. Raises DataError when it is not there."""
        content: bytes = self._try(f"give {path}", lambda: self._system.cat_file(self._path(path)))
        return content

    def remove(self, path: str) -> None:
        """Delete a file."""
        self._try(f"lose {path}", lambda: self._system.rm_file(self._path(path)))

    def digest(self, path: str) -> str:
        """The sha256 of a file, read in blocks."""

        def read() -> str:
            with self._system.open(self._path(path), "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()

        return self._try(f"give {path}", read)

    def receive(self, path: str, source: Place, record: FileRecord) -> None:
        """Copy a file from another place in blocks, and read it back.

        Raises:
            DataError: it is not what ``record`` says, at the source, or here after as many attempts as are allowed.
            ConfigError, ResourceError: it cannot be written.
        """
        for attempt in range(1, self._retry.attempts + 1):
            sent = self._try(f"take {path}", lambda: self._copy(path, source))
            if sent != record:
                raise DataError(
                    f"{source.url}/{path} is damaged: {sent.bytes} bytes with sha256 {sent.sha256}, {record.bytes} "
                    f"with {record.sha256} were written"
                )
            if (kept := self.digest(path)) == record.sha256:
                return
            if attempt == self._retry.attempts:
                raise DataError(
                    f"{self.url}/{path} has sha256 {kept}, {record.sha256} was written, {attempt} times over",
                    "this place does not keep what it is given: choose another",
                )

    def _copy(self, path: str, source: Place) -> FileRecord:
        digest, size = hashlib.sha256(), 0
        with (
            source._system.open(source._path(path), "rb") as incoming,
            self._system.open(self._path(path), "wb") as outgoing,
        ):
            while block := incoming.read(BLOCK_BYTES):
                digest.update(block)
                size += len(block)
                outgoing.write(block)
            if self._local:
                outgoing.flush()
                os.fsync(outgoing.fileno())
        return FileRecord(size, digest.hexdigest())

    def _path(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    def _try(self, what: str, action: Callable[[], Result]) -> Result:
        """Do something, again after a while where it fails in a way that may pass."""
        wait_s = self._retry.first_wait_s
        attempt = 0
        while True:
            attempt += 1
            try:
                return action()
            except FileNotFoundError as error:
                raise DataError(f"{self.url} cannot {what}: {error}") from error
            except PERMANENT as error:
                raise ConfigError(f"{self.url} cannot {what}: {error}", "name a place that you may use") from error
            except _passing() as error:
                if isinstance(error, OSError) and error.errno in (*NO_SPACE, errno.EROFS):
                    raise ResourceError(
                        f"{self.url} cannot {what}: {error.strerror}",
                        "free some space there or name another place, then run it again: it goes on where it stopped",
                    ) from error
                if attempt == self._retry.attempts:
                    raise ResourceError(
                        f"{self.url} cannot {what} after {attempt} attempts: {error}",
                        "run it again: it goes on where it stopped",
                    ) from error
            self._retry.sleep(wait_s)
            wait_s *= 2


def _passing() -> tuple[type[Exception], ...]:
    """Errors that may pass: of the system, and of the clients that are loaded."""
    loaded = ((sys.modules.get(module), name) for module, name in FOREIGN)
    return (OSError, *(getattr(module, name) for module, name in loaded if hasattr(module, name)))


def copy_checkpoint(source: str, target: str, retry: Retry | None = None) -> Sent:
    """Copy one checkpoint to a new folder; called again it proves what is there, and copies what is missing.

    Args:
        source: the URL or path of a checkpoint's folder (``.../step-000100``).
        target: the URL or path that will be one.
    Raises:
        ConfigError: ``source`` is no checkpoint, or ``target`` holds something else.
        DataError: the source is damaged, or the target does not keep what it is given.
        ResourceError: a place does not answer.
    """
    here, there = Place(source, retry), Place(target, retry)
    files = here.files()
    if NEWEST in files:
        newest = f"{source.rstrip('/')}/checkpoints/{here.read(NEWEST).decode().strip()}"
        raise ConfigError(f"{source} is a run; one checkpoint is copied", f"isotrain copy {newest} {target}")
    if MANIFEST not in files:
        raise ConfigError(
            f"{source} has no {MANIFEST}: it is no checkpoint, or a copy that did not end",
            "name the folder of one, such as runs/my-run/checkpoints/step-000100",
        )
    text = here.read(MANIFEST)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / MANIFEST).write_bytes(text)
        manifest = Manifest.read(Path(folder) / MANIFEST)
    found = there.files()
    if MANIFEST in found and there.read(MANIFEST) != text:
        raise ConfigError(f"{target} holds another checkpoint", "choose a place that does not exist yet")
    return _send(here, there, {**manifest.files, MANIFEST: record_of(text)}, MANIFEST, found)


def upload(folder: Path, url: str, retry: Retry | None = None) -> Sent:
    """Copy an export's folder to a URL; its marker goes last. Called again it goes on. Raises as copy_checkpoint."""
    here, there = Place(str(folder), retry), Place(url, retry)
    records = {path: FileRecord(size, hash_file(folder / path)) for path, size in here.files().items()}
    found = there.files()
    if MARKER in found and set(found) <= set(records):
        there.remove(MARKER)  # of an earlier export, of which some files are replaced now
        del found[MARKER]
    return _send(here, there, records, MARKER, found)


def _send(here: Place, there: Place, records: Mapping[str, FileRecord], last: str, found: Mapping[str, int]) -> Sent:
    foreign = sorted(set(found) - set(records))
    if foreign:
        raise ConfigError(
            f"{there.url} is not empty: {', '.join(foreign[:3])} did not come from here",
            "choose a place that does not exist yet",
        )
    files, size, kept = 0, 0, 0
    for path, record in sorted(records.items(), key=lambda item: (item[0] == last, item[0])):
        if found.get(path) == record.bytes and there.digest(path) == record.sha256:
            kept += 1
            continue
        there.receive(path, here, record)
        files, size = files + 1, size + record.bytes
    return Sent(files, size, kept)
