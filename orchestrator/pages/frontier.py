"""The frontier: every layout that was weighed by its time and its memory, and those that nothing beats in both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from orchestrator.pages.drawing import COLOURS, Scale, across, drawing, figure, legend, line, seconds, text, upward
from orchestrator.pages.markup import Markup, joined, tag

WIDTH, HEIGHT, LEFT, RIGHT = 1160, 400, 58, 990
PIXELS = 5.0
"""Points nearer than this are drawn as one."""


@dataclass(frozen=True)
class Layout:
    """A layout on the chart. ``step_s``: 0 where it does not fit, and its time was not estimated.

    ``bound``: both figures are what it has at least.
    """

    name: str
    step_s: float
    gib: float
    bound: bool = False

    @property
    def words(self) -> str:
        """What its point says."""
        least = "at least " if self.bound else ""
        time = f"{least}{seconds(self.step_s)} per step, " if self.step_s else "too large: "
        return f"{self.name}\n{time}{least}{self.gib:.1f} GiB on the fullest rank"


def frontier_of(layouts: Iterable[Layout]) -> list[Layout]:
    """Those that no other is as fast and as small as, the fastest first.

    Example:
        >>> [one.name for one in frontier_of([Layout("a", 1, 9), Layout("b", 2, 9), Layout("c", 3, 4)])]
        ['a', 'c']
    """
    best: list[Layout] = []
    for one in sorted(layouts, key=lambda one: (one.step_s, one.gib)):
        if not best or one.gib < best[-1].gib:
            best.append(one)
    return best


def frontier_chart(chosen: Layout, others: Sequence[Layout], limit_gib: float) -> Markup:
    """Time across, memory upwards, both by their logarithms; what is too large stands at the right, above the limit."""
    runs = [one for one in others if one.step_s]
    large = [one for one in others if not one.step_s]
    sizes = [one.gib for one in (chosen, *others)]
    times = [one.step_s for one in (chosen, *runs)]
    x = Scale(min(times) / 1.08, max(times) * 1.08, LEFT, RIGHT, log=True)
    y = Scale(min(*sizes, limit_gib) / 1.2, max(*sizes, limit_gib) * 1.2, HEIGHT - 40, 26, log=True)
    frontier = frontier_of([chosen, *(one for one in runs if not one.bound)])
    path = "M" + "L".join(f"{x.at(one.step_s):.1f} {y.at(one.gib):.1f}" for one in frontier)
    at = y.at(limit_gib)
    parts = [
        across(x, 22, HEIGHT - 40, seconds, 8),
        upward(y, LEFT, WIDTH - 10, figure),
        text(RIGHT, HEIGHT - 8, "estimated time of a step", "soft", "end"),
        text(LEFT - 8, 14, "GiB", "soft", "end"),
        line(LEFT, at, WIDTH - 10, at, "limit"),
        text(RIGHT - 4, at - 6, f"limit {limit_gib:g} GiB", "limit-text", "end"),
        *_points([one for one in runs if one.bound], x, y, COLOURS[7]),
        tag("path", d=path, class_="line", stroke=COLOURS[2]),
        *_points([one for one in runs if not one.bound], x, y, COLOURS[0]),
        *_beside(large, y),
        *_chosen(chosen, x, y),
    ]
    keys = [(COLOURS[2], "chosen, and the frontier"), (COLOURS[0], "slower"), (COLOURS[7], "at least so slow")]
    keys += [(COLOURS[3], "too large at its thriftiest; its time is not estimated")] if large else []
    chart = drawing(WIDTH, HEIGHT, "layouts by time and memory", *parts)
    return joined([tag("div", chart, class_="wide"), legend(keys)])


def _points(layouts: Iterable[Layout], x: Scale, y: Scale, colour: str) -> list[Markup]:
    """One circle for all layouts of a cell of a few pixels: what the first says, and how many more there are."""
    cells: dict[tuple[int, int], list[Layout]] = {}
    for one in layouts:
        cell = (round(x.at(one.step_s) / PIXELS), round(y.at(one.gib) / PIXELS))
        cells.setdefault(cell, []).append(one)
    circles = []
    for here in cells.values():
        at = {"cx": x.at(here[0].step_s), "cy": y.at(here[0].gib), "r": min(6.0, 3.0 + 0.5 * len(here))}
        circles.append(tag("circle", **at, fill=colour, opacity=0.75, data_tip=_tip(here)))
    return circles


def _beside(large: Sequence[Layout], y: Scale) -> list[Markup]:
    """Layouts without a time: ticks in a strip of their own."""
    if not large:
        return []
    rows: dict[int, list[Layout]] = {}
    for one in large:
        rows.setdefault(round(y.at(one.gib) / PIXELS), []).append(one)
    middle = (RIGHT + WIDTH) / 2
    ticks = []
    for here in rows.values():
        wide = min(110.0, 14.0 + 6 * len(here))
        box = {"x": middle - wide / 2, "y": y.at(here[0].gib) - 1.5, "width": wide, "height": 3.0}
        ticks.append(tag("rect", **box, fill=COLOURS[3], data_tip=_tip(here)))
    return [text(middle, HEIGHT - 24, f"{len(large):,} too large", "soft", "middle"), *ticks]


def _chosen(chosen: Layout, x: Scale, y: Scale) -> list[Markup]:
    at_x, at_y, tip = x.at(chosen.step_s), y.at(chosen.gib), f"chosen: {chosen.words}"
    return [
        tag("circle", cx=at_x, cy=at_y, r=7, fill=COLOURS[2], stroke="var(--ink)", data_tip=tip),
        text(at_x + 8, at_y - 12, chosen.name, "bold"),
    ]


def _tip(here: Sequence[Layout]) -> str:
    more = f"\nand {len(here) - 1:,} more here" if len(here) > 1 else ""
    return here[0].words + more
