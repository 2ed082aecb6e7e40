"""How jobs are, as a table; and again and again, until all are over (``isotrain status --watch``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from orchestrator.jobs.follow import Status

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Look = Callable[[], list[Status]]
Show = Callable[[Sequence[Status]], None]


def status_table(found: Sequence[Status]) -> Table:
    """A row a job."""
    from rich.table import Table
    from rich.text import Text

    table = Table("job", "state", "code", "step", "saved", "nodes", "run", "why", box=None, pad_edge=False)
    for one in found:
        cells = (one.job_id, one.state, "" if one.code is None else str(one.code), f"{one.step}/{one.steps}")
        table.add_row(*map(Text, (*cells, str(one.saved), one.nodes, str(one.run_dir), one.reason)))
    return table


def status_line(one: Status) -> str:
    """A job in one line, for where no table can be drawn anew."""
    words = f"job {one.job_id} {one.state}: step {one.step} of {one.steps}, {one.saved} saved, {one.run_dir}"
    return f"{words}  {one.reason}".rstrip()


def watch(look: Look, every_s: float, show: Show) -> list[Status]:
    """Look every ``every_s`` seconds and show what was found, until every job is over or the user has seen enough.

    Returns:
        What was found last.
    """
    found: list[Status] = []
    with suppress(KeyboardInterrupt):
        while True:
            found = look()
            show(found)
            if all(status.is_over for status in found):
                break
            time.sleep(every_s)
    return found


@contextmanager
def display(console: Console) -> Iterator[Show]:
    """On a terminal one table, drawn anew in its place; elsewhere a line for each job that has changed."""
    from rich.live import Live

    if not console.is_terminal:
        yield _Lines(console)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield lambda found: live.update(status_table(found), refresh=True)


class _Lines:
    """Remembers what was printed last of each job."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: dict[str, str] = {}

    def __call__(self, found: Sequence[Status]) -> None:
        for one in found:
            line, key = status_line(one), f"{one.job_id} {one.run_dir}"
            if self._last.get(key) != line:
                self._last[key] = line
                self._console.out(line, highlight=False)
                self._console.file.flush()
