"""Curves over steps, thinned so that no peak is lost; and how far the step times of ranks lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from orchestrator.pace import RankPace
from orchestrator.pages.drawing import COLOURS, Scale, across, boxes, drawing, figure, legend, seconds, text, upward
from orchestrator.pages.markup import Markup, joined, tag

WIDTH, HEIGHT, LEFT, RIGHT = 560, 210, 58, 548
WIDE, WIDE_RIGHT = 1160, 1140
BUCKETS = 500
TIPS = 100
MOST_RANKS = 160

Point = tuple[int, float | None]
"""A step and its value; None where it is no number."""


def thinned(points: Sequence[Point], buckets: int = BUCKETS) -> list[Point]:
    """At most three points for each of ``buckets`` equal parts: its least, its most, and one that is no number.

    Example:
        >>> thinned([(1, 5.0), (2, 9.0), (3, 1.0), (4, 3.0), (5, 2.0), (6, None)], buckets=2)
        [(2, 9.0), (3, 1.0), (4, 3.0), (5, 2.0), (6, None)]
    """
    if len(points) <= 2 * buckets:
        return list(points)
    kept: list[Point] = []
    for bucket in range(buckets):
        part = points[len(points) * bucket // buckets : len(points) * (bucket + 1) // buckets]
        values = [(value, step) for step, value in part if value is not None]
        ends = {(step, value) for value, step in (min(values), max(values))} if values else set()
        nothing = [one for one in part if one[1] is None][:1]
        kept += sorted([*ends, *nothing], key=lambda one: one[0])
    return kept


def means(points: Sequence[Point], buckets: int = BUCKETS) -> list[Point]:
    """The mean of each of ``buckets`` equal parts, at its middle step.

    Example:
        >>> means([(1, 5.0), (2, 9.0), (3, 1.0), (4, 3.0), (5, None), (6, None)], buckets=3)
        [(2, 7.0), (4, 2.0), (6, None)]
    """
    found: list[Point] = []
    for bucket in range(buckets):
        part = points[len(points) * bucket // buckets : len(points) * (bucket + 1) // buckets]
        values = [value for _, value in part if value is not None]
        found.append((part[len(part) // 2][0], statistics.fmean(values) if values else None))
    return found


def curve_chart(points: Sequence[Point], label: str, words: Callable[[float], str] = figure) -> Markup:
    """One value over steps; of many steps their range, and their mean as a line. What is no number is marked below."""
    values = [value for _, value in points if value is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
    floor = 0.0 if 0 <= low < 0.35 * high else low - room
    x = Scale(points[0][0], max(points[-1][0], points[0][0] + 1), LEFT, RIGHT)
    y = Scale(floor, high + room, HEIGHT - 30, 10)
    shown, many = thinned(points), len(points) > 2 * BUCKETS
    lost = [step for step, value in shown if value is None]
    parts = [
        across(x, 10, HEIGHT - 30, figure, 6),
        upward(y, LEFT, RIGHT, words, 4),
        tag("path", d=_path(shown, x, y), class_="line", stroke=COLOURS[0], opacity=0.35 if many else None),
        tag("path", d=_path(means(points), x, y), class_="line", stroke=COLOURS[0]) if many else "",
        tag("path", d=boxes((x.at(step) - 1, HEIGHT - 36, 3, 6) for step in lost), fill=COLOURS[3]) if lost else "",
        *_tips(points, x, label, words),
    ]
    return drawing(WIDTH, HEIGHT, f"{label} over steps", *parts)


def _path(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """The line, broken where a value is no number; a single point is a dash."""
    words, pen = [], "M"
    for step, value in points:
        if value is None:
            pen = "M"
            continue
        words.append(f"{pen}{x.at(step):.1f} {y.at(value):.1f}")
        pen = "L"
    return "".join(words) + ("h2" if len(words) == 1 else "")


def _tips(points: Sequence[Point], x: Scale, label: str, words: Callable[[float], str]) -> list[Markup]:
    parts = min(TIPS, len(points))
    found = []
    for part in range(parts):
        here = points[len(points) * part // parts : len(points) * (part + 1) // parts]
        values = [value for _, value in here if value is not None]
        span = f"step {here[0][0]:,}" if len(here) == 1 else f"steps {here[0][0]:,} to {here[-1][0]:,}"
        least, most = (words(min(values)), words(max(values))) if values else ("no number", "no number")
        tip = f"{span}\n{label} {least}" + (f" to {most}" if least != most else "")
        edges = LEFT + (RIGHT - LEFT) * part / parts, (RIGHT - LEFT) / parts
        found.append(tag("rect", x=edges[0], y=0, width=edges[1], height=HEIGHT - 30, class_="hit", data_tip=tip))
    return found


def spread_chart(paces: Sequence[RankPace]) -> Markup:
    """Least, median and most of every rank's step time; of many ranks those of neighbours together."""
    size = -(-len(paces) // MOST_RANKS)
    groups = [paces[first : first + size] for first in range(0, len(paces), size)]
    high = max(pace.most_s for pace in paces)
    y = Scale(0, high * 1.05 or 1.0, 200, 12)
    width = (WIDE_RIGHT - LEFT) / len(groups)
    bar = max(1.5, min(16.0, 0.6 * width))
    ranges, medians, waits, tips = [], [], [], []
    for place, group in enumerate(groups):
        middle = LEFT + (place + 0.5) * width
        least, most = min(pace.least_s for pace in group), max(pace.most_s for pace in group)
        median = statistics.median(pace.median_s for pace in group)
        wait = statistics.fmean(pace.wait_s for pace in group)
        ranges.append((middle - bar / 2, y.at(most), bar, max(1.0, y.at(least) - y.at(most))))
        medians.append((middle - bar / 2, y.at(median) - 1, bar, 2.5))
        waits.append((middle - bar / 2, y.at(wait), bar, y.at(0) - y.at(wait)))
        words = f"step {seconds(least)} to {seconds(most)}, median {seconds(median)}\nwaits {seconds(wait)} for others"
        tip = f"{_names(group)}\n{words}"
        tips.append(tag("rect", x=middle - width / 2, y=12, width=width, height=188, class_="hit", data_tip=tip))
    every = -(-len(groups) // 20)
    labels = [
        text(LEFT + (place + 0.5) * width, 216, str(groups[place][0].rank), "soft", "middle")
        for place in range(0, len(groups), every)
    ]
    parts = [
        upward(y, LEFT, WIDE_RIGHT, seconds, 4),
        tag("path", d=boxes(ranges), fill=COLOURS[0], opacity=0.35),
        tag("path", d=boxes(waits), fill=COLOURS[1], opacity=0.7),
        tag("path", d=boxes(medians), fill=COLOURS[0]),
        *labels,
        *tips,
    ]
    keys = [
        (COLOURS[0], "step: least to most, and the median"),
        (COLOURS[1], "waiting for others at its end, on average"),
    ]
    chart = drawing(WIDE, 224, "step time of every rank", *parts)
    return joined([tag("div", chart, class_="wide"), legend(keys)])


def _names(group: Sequence[RankPace]) -> str:
    if len(group) == 1:
        return f"rank {group[0].rank} on {group[0].host}"
    return f"ranks {group[0].rank} to {group[-1].rank}"
