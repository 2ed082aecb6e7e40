"""Pages whose tables are made by commands: what stands between two equal marks is replaced."""

from __future__ import annotations


def between_marks(page: str, mark: str, text: str) -> str:
    """The page with ``text`` between its two ``mark``.

    Example:
        >>> between_marks("a [m] old [m] b", "[m]", "new")
        'a [m]\\nnew\\n[m] b'
    """
    before, _, after = page.split(mark)
    return f"{before}{mark}\n{text}\n{mark}{after}"
