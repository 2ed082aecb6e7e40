"""Memory that a step gives back is there for the next one without new page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

from parallel.host_memory import keep_freed_memory

PROGRAM = """
import resource, sys, torch
from parallel.host_memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(5 << 20) for _ in range(8)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
step()
step()
print(step())
"""


def faults(how: str) -> int:
    """Page faults of the third step of eight 20 MiB tensors."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_a_repeated_step_takes_no_new_pages() -> None:
    assert faults("kept") < faults("default") / 10


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
