"""A page as another parser sees it: whether it is well-formed, what it says, and what it would load."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br"}
LOADS = {"src", "href", "xlink:href", "srcset", "action", "poster", "data"}


@dataclass
class Parsed:
    """``wrong``: end tags without a start, and starts without an end. ``attributes``: of every element, by its name."""

    text: str = ""
    styles: str = ""
    loads: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    attributes: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def of(self, element: str) -> list[dict[str, str]]:
        """The attributes of all elements of a kind."""
        return [values for name, values in self.attributes if name == element]


def parsed(page: str) -> Parsed:
    """Read a whole page."""
    found = Parsed()
    _Reader(found).read(page)
    found.loads += re.findall(r"url\([^)]*\)|@import[^;]*", found.styles)
    return found


class _Reader(HTMLParser):
    def __init__(self, found: Parsed) -> None:
        super().__init__(convert_charrefs=True)
        self._found = found
        self._open: list[str] = []

    def read(self, page: str) -> None:
        self.feed(page)
        self.close()
        self._found.wrong += [f"<{element}> is not closed" for element in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open[-1] != tag:
            self._found.wrong.append(f"</{tag}> in {self._open[-3:]} at {self.getpos()}")
        else:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["style"]:
            self._found.styles += data
        elif self._open[-1:] != ["script"]:
            self._found.text += data

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self._found.attributes.append((tag, values))
        self._found.styles += values.get("style", "")
        self._found.loads += [value for name, value in values.items() if name in LOADS and value != "data:,"]
        self._found.wrong += [f"{tag} has {name}" for name in values if name.startswith("on")]
