"""The commands for Slurm, and the one that the batch script runs."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.command import WIDTH_ELSEWHERE, Command, add_overrides
from orchestrator.errors import ConfigError, IsotrainError
from orchestrator.probing.command import add_probe_options, probe_options, probed_nodes

if TYPE_CHECKING:
    from rich.console import Console

    from orchestrator.jobs.submit import Prepared
    from orchestrator.probing.submitting import Options


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _add_submit(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser)
    parser.add_argument("--dry-run", action="store_true", help="print the batch script, and do nothing")
    add_probe_options(parser)


def _submit(arguments: argparse.Namespace) -> int:
    from orchestrator.jobs.submit import prepare, submit
    from orchestrator.probing.submitting import TooFewNodes

    options = probe_options(arguments)
    if arguments.dry_run:
        return _dry_run(prepare(arguments.overrides), options, arguments.json)
    probed: dict[str, object] = {}

    def find_bad(prepared: Prepared) -> Sequence[str]:
        assert options is not None
        judgement = probed_nodes(prepared, options, arguments.json)
        probed["probe"] = judgement.to_json()
        return judgement.bad

    try:
        done = submit(arguments.overrides, _say, find_bad if options else None)
    except TooFewNodes as error:
        _say(error.render())
        if arguments.json:
            words = {"code": int(error.code), "error": str(error), "hint": error.hint}
            print(json.dumps(words | {"probe": error.judgement.to_json()}))
        return int(error.code)
    _say(done.message)
    if arguments.json:
        print(json.dumps(done.summary() | probed))
    elif done.job_id:
        print(f"job      {done.job_id}\nrun      {done.run_dir}\nscript   {done.summary()['script']}")
        print(f"log      {done.run_dir}/slurm/   (isotrain logs -f {done.run_dir})")
        print(f"next     isotrain status {done.run_dir}")
    return 0


def _dry_run(prepared: Prepared, options: Options | None, as_json: bool) -> int:
    """Print what would be handed to sbatch: with a probe both scripts, each under its name."""
    from orchestrator.probing.submitting import probe_script

    _say(prepared.decision.message)
    _say(prepared.planned.words)
    first = {"probe_script": probe_script(prepared, options)} if options else {}
    if as_json:
        print(json.dumps({"code": 0, "run_dir": str(prepared.run_dir), "script": prepared.script, **first}))
    elif options:
        print(f"# slurm/probe.sbatch\n{first['probe_script']}\n# slurm/train.sbatch\n{prepared.script}", end="")
    else:
        print(prepared.script, end="")
    return 0


def _add_runs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR|all", help="run folders; all: every one you submitted")


def _add_status(parser: argparse.ArgumentParser) -> None:
    _add_runs(parser)
    words = "look again every so many seconds (5), until every job is over or Ctrl-C"
    parser.add_argument("--watch", nargs="?", type=_seconds, const=5.0, metavar="SECONDS", help=words)


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < (seconds := float(text)) < math.inf:
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")


def _status(arguments: argparse.Namespace) -> int:
    from orchestrator.jobs.follow import Status, chosen_runs, statuses
    from orchestrator.jobs.watching import display, watch

    runs = chosen_runs(arguments.runs)

    def look() -> list[Status]:
        return [status for run in runs for status in statuses(run)]

    if arguments.watch is None:
        _show(look(), arguments.json)
    elif arguments.json:
        _show(watch(look, arguments.watch, lambda found: None), as_json=True)
    else:
        with display(_console()) as show:
            watch(look, arguments.watch, show)
    return 0


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH_ELSEWHERE)


def _show(found: Sequence[Any], as_json: bool, code: int = 0) -> None:
    if as_json:
        jobs = [asdict(status) | {"run_dir": str(status.run_dir)} for status in found]
        print(json.dumps({"code": code, "jobs": jobs}))
        return
    from orchestrator.jobs.watching import status_table

    _console().print(status_table(found))


def _wait(arguments: argparse.Namespace) -> int:
    from orchestrator.jobs.follow import chosen_runs, wait_for

    found = wait_for(chosen_runs(arguments.runs), _say)
    code = next((status.exit_code for status in found if status.exit_code), 0)
    _show(found, arguments.json, code)
    return code


def _add_cancel(parser: argparse.ArgumentParser) -> None:
    _add_runs(parser)
    parser.add_argument("--now", action="store_true", help="at once, without saving")


def _cancel(arguments: argparse.Namespace) -> int:
    from orchestrator.jobs.follow import cancel_run, chosen_runs

    done, failed = {}, {}
    for run in chosen_runs(arguments.runs):
        try:
            done[str(run)] = cancel_run(run, arguments.now)
            _say(done[str(run)])
        except IsotrainError as error:  # one odd run must not keep the others alive
            failed[str(run)] = error
            _say(f"{error}\nhint: {error.hint}")
    code = max((int(error.code) for error in failed.values()), default=0)
    if arguments.json:
        print(json.dumps({"code": code, "cancelled": done, "failed": {run: str(why) for run, why in failed.items()}}))
    return code


def _add_logs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="a run folder")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the job is over")
    parser.add_argument("--rank", metavar="N|all", help="what one rank wrote, or all (as where no Slurm is)")


def _logs(arguments: argparse.Namespace) -> int:
    from orchestrator.jobs.follow import log_lines, statuses
    from orchestrator.jobs.record import read_tasks, slurm_folder

    run: Path = arguments.run.expanduser().absolute()
    if not (run / "job.yaml").is_file() and not read_tasks(run):
        raise ConfigError(f"{run} is no run folder: it has no job.yaml", "isotrain status all")

    def is_over() -> bool:
        return all(status.is_over for status in statuses(run))

    rank = arguments.rank or (None if slurm_folder(run).is_dir() else "all")
    lines = log_lines(run, rank, is_over if arguments.follow else None)
    if arguments.json:
        print(json.dumps({"code": 0, "lines": list(lines)}))
        return 0
    for line in lines:
        print(line, flush=True)
    return 0


def _add_allocation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", default="")
    add_overrides(parser)


def _allocation(arguments: argparse.Namespace) -> int:
    from orchestrator.jobs.allocation import run_allocation

    return run_allocation(Path(arguments.run_dir) if arguments.run_dir else None, arguments.overrides, _say)


# Not for people: what slurm/train.sbatch runs.
ALLOCATION = Command(
    "Train in this allocation.", "sbatch slurm/train.sbatch KEY=VALUE ...", _add_allocation, _allocation
)
COMMANDS = {
    "submit": Command(
        "Plan a run and hand it to Slurm; a run that has a checkpoint goes on.",
        "isotrain submit model=llama3_8b cluster=slurm_4x8 data.path=chat.jsonl run_dir=runs/first",
        _add_submit,
        _submit,
    ),
    "status": Command("Say how runs on Slurm are.", "isotrain status all --watch", _add_status, _status),
    "logs": Command("Show what a run has written.", "isotrain logs -f runs/first", _add_logs, _logs),
    "wait": Command("Wait until runs on Slurm are over.", "isotrain wait runs/first", _add_runs, _wait),
    "cancel": Command(
        "End runs on Slurm after their step and a save.", "isotrain cancel runs/first", _add_cancel, _cancel
    ),
}
