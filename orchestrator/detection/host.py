"""This host: its memory, and the accelerators that torch sees."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

DRIVER = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Accelerators:
    """What torch sees. ``build``: its CUDA version, None for CPUs only; ``reason``: why it sees no device."""

    build: str | None = None
    nccl: str = ""
    driver: str = ""
    names: tuple[str, ...] = ()
    memory_gib: tuple[float, ...] = ()
    reason: str = ""


def available_memory_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that this process may still get: the machine's, or what is left of its container's if that is less."""
    fields = dict(line.split(":") for line in (proc / "meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def has_driver() -> bool:
    """Whether there is anything of a GPU here at all; torch, which takes two seconds to import, is asked only then."""
    return DRIVER.exists() or shutil.which("nvidia-smi") is not None


def seen_accelerators() -> Accelerators:
    """What torch sees of CUDA here; nothing is allocated on a device."""
    import torch

    if torch.version.cuda is None:
        return Accelerators()
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:  # torch's own words: no driver, or one that is too old
        return Accelerators(torch.version.cuda, driver=_driver(), reason=str(error).splitlines()[0])
    there = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return Accelerators(
        build=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "",
        driver=_driver(),
        names=tuple(one.name for one in there),
        memory_gib=tuple(one.total_memory / 2**30 for one in there),
    )


def seen_nvlinks() -> int | None:
    """NVLinks of the first GPU that are up; None where nvidia-smi cannot say."""
    said = _said(["nvidia-smi", "nvlink", "--status", "--id=0"])
    return None if said is None else len(re.findall(r"Link \d+: [\d.]+ GB/s", said))


def _driver() -> str:
    lines = (_said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "").split()
    return lines[0] if lines else ""


def _said(words: list[str]) -> str | None:
    """What a command of the driver prints; None where it is not there, fails, or hangs."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
