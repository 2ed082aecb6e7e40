"""The folder that runs are kept in: what its file system can do, how fast, and with which clock."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoint.folder import sync_folder
from orchestrator.config.job import ClusterConfig
from orchestrator.doctor.finding import Finding
from orchestrator.doctor.software import on_nodes

MIB = 2**20
PROBE_BYTES = 16 * MIB
SLOW_MB_S = 20.0
SKEW_S = 2.0
LOW_GIB = 1.0
SHARED = re.compile(r"nfs|lustre|gpfs|beegfs|ceph|weka|panfs|cifs|smb|gluster|orangefs|afs|9p|virtiofs|fuse\.")


@dataclass(frozen=True)
class FolderSeen:
    """What a probe in a folder found; it leaves nothing behind.

    ``folder``: the run folder, or the nearest one above it that is there. ``error``: what it refused; then nothing else
    counts. ``locks``: whether flock keeps a second process out. ``clock_s``: the folder's clock minus ours.
    """

    folder: Path
    kind: str = ""
    error: str = ""
    locks: bool = True
    clock_s: float = 0.0
    rate_mb_s: float = 0.0
    free_gib: float = 0.0


def seen_folder(run_dir: Path, probe_bytes: int = PROBE_BYTES) -> FolderSeen:
    """Write, sync, rename and lock in a folder as a run does, beside whatever lies there."""
    folder = next(one for one in (run_dir, *run_dir.parents) if one.exists())
    kind = file_system(folder, Path("/proc/self/mounts").read_text(encoding="utf-8"))
    try:
        with tempfile.TemporaryDirectory(prefix=".isotrain-doctor-", dir=folder) as probes:
            file = Path(probes) / "probe"
            rate = _write_rate(file, probe_bytes)
            clock_s = file.stat().st_mtime - time.time()
            moved = file.replace(file.with_name("moved"))
            sync_folder(Path(probes))
            locks = _locks(moved)
    except OSError as error:
        return FolderSeen(folder, kind, error.strerror or str(error))
    free = shutil.disk_usage(folder).free / 2**30
    return FolderSeen(folder, kind, "", locks, clock_s, rate, free)


def file_system(folder: Path, mounts: str) -> str:
    """The kind of the file system that a folder lies on, by the text of ``/proc/self/mounts``.

    Example:
        >>> file_system(Path("/home/me"), "dev / ext4 rw 0 0\\nserver:/home /home nfs4 rw 0 0\\n")
        'nfs4'
    """
    place, found = folder.resolve(), ""
    longest = -1
    for line in mounts.splitlines():
        _, point, kind, *_ = line.split()
        mounted = Path(point.replace("\\040", " "))
        if place.is_relative_to(mounted) and len(mounted.parts) >= longest:
            found, longest = kind, len(mounted.parts)
    return found


def _write_rate(file: Path, size: int) -> float:
    block = os.urandom(MIB)
    began = time.perf_counter()
    with file.open("wb") as stream:
        for _ in range(max(1, size // MIB)):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    return file.stat().st_size / 1e6 / (time.perf_counter() - began)


def _locks(file: Path) -> bool:
    """Whether a lock that is held keeps another one out."""
    with file.open("a") as first, file.open("a") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False  # the file system has none
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        return False


def check_folder(seen: FolderSeen, cluster: ClusterConfig, is_on_nodes: bool = False) -> Finding:
    """Whether runs can be kept there, and whether several nodes may see the same.

    Args:
        is_on_nodes: nodes are being asked (:mod:`orchestrator.doctor.shared`), so that nothing is left to guess.
    """
    place = f"{seen.folder} ({seen.kind})"
    if seen.error:
        return Finding("run folder", "fault", f"{place} cannot be written: {seen.error}", "run_dir=ANOTHER")
    if cluster.nodes == 1 or is_on_nodes:
        return Finding("run folder", "ok", f"{place} takes files, syncs and renames")
    hint = on_nodes(cluster, f"run_dir={seen.folder}")
    if not SHARED.search(seen.kind):
        words = f"{place} is on this machine's own disk, which {cluster.nodes} nodes may not share"
        return Finding("run folder", "warning", words, f"{hint}   or   run_dir=SHARED_FOLDER/NAME")
    words = f"{place} takes files, syncs and renames here; that {cluster.nodes} nodes see it only they can tell"
    return Finding("run folder", "warning", words, hint)


def check_lock(seen: FolderSeen) -> Finding:
    """Whether two launches in one folder exclude each other at once, or only by a lease of some seconds."""
    if seen.locks:
        return Finding("lock", "ok", "flock keeps a second launch out")
    words = "no flock there: a second launch is kept out by a lease of 20 s instead"
    return Finding("lock", "warning", words, "mount it with flock   or   run_dir=ANOTHER")


def check_clock(seen: FolderSeen) -> Finding:
    """Our clock against the folder's.

    Example:
        >>> check_clock(FolderSeen(Path("/runs"), clock_s=-90.0)).found
        "this machine's clock is 90.0 s ahead of the folder's"
    """
    if abs(seen.clock_s) <= SKEW_S:
        return Finding("clock", "ok", f"{abs(seen.clock_s):.1f} s from the folder's")
    way = "behind" if seen.clock_s > 0 else "ahead of"
    words = f"this machine's clock is {abs(seen.clock_s):.1f} s {way} the folder's"
    return Finding("clock", "warning", words, "timedatectl set-ntp true")


def check_speed(seen: FolderSeen) -> Finding:
    """How fast checkpoints are written (a small file, synced), and whether there is room."""
    words = f"{seen.rate_mb_s:,.0f} MB/s with fsync, {seen.free_gib:,.1f} GiB free"
    if seen.free_gib < LOW_GIB:
        return Finding("write speed", "warning", f"{words}: checkpoints may not fit", "run_dir=ANOTHER")
    if seen.rate_mb_s < SLOW_MB_S:
        hint = "checkpoint.asynchronous=true   or   run_dir=ANOTHER"
        return Finding("write speed", "warning", f"{words}: checkpoints take long", hint)
    return Finding("write speed", "ok", words)
