"""What the user sees while a run trains: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, TextIO

from launch.output import CLEAR_LINE, Tee

RECENT_WEIGHT = 0.1  # of the newest step in the running mean that the time left is told from
BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
SPARKS, BAR, COLUMNS = 40, 30, 80  # columns: of the curve, of the bar, of a terminal that does not say
GIB = 2**30


def make_progress(stream: TextIO | Tee, total_steps: int, first_step: int) -> Panel | Lines:
    """A panel if the stream is a terminal, with plain lines into the log behind it; else plain lines."""
    return Panel(stream, total_steps, first_step) if stream.isatty() else Lines(stream, total_steps)


class Named(io.TextIOBase):
    """A stream on which every line begins with a name: several runs in one process write to it. It is no terminal.

    Example:
        >>> said = io.StringIO()
        >>> print("step 3", file=Named(said, "002-seed=4"))
        >>> said.getvalue()
        '002-seed=4: step 3\\n'
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        super().__init__()
        self._stream = stream
        self._name = name
        self._at_line_start = True

    def write(self, text: str) -> int:
        """Write, with the name where a line begins."""
        for line in text.splitlines(keepends=True):
            self._stream.write(f"{self._name}: {line}" if self._at_line_start else line)
            self._at_line_start = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._stream.flush()


class Remaining:
    """Tells the time left from a running mean of the time between steps; the first step warms up and does not count."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._last: float | None = None
        self._mean_s: float | None = None

    def after(self, step: int) -> float | None:
        """Seconds left after ``step``; None until two steps were seen."""
        now = self._clock()
        if self._last is not None:
            took = now - self._last
            self._mean_s = took if self._mean_s is None else self._mean_s + RECENT_WEIGHT * (took - self._mean_s)
        self._last = now
        return None if self._mean_s is None else self._mean_s * max(0, self._total_steps - step)


def duration(seconds: float | None) -> str:
    """Seconds for people.

    Example:
        >>> duration(3725), duration(65), duration(4.2), duration(None)
        ('1h02m', '1m05s', '4s', '?')
    """
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def words(step: int, total_steps: int, values: Mapping[str, Any], left_s: float | None) -> str:
    """One step in a line.

    Example:
        >>> words(3, 40, {"loss": 2.5, "tokens_per_s": 512.3, "learning_rate": 0.001}, 65)
        'step 3/40  loss 2.5000  lr 1.00e-03  512 tokens/s  ETA 1m05s'
    """
    parts = [f"step {step}/{total_steps}"]
    shown = {"loss": "loss {:.4f}", "grad_norm": "grad norm {:.3f}", "learning_rate": "lr {:.2e}"}
    parts += [text.format(values[name]) for name, text in shown.items() if isinstance(values.get(name), (int, float))]
    if "tokens_per_s" in values:
        parts.append(f"{values['tokens_per_s']:.0f} tokens/s")
    return "  ".join([*parts, f"ETA {duration(left_s)}"])


class Lines:
    """A plain line per step."""

    def __init__(self, stream: TextIO | Tee, total_steps: int) -> None:
        self._stream = stream
        self._total_steps = total_steps
        self._remaining = Remaining(total_steps)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the step's line."""
        line = words(step, self._total_steps, values, self._remaining.after(step))
        self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing is left to write."""


def sparkline(values: Sequence[float], width: int = SPARKS, blocks: str = BLOCKS) -> str:
    """A curve in characters, the oldest value first; of many values the means of neighbours.

    Example:
        >>> sparkline([4, 3, 2, 1]), sparkline([1, 1, 5, 5], width=2), sparkline([2, 2])
        ('█▅▃▁', '▁█', '▁▁')
    """
    parts = min(width, len(values))
    edges = [len(values) * part // parts for part in range(parts + 1)] if parts else [0]
    means = [sum(values[first:last]) / (last - first) for first, last in pairwise(edges)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    steps = (len(blocks) - 1) / ((high - low) or 1.0)
    return "".join(blocks[int((mean - low) * steps)] for mean in means)


def panel_lines(
    step: int, total_steps: int, values: Mapping[str, Any], losses: Sequence[float], left_s: float | None, plain: bool
) -> list[str]:
    """The panel's lines: how far, the loss, speed, memory. ``plain``: in ASCII.

    Example:
        >>> said = {"loss": 1.5, "tokens_per_s": 512.3, "step_s": 0.25, "mfu": 0.4, "peak_memory_bytes": 3 * 2**29}
        >>> for line in panel_lines(3, 12, said, [2.0, 1.75, 1.5], 65, plain=True):
        ...     print(line)
        step 3/12  #######-----------------------  ETA 1m05s
        loss 1.5000  #~_  lowest 1.5000
        512 tokens/s  0.25 s per step  MFU 40%  memory 1.5 GiB
    """
    done = BAR * step // max(1, total_steps)
    full, empty = ("#", "-") if plain else ("━", "─")
    lines = [f"step {step}/{total_steps}  {full * done}{empty * (BAR - done)}  ETA {duration(left_s)}"]
    if losses:
        curve = sparkline(losses, blocks=PLAIN_BLOCKS if plain else BLOCKS)
        lines.append(f"loss {losses[-1]:.4f}  {curve}  lowest {min(losses):.4f}")
    shown = {
        "tokens_per_s": "{:.0f} tokens/s",
        "step_s": "{:.3g} s per step",
        "mfu": "MFU {:.0%}",
        "learning_rate": "lr {:.2e}",
        "grad_norm": "grad norm {:.3f}",
    }
    parts = [text.format(values[name]) for name, text in shown.items() if isinstance(values.get(name), int | float)]
    if "peak_memory_bytes" in values:
        parts.append(f"memory {values['peak_memory_bytes'] / GIB:.3g} GiB")
    return [*lines, "  ".join(parts)]


class Above(io.TextIOBase):
    """A terminal's stand-in while something is drawn live: whole lines go where ``show`` puts them."""

    def __init__(self, show: Callable[[str], None]) -> None:
        super().__init__()
        self._show = show
        self._rest = ""

    def write(self, text: str) -> int:
        """Show the lines that are whole; the beginning of one waits for its end."""
        *lines, self._rest = (self._rest + text.replace(CLEAR_LINE, "")).split("\n")
        for line in lines:
            self._show(line)
        return len(text)

    def isatty(self) -> bool:
        """It stands for one."""
        return True


