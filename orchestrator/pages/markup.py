"""Markup: elements of HTML and SVG made of values; whatever is not markup already is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

VOID = frozenset({"meta", "link", "br", "path", "rect", "line", "circle", "polyline"})
"""Elements without an end tag: HTML's own, and SVG's that hold nothing."""


NUMBER = re.compile(r"-|[\d.,]+( (s|ms|µs|min|h))?")
"""Cells that stand below each other by their last digit."""


class Markup(str):
    """Text that is markup already, and goes into a page as it is."""

    __slots__ = ()


def tag(element: str, *inside: str, **attributes: str | float | None) -> Markup:
    """One element. An attribute's ``_`` stands for ``-``, but at its end (``class_``) for nothing; None leaves it out.

    Numbers are cut to two decimals: they are pixels.

    Example:
        >>> tag("p", "a < b", tag("br"), class_="note")
        '<p class="note">a &lt; b<br></p>'
        >>> tag("rect", x=1.0, y=2 / 3, data_tip='"')
        '<rect x="1" y="0.67" data-tip="&quot;"/>'
    """
    words = [element]
    for name, value in attributes.items():
        if value is not None:
            words.append(f'{name.rstrip("_").replace("_", "-")}="{html.escape(_text(value))}"')
    start = " ".join(words)
    if element in VOID:
        return Markup(f"<{start}>" if element in ("meta", "link", "br") else f"<{start}/>")
    return Markup(f"<{start}>{joined(inside)}</{element}>")


def joined(parts: Iterable[str]) -> Markup:
    """Parts one after the other; what is no markup is escaped.

    Example:
        >>> joined([tag("b", "1"), " < ", "2"])
        '<b>1</b> &lt; 2'
    """
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A table whose cells stand right where all of a column are numbers.

    Example:
        >>> table(["stage"], [["1"]])
        '<div class="scroll"><table><thead><tr><th class="number">stage</th></tr></thead><tbody><tr><td \
class="number">1</td></tr></tbody></table></div>'
    """
    rows = list(rows)
    kinds = [_kind([row[column] for row in rows]) for column in range(len(header))]
    head = [tag("th", name, class_=kind) for name, kind in zip(header, kinds, strict=True)]
    body = [tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows]
    return tag("div", tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body)), class_="scroll")


def _kind(cells: Sequence[str]) -> str | None:
    return "number" if cells and all(NUMBER.fullmatch(cell) for cell in cells) else None


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
