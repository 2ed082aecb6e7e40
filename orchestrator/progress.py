"""What the user sees while a run trains: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from launch.output import Tee

RECENT_WEIGHT = 0.1  # of the newest step in the running mean that the time left is told from


def make_progress(stream: TextIO | Tee, total_steps: int, first_step: int) -> Bar | Lines:
    """A bar if the stream is a terminal, with plain lines into the log behind it; else plain lines."""
    if not stream.isatty():
        return Lines(stream, total_steps)
    if isinstance(stream, Tee):
        return Bar(stream.terminal, total_steps, first_step, Lines(stream.log, total_steps))
    return Bar(stream, total_steps, first_step, None)


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


class Bar:
    """A bar of one line, drawn when a step ends; it has no thread of its own."""

    def __init__(self, terminal: TextIO, total_steps: int, first_step: int, lines: Lines | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._lines = lines
        self._total_steps = total_steps
        self._remaining = Remaining(total_steps)
        self._progress = Progress(
            BarColumn(bar_width=24),
            TextColumn("{task.description}", markup=False),
            console=Console(file=terminal, force_terminal=True),
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=first_step - 1)
        self._progress.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Draw the bar."""
        text = words(step, self._total_steps, values, self._remaining.after(step))
        self._progress.update(self._task, completed=step, description=text, refresh=True)
        if self._lines is not None:
            self._lines.log(step, values)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._progress.stop()
