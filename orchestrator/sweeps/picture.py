"""A sweep as one picture, plain SVG: a curve for each point, and below them how the finished ones compare."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from orchestrator.sweeps.book import Book
from orchestrator.sweeps.measuring import curve, read_metrics

WIDTH, CURVES_HEIGHT, BAR_HEIGHT, MARGIN = 900, 360, 18, 60
MOST_DOTS = 300  # of a curve; more cannot be seen
MOST_BARS = 40
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e", "#9498a0")
STYLE = (
    "text{font:12px sans-serif;fill:#333}.axis{stroke:#999}.grid{stroke:#e5e5e5}.curve{fill:none;stroke-width:1.5}"
    "@media(prefers-color-scheme:dark){svg{background:#111}text{fill:#ddd}.grid{stroke:#333}}"
)


@dataclass(frozen=True)
class Scale:
    """A line from values to pixels: ``low`` lies at ``start``, ``high`` at ``end``."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / ((self.high - self.low) or 1.0) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values, about five of them.

        Example:
            >>> Scale(0.0, 9.0, 0.0, 100.0).ticks()
            [0.0, 2.0, 4.0, 6.0, 8.0]
        """
        rough = (self.high - self.low) / 5 or 1.0
        size: float = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [round(number * step, 12) for number in range(first, last + 1)]


def write_picture(folder: Path, book: Book) -> Path | None:
    """Write ``sweep.svg``; None where no point has logged the metric."""
    curves = {row.point.number: _thinned(folder / row.point.folder, book.metric.name) for row in book.rows}
    curves = {number: dots for number, dots in curves.items() if dots}
    if not curves:
        return None
    ranked = [row for row in book.ranked() if row.state == "done" and row.value is not None][:MOST_BARS]
    height = CURVES_HEIGHT + 2 * MARGIN + BAR_HEIGHT * (len(ranked) + 2)
    title = escape(f"{folder.name}: {book.metric.name} of {len(curves)} points")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f"<title>{title}</title><style>{STYLE}</style>",
        f'<text x="{MARGIN}" y="24" style="font-weight:bold">{title}</text>',
        *_curves(book, curves),
        *_bars(book, [(row.point.number, row.point.words, row.value or 0.0) for row in ranked]),
        "</svg>",
    ]
    file = folder / "sweep.svg"
    file.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return file


def _thinned(run_dir: Path, name: str) -> list[tuple[int, float]]:
    dots = curve(read_metrics(run_dir), name)
    every = -(-len(dots) // MOST_DOTS) or 1
    return dots[::every] + (dots[-1:] if dots[::every][-1:] != dots[-1:] else [])


def colour(number: int) -> str:
    """The colour of a point, the same in curves and bars."""
    return COLOURS[number % len(COLOURS)]


def _curves(book: Book, curves: dict[int, list[tuple[int, float]]]) -> list[str]:
    dots = [dot for line in curves.values() for dot in line]
    across = Scale(min(step for step, _ in dots), max(step for step, _ in dots), MARGIN, WIDTH - MARGIN / 2)
    values = [value for _, value in dots]
    up = Scale(min(values), max(values), CURVES_HEIGHT + MARGIN / 2, MARGIN)
    parts = []
    for value in up.ticks():
        y = f"{up(value):.1f}"
        parts.append(f'<line class="grid" x1="{MARGIN}" x2="{WIDTH - MARGIN / 2:.0f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{MARGIN - 6}" y="{y}" text-anchor="end" dominant-baseline="middle">{value:g}</text>')
    for value in across.ticks():
        parts.append(
            f'<text x="{across(value):.1f}" y="{CURVES_HEIGHT + MARGIN:.0f}" text-anchor="middle">{value:g}</text>'
        )
    words = {row.point.number: row.point.words for row in book.rows}
    for number, line in curves.items():
        places = " ".join(f"{across(step):.1f},{up(value):.1f}" for step, value in line)
        name = escape(f"{number}: {words[number]}")
        parts.append(
            f'<polyline class="curve" stroke="{colour(number)}" points="{places}"><title>{name}</title></polyline>'
        )
    return parts


def _bars(book: Book, ranked: Sequence[tuple[int, str, float]]) -> list[str]:
    """A bar for each finished point, best first; they start at 0 so that lengths compare."""
    if not ranked:
        return []
    top = CURVES_HEIGHT + 2 * MARGIN
    values = [value for _, _, value in ranked]
    along = Scale(min(0.0, *values), max(0.0, *values), WIDTH * 0.5, WIDTH - MARGIN * 1.5)
    which = "largest" if book.metric.largest else "smallest"
    parts = [f'<text x="{MARGIN}" y="{top - 12}">{escape(book.metric.name)} at the end, {which} first</text>']
    for place, (number, words, value) in enumerate(ranked):
        y = top + place * BAR_HEIGHT
        left, right = sorted((along(0.0), along(value)))
        weight = ' style="font-weight:bold"' if place == 0 else ""
        shown = words if len(words) <= 62 else f"{words[:60]}..."
        parts.append(f'<text x="{MARGIN}" y="{y + 12}"{weight}>{number}: {escape(shown)}</text>')
        parts.append(
            f'<rect x="{left:.1f}" y="{y + 2}" width="{max(1.0, right - left):.1f}" height="{BAR_HEIGHT - 4}" '
            f'fill="{colour(number)}"/><text x="{right + 6:.1f}" y="{y + 12}"{weight}>{value:.4g}</text>'
        )
    return parts
