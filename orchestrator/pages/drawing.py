"""Drawing: scales, ticks and frames that all charts share; pixels are those of an SVG's view box."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from orchestrator.pages.markup import Markup, joined, tag

COLOURS = tuple(f"var(--c{number})" for number in range(9))


@dataclass(frozen=True)
class Scale:
    """Values to pixels, evenly or by their logarithm.

    Example:
        >>> Scale(0, 10, 100, 200).at(5), Scale(1, 100, 0, 200, log=True).at(10)
        (150.0, 100.0)
    """

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        place = math.log(value) if self.log else value
        return self.start + (place - low) / ((high - low) or 1.0) * (self.stop - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside of the scale, at most about ``most``.

        Example:
            >>> Scale(0, 10, 0, 1).ticks(5), Scale(0.5, 60, 0, 1, log=True).ticks()
            ([0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0])
        """
        if self.log and self.high > 5 * self.low:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps: tuple[int, ...] = (1, 2, 5) if self.high < 1000 * self.low else (1,)
            found = [step * 10.0**decade for decade in decades for step in steps]
            return [value for value in found if self.low <= value <= self.high]
        raw = (self.high - self.low) / most
        if raw <= 0:
            return [self.low]
        base = 10.0 ** math.floor(math.log10(raw))
        step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= raw * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def figure(value: float) -> str:
    """A number in as few characters as it needs.

    Example:
        >>> [figure(value) for value in (0, 0.25, 12345.0, 1234567, 3.14159, 2e-7)]
        ['0', '0.25', '12.3k', '1.23M', '3.14', '2e-07']
    """
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def seconds(value: float) -> str:
    """A span of time for people who read short ones.

    Example:
        >>> [seconds(value) for value in (0, 0.00042, 0.25, 12.3456, 5400)]
        ['0 s', '420 µs', '250 ms', '12.3 s', '1.5 h']
    """
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (600.0, 1.0, "s"), (5400.0, 1 / 60, "min")):
        if abs(value) < limit:
            return f"{value * factor:.3g} {unit}" if value else "0 s"
    return f"{value / 3600:.3g} h"


def drawing(width: float, height: float, label: str, *inside: str) -> Markup:
    """An SVG as wide as there is room; ``label`` is what it shows, for those who cannot see it."""
    return tag("svg", *inside, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)


def text(x: float, y: float, words: str, *kinds: str) -> Markup:
    """Words at a place; ``kinds``: soft, end, middle, bold, small, inside."""
    return tag("text", words, x=x, y=y, class_=" ".join(kinds) or None)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """A straight line: grid, axis or limit."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=kind)


def boxes(places: Iterable[tuple[float, float, float, float]]) -> str:
    """Many rectangles (x, y, width, height) as the outline of one path.

    Example:
        >>> boxes([(1, 2, 3.25, 4)])
        'M1.0 2.0h3.2v4.0h-3.2z'
    """
    return "".join(f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h-{width:.1f}z" for x, y, width, height in places)


def legend(keys: Sequence[tuple[str, str]]) -> Markup:
    """What colours mean: pairs of a colour and its name."""
    return tag("div", *(tag("span", name, style=f"--key:{colour}") for colour, name in keys), class_="legend")


def across(scale: Scale, top: float, bottom: float, words: Callable[[float], str] = figure, most: int = 6) -> Markup:
    """A horizontal axis below a chart, with lines up through it."""
    parts: list[str] = []
    for value in scale.ticks(most):
        x = scale.at(value)
        parts += [line(x, top, x, bottom, "grid"), text(x, bottom + 16, words(value), "soft", "middle")]
    return joined(parts)


def upward(scale: Scale, left: float, right: float, words: Callable[[float], str] = figure, most: int = 5) -> Markup:
    """A vertical axis left of a chart, with lines through it."""
    parts: list[str] = []
    for value in scale.ticks(most):
        y = scale.at(value)
        parts += [line(left, y, right, y, "grid"), text(left - 8, y + 4, words(value), "soft", "end")]
    return joined(parts)


def shown_rows(count: int, most: int, always: int) -> list[int]:
    """Which of many rows are drawn: all, or every so many with the last one and ``always``.

    Example:
        >>> shown_rows(3, 8, 1), shown_rows(10, 5, 3)
        ([0, 1, 2], [0, 2, 3, 4, 6, 8, 9])
    """
    every = math.ceil(count / most)
    return sorted({*range(0, count, every), count - 1, always})
