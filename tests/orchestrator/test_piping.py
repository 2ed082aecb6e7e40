"""Standard output that nobody reads to its end: no words, code 141, and no other broken connection taken for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from orchestrator.piping import UNREAD, until_unread
from tests.orchestrator.test_cli import ROOT, TINY


@pytest.mark.parametrize("words", [["--json"], []], ids=["print", "rich"])
def test_a_reader_that_leaves_is_no_fault(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "orchestrator", "plan", *TINY, *words]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(writer)
    assert done.returncode == UNREAD == 141
    assert done.stderr == ""


def test_other_broken_pipes_and_exits_are_what_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    def lose_a_peer() -> int:
        raise BrokenPipeError("a store is gone")

    def leave() -> int:
        raise SystemExit(3)

    with pytest.raises(BrokenPipeError, match="a store is gone"):
        until_unread(lose_a_peer)
    with pytest.raises(SystemExit, match="3"):
        until_unread(leave)
    assert until_unread(lambda: 64) == 64
