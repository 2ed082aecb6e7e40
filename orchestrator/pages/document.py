"""Document: one page in one file, that opens without a network, in light and dark."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from orchestrator.errors import ConfigError
from orchestrator.pages.markup import Markup, joined, tag
from orchestrator.runs import write_whole

HERE = Path(__file__).resolve().parent


@cache
def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def page(title: str, under: str, *sections: str) -> str:
    """A whole page.

    Its policy lets the browser load nothing, and run no script but the page's own, whatever a job's words hold.

    Args:
        under: a line below the title.
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(_asset("page.css"))),
    )
    top = tag("header", tag("h1", title), tag("p", under))
    body = tag("body", top, tag("main", *sections), tag("div", id="tip", hidden=""), tag("script", Markup(script)))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def section(title: str, note: str, *inside: str, half: bool = False) -> Markup:
    """A part of a page with what it shows in a line; ``half``: it may stand beside another one."""
    about = [tag("p", note, class_="note")] if note else []
    return tag("section", tag("h2", title), *about, *inside, class_="half" if half else None)


def tiles(values: Sequence[tuple[str, str, str]]) -> Markup:
    """Large figures: each a name, a value and what is to be said of it."""
    return tag(
        "div",
        *(
            tag("div", tag("span", name), tag("strong", value), tag("small", note), class_="tile")
            for name, value, note in values
        ),
        class_="tiles",
    )


def facts(values: Sequence[tuple[str, str]]) -> Markup:
    """Names with their values, a line each."""
    return tag("dl", *(joined([tag("dt", name), tag("dd", value)]) for name, value in values))


def words(lines: Sequence[str]) -> Markup:
    """A list of sentences."""
    return tag("ul", *(tag("li", line) for line in lines))


def folded(summary: str, *inside: str) -> Markup:
    """What is shown when it is asked for."""
    return tag("details", tag("summary", summary), *inside)


def write_page(file: Path, text: str) -> None:
    """Write a page in one move.

    Raises:
        ConfigError: it cannot be written there.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}", "--html ANOTHER.html") from error
