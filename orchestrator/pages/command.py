"""The command around a run's page: report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_report(parser: argparse.ArgumentParser) -> None:
    """Which run, and where its page goes."""
    parser.add_argument("run_dir", type=Path, metavar="DIR", help="the run folder, of a run that is over or not")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write it there instead of DIR/report.html")


def run_report(arguments: argparse.Namespace) -> int:
    """Write a run's page, and say where it is and what of the run could not be read."""
    from orchestrator.pages.attempts import attempts_of
    from orchestrator.pages.document import write_page
    from orchestrator.pages.run_folder import read_run
    from orchestrator.pages.run_page import REPORT, run_page, state

    run = read_run(arguments.run_dir.expanduser().absolute())
    file = arguments.html or run.path / REPORT
    write_page(file, run_page(run))
    step = run.steps[-1]["step"] if run.steps else 0
    words = state(run, attempts_of(run))
    if arguments.json:
        print(json.dumps({"page": str(file), "state": words, "step": step, "problems": run.problems}))
        return 0
    print("\n".join([f"step {step}, {words}", *(f"not read: {problem}" for problem in run.problems), f"page: {file}"]))
    return 0
