"""The words of ``isotrain submit --probe``, its table, and the commands that ``slurm/probe.sbatch`` runs."""

from __future__ import annotations

import argparse
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.command import WIDTH_ELSEWHERE, Command, add_overrides
from orchestrator.errors import ExitCode

if TYPE_CHECKING:
    from orchestrator.jobs.submit import Prepared
    from orchestrator.probing.judging import Judgement, Verdict
    from orchestrator.probing.submitting import Options


def add_probe_options(parser: argparse.ArgumentParser) -> None:
    """What ``isotrain submit`` takes of a probe."""
    parser.add_argument("--probe", action="store_true", help="try nodes first, and leave bad ones out")
    parser.add_argument(
        "--probe-nodes", type=_at_least_one, metavar="N", help="try N nodes, which may be more than the job needs"
    )
    parser.add_argument(
        "--probe-patience", type=_seconds, metavar="S", help="seconds that a node may take to answer (120)"
    )


def probe_options(arguments: argparse.Namespace) -> Options | None:
    """The options that were typed; None: no probe."""
    from orchestrator.probing.submitting import PATIENCE_S, Options

    if not (arguments.probe or arguments.probe_nodes or arguments.probe_patience):
        return None
    return Options(arguments.probe_nodes, arguments.probe_patience or PATIENCE_S)


def probed_nodes(prepared: Prepared, options: Options, as_json: bool) -> Judgement:
    """Probe, and show what was found; on standard output, unless that is for JSON.

    Raises:
        as :func:`orchestrator.probing.submitting.probe`; TooFewNodes: not enough are good.
    """
    from orchestrator.probing.submitting import probe, refuse_too_few

    judgement = probe(prepared, options, _say)
    show(judgement, sys.stderr if as_json else sys.stdout)
    refuse_too_few(prepared, judgement)
    return judgement


def show(judgement: Judgement, stream: object) -> None:
    """The table of nodes, and remarks."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("node", "GPUs", "errors", "disk", "clock", "all-reduce", "verdict", box=None, pad_edge=False)
    for one in judgement.verdicts:
        style = "green" if one.is_good else "red"
        table.add_row(*map(Text, (one.node, *_cells(one))), Text("good" if one.is_good else "bad", style=style))
    is_terminal = bool(getattr(stream, "isatty", lambda: False)())
    console = Console(file=stream, highlight=False, width=None if is_terminal else WIDTH_ELSEWHERE)  # type: ignore[arg-type]
    console.print(table)
    for one in judgement.verdicts:
        if not one.is_good:
            console.print(Text(f"{one.node} is bad: {'; '.join(one.why)}"))
    for remark in judgement.remarks:
        console.print(Text(remark))


def _cells(one: Verdict) -> Sequence[str]:
    from orchestrator.probing.judging import rate_words
    from orchestrator.probing.looking import ERRORS

    report = one.report
    if report is None:
        return ("?",) * 5
    unread = [kind for kind in report.unread if kind.startswith(ERRORS)]
    errors = str(len(report.faults)) if report.faults else "not readable" if len(unread) == len(ERRORS) else "0"
    return (
        f"{len(report.gpus)}" if report.gpus or report.gpu_error else "-",
        errors if report.gpus or report.faults or unread else "-",
        "refused" if report.folder_error else f"{report.write_mb_s:.0f} MB/s, {report.free_gib:.0f} GiB",
        f"{report.clock_s:+.2f} s",
        rate_words(report.rate) if report.rate else "failed" if report.links else "-",
    )


def _add_allocation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run-dir", default="")
    add_overrides(parser)


def _allocation(arguments: argparse.Namespace) -> int:
    from orchestrator.probing.allocation import run_probe
    from orchestrator.probing.node import leave

    if arguments.run_dir:
        run_probe(Path(arguments.run_dir), _say)
        sys.stderr.flush()
        leave(int(ExitCode.DONE))
    return _by_hand(arguments.overrides)


def _by_hand(overrides: Sequence[str]) -> int:
    """``sbatch -N 4 slurm/probe.sbatch KEY=VALUE ...``: the table is in the job's log; 1 where a node is bad."""
    from launch.environment import slurm_variables
    from launch.slurm.allocation import read_allocation
    from orchestrator.commands import make_folder
    from orchestrator.detection.cluster import found_cluster, on_cluster
    from orchestrator.jobs.by_hand import by_hand
    from orchestrator.jobs.record import slurm_folder
    from orchestrator.probing.allocation import run_probe
    from orchestrator.probing.judging import judge
    from orchestrator.probing.report import reports_folder, write_asked
    from orchestrator.probing.submitting import PATIENCE_S, asked_of

    job = by_hand(overrides, read_allocation(slurm_variables()))
    job = on_cluster(job, found_cluster(job.cluster))
    run_dir = Path(job.run_dir or "").absolute()
    for folder in (run_dir, slurm_folder(run_dir), reports_folder(run_dir)):
        make_folder(folder)
    asked = asked_of(job, secrets.token_hex(8), PATIENCE_S)
    write_asked(run_dir, asked)
    judgement = judge(run_probe(run_dir, _say), asked)
    show(judgement, sys.stdout)
    return int(ExitCode.RED if judgement.bad else ExitCode.DONE)


def _add_node(parser: argparse.ArgumentParser) -> None:
    for name in ("run_dir", "node", "host"):
        parser.add_argument(name)
    for name in ("port", "clock_port"):
        parser.add_argument(name, type=int)


def _node(arguments: argparse.Namespace) -> int:
    from orchestrator.probing.linking import Meeting
    from orchestrator.probing.node import answer, leave

    meeting = Meeting(arguments.host, arguments.port)
    code = answer(Path(arguments.run_dir), arguments.node, meeting, arguments.clock_port)
    sys.stderr.flush()
    leave(code)
    return code


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} should be at least 1")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 1 <= seconds < 86_400:
        raise argparse.ArgumentTypeError(f"{text} should be at least 1, and less than a day")
    return seconds


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# Not for people: what slurm/probe.sbatch runs, and what that runs on every node.
EXAMPLE = "sbatch slurm/probe.sbatch KEY=VALUE ..."
INSIDE = {
    "probe": Command("Probe the nodes of this allocation.", EXAMPLE, _add_allocation, _allocation),
    "probe-node": Command("Answer a probe as one node.", EXAMPLE, _add_node, _node),
}