class Panel:
    """A few lines that are drawn anew when a step ends; it has no thread of its own.

    What this process says meanwhile (through a :class:`Tee`) goes above the panel. A terminal that goes away ends
    neither.
    """

    def __init__(self, stream: TextIO | Tee, total_steps: int, first_step: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self._tee = stream if isinstance(stream, Tee) else None
        self._terminal = stream.terminal if isinstance(stream, Tee) else stream
        self._lines = Lines(stream.log, total_steps) if isinstance(stream, Tee) else None
        self._total_steps = total_steps
        self._remaining = Remaining(total_steps)
        self._losses: list[float] = []
        self._console = Console(file=self._terminal, force_terminal=True, highlight=False, width=self._columns())
        self._live = Live(
            self._drawn(panel_lines(first_step - 1, total_steps, {}, [], None, self._is_plain)),
            console=self._console,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        with suppress(OSError):
            self._live.start(refresh=True)
        if self._tee is not None:
            self._tee.terminal = Above(self._print)  # type: ignore[assignment]

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Draw the panel."""
        left_s, loss = self._remaining.after(step), values.get("loss")
        if isinstance(loss, float) and math.isfinite(loss):
            self._losses.append(loss)
        lines = panel_lines(step, self._total_steps, values, self._losses, left_s, self._is_plain)
        with suppress(OSError):
            self._console.width = self._columns()
            self._live.update(self._drawn(lines), refresh=True)
        if self._lines is not None:
            self._lines.log(step, values)

    def close(self) -> None:
        """Leave the panel as it is."""
        if self._tee is not None:
            self._tee.terminal = self._terminal
        with suppress(OSError):
            self._live.stop()

    def _print(self, line: str) -> None:
        from rich.text import Text

        self._console.print(Text(line))

    def _columns(self) -> int:
        """The terminal's width at this moment: it is none of this process's own streams, where rich would look."""
        try:
            return os.get_terminal_size(self._terminal.fileno()).columns
        except (OSError, ValueError):
            return COLUMNS

    @property
    def _is_plain(self) -> bool:
        return self._console.options.ascii_only

    @staticmethod
    def _drawn(lines: Sequence[str]) -> Any:
        """Lines that are cut where the terminal ends: a wrapped one would be left behind when they are drawn anew."""
        from rich.text import Text

        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")
