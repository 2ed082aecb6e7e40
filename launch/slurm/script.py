"""The batch script: ``slurm/train.sbatch`` as it stands, with other ``#SBATCH`` lines and a run folder."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.environment import LaunchError

# What may stand in an #SBATCH line: nothing that sbatch's own reader of these lines or a shell could take otherwise.
PLAIN = re.compile(r"[A-Za-z0-9_.,:;=/@%+\-\[\]()&|*?!^~]+")
EXTRA = re.compile(r"--[a-z][a-z-]*(=[A-Za-z0-9_.,:;=/@%+\-\[\]()&|*?!^~]+)?")
# Options that the script depends on, or that would carry values of the environment into it.
OWN_OPTIONS = frozenset(
    {"chdir", "export", "export-file", "get-user-env", "output", "error", "signal", "wrap", "comment"}
)
RUN_DIR_LINE = "run_dir="


@dataclass(frozen=True)
class Header:
    """``#SBATCH`` options by name, in order; an empty value stands for an option without one. ``extra``: whole options.

    Example:
        >>> Header((("nodes", "4"), ("exclusive", ""))).lines()
        ['#SBATCH --nodes=4', '#SBATCH --exclusive']
    """

    options: tuple[tuple[str, str], ...]
    extra: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The lines, each literal.

        Raises:
            LaunchError: a value has a character that a line cannot hold, or an extra option is no option or is ours.
        """
        for name, value in self.options:
            if value and not PLAIN.fullmatch(value):
                raise LaunchError(
                    f"cluster.slurm: --{name}={value!r} cannot stand in an #SBATCH line",
                    "letters, digits and . , : ; = / @ % + - [ ] ( ) & | * ? ! ^ ~ can",
                )
        for option in self.extra:
            if not EXTRA.fullmatch(option):
                raise LaunchError(
                    f"cluster.slurm.extra: {option!r} is no option of sbatch", "cluster.slurm.extra=[--nice=100]"
                )
            if option[2:].partition("=")[0] in OWN_OPTIONS:
                raise LaunchError(f"cluster.slurm.extra: {option} is set by isotrain", "leave it out")
        own = [f"#SBATCH --{name}={value}" if value else f"#SBATCH --{name}" for name, value in self.options]
        return own + [f"#SBATCH {option}" for option in self.extra]


def render_script(static: str, header: Header, run_dir: Path) -> str:
    """The script for one run: the static one with these ``#SBATCH`` lines, and the run folder in its place.

    Example:
        >>> static = "#!/bin/bash\\n#SBATCH --mem=0\\nset -u\\nrun_dir=\\n"
        >>> render_script(static, Header((("nodes", "2"),)), Path("/r 1")).splitlines()
        ['#!/bin/bash', '#SBATCH --nodes=2', 'set -u', "run_dir='/r 1'"]
    """
    lines = static.splitlines()
    first = next(place for place, line in enumerate(lines) if line.startswith("#SBATCH "))
    body = [line for line in lines[first:] if not line.startswith("#SBATCH ")]
    place = body.index(RUN_DIR_LINE)
    body[place] = RUN_DIR_LINE + shlex.quote(str(run_dir))
    return "\n".join([*lines[:first], *header.lines(), *body]) + "\n"


def words_file(words: Sequence[str]) -> bytes:
    """Words as a shell reads them whole (``mapfile -d ''``), whatever is in them.

    Example:
        >>> words_file(["module", "cuda/12.4"])
        b'module\\x00cuda/12.4\\x00'
    """
    return b"".join(word.encode() + b"\0" for word in words)
