"""Attempts: when a run's ranks were there, how each time ended, and what was saved meanwhile, on one line of time."""

from __future__ import annotations

import calendar
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from orchestrator.errors import ExitCode
from orchestrator.history import Launch
from orchestrator.pages.drawing import COLOURS, Scale, drawing, legend, line, seconds, text
from orchestrator.pages.markup import Markup, joined, tag
from orchestrator.pages.run_folder import Line, RunFolder, Saved, number

WIDTH, LEFT, RIGHT = 1160, 10, 1150
ENDS = {
    ExitCode.DONE: (COLOURS[2], "done"),
    ExitCode.INTERRUPTED: (COLOURS[0], "interrupted and saved"),
}
UNITS = (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
FAILED = (COLOURS[3], "failed")
NO_WORD = (COLOURS[7], "running, or ended without a word")


@dataclass(frozen=True)
class Attempt:
    """One time that ranks were there, in unix seconds. ``code``: None where nobody wrote down how it ended."""

    started: float
    ended: float
    code: int | None
    words: str
    ranks: str = ""

    @property
    def look(self) -> tuple[str, str]:
        """Its colour, and what that means."""
        if self.code is None:
            return NO_WORD
        return ENDS.get(ExitCode(self.code), FAILED) if self.code in list(ExitCode) else FAILED


def attempts_of(run: RunFolder) -> list[Attempt]:
    """All that is known: launches that somebody waited for, and starts whose end nobody wrote down."""
    found = [
        Attempt(one.started, one.ended, one.code, _words(one), f"{one.ranks} ranks, {one.topology}")
        for one in run.launches
    ]
    starts = sorted(filter(None, map(_started, run.starts)))
    logged = [at for one in run.steps if (at := number(one, "time"))]
    for start, following in pairwise([*starts, float("inf")]):
        if any(start - 1 <= one.started < following for one in found):
            continue
        seen = [at for at in logged if start <= at < following]
        words = f"{run.alive} ranks are there" if run.alive and following == float("inf") else "left no word"
        found.append(Attempt(start, max(seen, default=start), None, words))
    return sorted(found, key=lambda one: one.started)


def _words(launch: Launch) -> str:
    return f"{launch.cause}: {launch.message}" if launch.code else f"{launch.step:,} steps are saved"


def _started(line: Line) -> float | None:
    try:
        return float(calendar.timegm(time.strptime(str(line.get("time")), "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return None


def attempts_chart(attempts: Sequence[Attempt], saved: Sequence[Saved]) -> Markup:
    """A band of time: coloured while ranks were there, with a tick for each checkpoint."""
    first, last = attempts[0].started, max(one.ended for one in attempts)
    span_s = max(last - first, 1.0)
    x = Scale(0, span_s, LEFT, RIGHT)
    parts: list[str] = [tag("rect", x=LEFT, y=8, width=RIGHT - LEFT, height=30, class_="idle")]
    for order, one in enumerate(attempts, 1):
        colour, meaning = one.look
        start = x.at(one.started - first)
        width = max(2.0, x.at(one.ended - first) - start - 1)
        tip = f"{order}: {clock(one.started)}, {seconds(one.ended - one.started)}, {meaning}\n{one.words}\n{one.ranks}"
        parts.append(tag("rect", x=start, y=8, width=width, height=30, fill=colour, data_tip=tip.rstrip()))
        if width > 24:
            parts.append(text(start + width / 2, 27, str(order), "inside"))
    for checkpoint in saved:
        if first <= checkpoint.time <= last + 60:
            at = x.at(min(checkpoint.time, last) - first)
            tip = f"checkpoint of step {checkpoint.step:,}\n{clock(checkpoint.time)}"
            parts += [
                line(at, 40, at, 50, "axis"),
                tag("rect", x=at - 3, y=38, width=6, height=14, class_="hit", data_tip=tip),
            ]
    name, unit_s = next((name, unit_s) for name, unit_s in UNITS if span_s > 3 * unit_s or unit_s == 1)
    for value in Scale(0, span_s / unit_s, LEFT, RIGHT).ticks(8):
        parts.append(text(x.at(value * unit_s), 66, f"{value:g} {name}", "soft", "middle" if value else "start"))
    looks = dict.fromkeys(one.look for one in attempts)
    keys = [*looks, ("var(--rule)", "no ranks"), ("var(--soft)", "ticks: checkpoints")]
    return joined([tag("div", drawing(WIDTH, 70, "launches over time", *parts), class_="wide"), legend(keys)])


def clock(at: float) -> str:
    """A moment, in UTC.

    Example:
        >>> clock(0)
        '1970-01-01 00:00:00 UTC'
    """
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))
