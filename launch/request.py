"""What is to be started, and the commands that would start it: plain values, printable before anything is done."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LaunchRequest:
    """``program``: the argv of one rank. ``device``: ``cpu`` or ``cuda``. ``environment``: names and values to add."""

    run_dir: Path
    program: tuple[str, ...]
    world_size: int
    nodes: int = 1
    ranks_per_node: int = 1
    device: str = "cpu"
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Rendered:
    """A command that can be printed, typed, or started. ``warning``: what speaks against it; empty when nothing does.

    Example:
        >>> Rendered(("python", "my script.py"), (("OMP_NUM_THREADS", "1"),)).text
        "OMP_NUM_THREADS=1 python 'my script.py'"
    """

    argv: tuple[str, ...]
    environment: tuple[tuple[str, str], ...]
    warning: str = ""

    @property
    def text(self) -> str:
        """One line for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment]
        return " ".join([*variables, shlex.join(self.argv)])
