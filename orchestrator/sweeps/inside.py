"""``isotrain together``: what a sweep runs for points on one base. Not for people."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from orchestrator.command import Command
from orchestrator.errors import ExitCode


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of the launch, in that of the sweep")


def _run(arguments: argparse.Namespace) -> int:
    from orchestrator.sweeps.together import train_together

    ends = train_together(arguments.folder, lambda text: print(text, file=sys.stderr, flush=True))
    codes = {end.code for end in ends.values()}
    stopped = codes & {int(ExitCode.INTERRUPTED), int(ExitCode.ABORTED)}
    code = max(stopped) if stopped else int(ExitCode.RED if any(codes) else ExitCode.DONE)
    if arguments.json:
        points = {name: {"code": end.code, "error": end.error} for name, end in ends.items()}
        print(json.dumps({"code": code, "points": points}))
    return code


TOGETHER = Command("Train points of a sweep in one launch.", "isotrain sweep sweep.share_base=true ...", _add, _run)
