"""What a command of the command line is, and what it says of itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from orchestrator.errors import ConfigError

CODES = """exit codes: 0 done, 1 a check came out red, 64 your configuration, 65 corrupt data or checkpoint,
70 our fault, 71 out of memory or disk, 85 interrupted and saved: run it again, 86 lost a peer: run it again,
93 gave up: do not run it again, 130 second Ctrl-C"""

WIDTH_ELSEWHERE = 120  # columns of tables that go into a file or a pipe


class _Parser(argparse.ArgumentParser):
    """Usage errors are configuration errors: 64, with an example as the hint."""

    example = ""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: -"):
            message += " (a job's values are KEY=VALUE, without dashes)"
        message = message.removesuffix(", KEY=VALUE")  # optional, but argparse names it beside a missing argument
        raise ConfigError(f"{self.prog}: {message}", self.example)


@dataclass(frozen=True)
class Command:
    """One command: ``add`` adds its arguments, ``run`` does it, prints, and returns the exit code."""

    summary: str
    example: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]

    def parser(self, name: str) -> argparse.ArgumentParser:
        """The parser of this command."""
        parser = _Parser(
            prog=f"isotrain {name}",
            description=self.summary,
            epilog=f"example:\n  {self.example}\n\n{CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.example = self.example
        self.add(parser)
        parser.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        return parser


def add_overrides(parser: argparse.ArgumentParser, more: str = "") -> None:
    """The words of a job; ``more``: what else may be among them."""
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="in Hydra's grammar; GROUP=CHOICE for groups; or a job file, FILE.yaml (docs: configuration.md)" + more,
    )
