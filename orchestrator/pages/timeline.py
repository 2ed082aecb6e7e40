"""The pipeline of one step: a row per stage, a box per pass, and between them the bubble."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from orchestrator.pages.drawing import (
    COLOURS,
    Scale,
    across,
    boxes,
    drawing,
    legend,
    line,
    seconds,
    shown_rows,
    text,
)
from orchestrator.pages.markup import Markup, joined, tag
from orchestrator.planning.pipeline import Pass, Timeline

WIDTH, LEFT, RIGHT = 1160, 74, 1070
MOST_ROWS = 32
SLOTS = 240
"""Boxes side by side that can still be told apart; of a longer step the middle is left out."""
NUMBERED = 14
"""Pixels that a micro-batch's number needs."""
FORWARD, BACKWARD = COLOURS[0], COLOURS[1]


@dataclass(frozen=True)
class _Window:
    """Which part of a step is drawn where: all of it, or its beginning and its end with a gap between them."""

    scales: tuple[Scale, ...]

    def at(self, one: Pass) -> tuple[float, float] | None:
        """The left edge and the width of a pass; None where it is left out."""
        for scale in self.scales:
            start, end = max(one.start_s, scale.low), min(one.end_s, scale.high)
            if start < end:
                return scale.at(start), scale.at(end) - scale.at(start)
        return None


def timeline_chart(timeline: Timeline, vpp: int) -> Markup:
    """The chart with its legend."""
    rows = shown_rows(len(timeline.stages), MOST_ROWS, 0)
    height = 22.0 if len(rows) <= 12 else 14.0
    window = _window(timeline)
    bottom = 8 + height * len(rows)
    paths: defaultdict[tuple[bool, int], list[tuple[float, float, float, float]]] = defaultdict(list)
    parts: list[str] = [across(scale, 8, bottom, seconds, 8 // len(window.scales)) for scale in window.scales]
    labels: list[str] = []
    for row, stage in enumerate(rows):
        y = 8 + row * height
        idle_s = timeline.idle_s(stage)
        parts += [_idle(window, y, height), text(LEFT - 8, y + height / 2 + 4, f"stage {stage}", "end")]
        parts.append(text(RIGHT + 8, y + height / 2 + 4, f"{idle_s / timeline.end_s:.0%} idle", "soft"))
        for one in timeline.stages[stage]:
            place = window.at(one)
            if place is None:
                continue
            x, width = place
            gap = 0.6 if width > 3 else 0.0
            paths[one.forward, one.chunk].append((x, y + 1.5, width - gap, height - 3))
            if width >= NUMBERED and height > 14:
                labels.append(text(x + width / 2, y + height / 2 + 3.5, str(one.micro_batch), "inside"))
    for (forward, chunk), places in sorted(paths.items()):
        fill = FORWARD if forward else BACKWARD
        parts.append(tag("path", d=boxes(places), fill=fill, opacity=_shade(chunk, vpp)))
    tips = [_tip(timeline, stage, 8 + row * height, height) for row, stage in enumerate(rows)]
    chart = drawing(WIDTH, bottom + 26, "pipeline timeline of one step", *parts, *labels, *_gap(window, bottom), *tips)
    return joined([tag("div", chart, class_="wide"), legend(_keys(vpp, window))])


def _window(timeline: Timeline) -> _Window:
    longest = max(one.end_s - one.start_s for passes in timeline.stages for one in passes)
    shown_s = SLOTS / 2 * longest
    end = timeline.end_s
    if end <= 2 * shown_s:
        return _Window((Scale(0, end, LEFT, RIGHT),))
    middle = (LEFT + RIGHT) / 2
    return _Window((Scale(0, shown_s, LEFT, middle - 14), Scale(end - shown_s, end, middle + 14, RIGHT)))


def _idle(window: _Window, y: float, height: float) -> Markup:
    places = [(scale.start, y + 1.5, scale.stop - scale.start, height - 3) for scale in window.scales]
    return tag("path", d=boxes(places), class_="idle")


def _gap(window: _Window, bottom: float) -> list[Markup]:
    if len(window.scales) == 1:
        return []
    first, second = window.scales
    middle = (first.stop + second.start) / 2
    return [line(middle, 4, middle, bottom + 4, "limit")]


def _tip(timeline: Timeline, stage: int, y: float, height: float) -> Markup:
    passes = timeline.stages[stage]

    def mean(forward: bool) -> float:
        times = [one.end_s - one.start_s for one in passes if one.forward == forward]
        return sum(times) / len(times)

    idle_s = timeline.idle_s(stage)
    words = (
        f"stage {stage}: {len(passes) // 2} passes forward of {seconds(mean(True))} on average, as many backward of "
        f"{seconds(mean(False))}\nidle {seconds(idle_s)} of {seconds(timeline.end_s)} ({idle_s / timeline.end_s:.1%})"
    )
    return tag("rect", x=0, y=y, width=WIDTH, height=height, class_="hit", data_tip=words)


def _shade(chunk: int, vpp: int) -> float:
    return 1 - 0.6 * chunk / vpp


def _keys(vpp: int, window: _Window) -> list[tuple[str, str]]:
    chunks = f" (paler: a later one of {vpp} virtual chunks)" if vpp > 1 else ""
    keys = [(FORWARD, f"forward{chunks}"), (BACKWARD, "backward"), ("var(--rule)", "bubble")]
    if len(window.scales) > 1:
        left_out_s = window.scales[1].low - window.scales[0].high
        keys.append(("var(--limit)", f"here {seconds(left_out_s)} of the same are left out"))
    return keys
