"""Memory that a step gives back stays there for the next one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from parallel.host_memory import keep_freed_memory

PROGRAM = """
import sys, torch
from pathlib import Path
from parallel.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 / 1024
before = resident_mib()
block = torch.ones(6 << 20)
assert resident_mib() - before > 20
del block
print(resident_mib() - before)
"""


def stays_mib(how: str) -> float:
    """What stays with the process of a 24 MiB tensor that was given back, in MiB."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_is_given_back_stays_with_the_process() -> None:
    assert stays_mib("kept") > 20
    assert stays_mib("default") < 12


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
