"""A terminal: a pseudo-terminal whose screen is what the few control sequences of rich's live display make of it."""

from __future__ import annotations

import codecs
import fcntl
import os
import re
import struct
import termios
from typing import TextIO

SEQUENCE = re.compile(r"\x1b\[(\?)?(\d*)(?:;\d+)*([A-Za-z])|(\r)|(\n)|([^\x1b\r\n]+)")


class Screen:
    """``stream``: what a program writes on; ``columns`` wide."""

    def __init__(self, columns: int = 100) -> None:
        self._master, slave = os.openpty()
        self.stream: TextIO = os.fdopen(slave, "w", buffering=1, encoding="utf-8")
        self._columns = columns
        self._lines = [""]
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # what is read may end in the middle of a character
        self._rest = ""  # as may a control sequence
        self._row = self._column = 0
        os.set_blocking(self._master, False)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def lines(self) -> list[str]:
        """What is on the screen now, without trailing blanks."""
        self.stream.flush()
        written = b""
        while True:
            try:
                piece = os.read(self._master, 1 << 16)
            except BlockingIOError:
                break
            written += piece
        seen = self._rest + self._decoder.decode(written)
        last = seen.rfind("\x1b")
        whole = len(seen) if last < 0 or SEQUENCE.match(seen, last) else last
        self._rest = seen[whole:]
        for found in SEQUENCE.finditer(seen[:whole]):
            private, number, kind, back, down, text = found.groups()
            if back:
                self._column = 0
            elif down:
                self._row += 1
                self._lines += [""] * (self._row + 1 - len(self._lines))
            elif kind == "A":
                self._row = max(0, self._row - int(number or 1))
            elif kind == "K":
                self._lines[self._row] = ""
            elif kind in ("m", "h", "l") or private:
                continue
            elif text:
                self._put(text)
            else:
                raise AssertionError(f"the screen does not know {found.group()!r}")
        return [line.rstrip() for line in self._lines if line.strip()]

    def _put(self, text: str) -> None:
        for character in text:
            if self._column == self._columns:
                self._row, self._column = self._row + 1, 0
                self._lines += [""] * (self._row + 1 - len(self._lines))
            line = self._lines[self._row].ljust(self._column)
            self._lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
            self._column += 1
