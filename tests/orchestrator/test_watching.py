"""``isotrain status --watch``, as a person sees it on a (pseudo-)terminal, and as a file gets it."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.cli import main
from orchestrator.jobs import watching
from orchestrator.jobs.follow import Status
from tests.helpers.screen import Screen

HEAD = "job  state      code  step  saved  nodes  run           why"


def status(state: str, step: int, reason: str = "", code: int | None = None) -> Status:
    return Status(Path("/runs/[tide]"), "7", state, reason, "node1", step, 0, 8, code)


def looks(*found: Status) -> Callable[[], list[Status]]:
    """What is found at one look after the other; after that the user presses Ctrl-C."""
    left = list(found)

    def look() -> list[Status]:
        if not left:
            raise KeyboardInterrupt
        return [left.pop(0)]

    return look


def test_a_terminal_has_one_table_that_is_drawn_anew() -> None:
    screen = Screen()
    with watching.display(Console(file=screen.stream, force_terminal=True, width=100)) as show:
        show([status("PENDING", 0, "(Resources)")])
        assert [line.split() for line in screen.lines()[1:]] == [
            ["7", "PENDING", "0/8", "0", "node1", "/runs/[tide]", "(Resources)"]
        ]
        show([status("COMPLETED", 8, code=0)])
        drawn = screen.lines()
        assert drawn[0] == HEAD and drawn[1].split()[:4] == ["7", "COMPLETED", "0", "8/8"] and len(drawn) == 2
    assert screen.lines() == drawn


def test_elsewhere_there_is_a_line_for_what_has_changed() -> None:
    stream = io.StringIO()
    with watching.display(Console(file=stream, width=40)) as show:
        last = watching.watch(looks(status("PENDING", 0, "Resources"), *2 * [status("RUNNING", 2)]), 0.001, show)
    assert last == [status("RUNNING", 2)]  # and Ctrl-C is no error
    assert stream.getvalue().splitlines() == [
        "job 7 PENDING: step 0 of 8, 0 saved, /runs/[tide]  Resources",
        "job 7 RUNNING: step 2 of 8, 0 saved, /runs/[tide]",
    ]


@pytest.mark.parametrize("state", ["COMPLETED", "CANCELLED", "NODE_FAIL"])
def test_it_ends_when_nothing_more_will_happen(state: str) -> None:
    seen: list[str] = []
    ended = status(state, 3, code=0)
    look = looks(status("UNKNOWN", 0, "Unable to contact slurm controller"), status("RUNNING", 1), ended)
    assert watching.watch(look, 0.001, lambda found: seen.append(found[0].state)) == [ended]
    assert seen == ["UNKNOWN", "RUNNING", state]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "runs/tide"])
def test_what_is_no_number_of_seconds_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(("status", "all", f"--watch={seconds}")) == 64
    said = capsys.readouterr().err
    assert f"{seconds!r} is no number of seconds" in said and "hint: isotrain status all --watch" in said
