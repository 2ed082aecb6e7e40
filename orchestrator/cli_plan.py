"""The commands around plans: plan, and bench planner."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.command import WIDTH_ELSEWHERE, add_overrides
from orchestrator.errors import ConfigError

if TYPE_CHECKING:
    from orchestrator.commands import Planned
    from orchestrator.planning.advice import Advice


def add_plan(parser: argparse.ArgumentParser) -> None:
    """Overrides, and what is asked about a plan."""
    add_overrides(parser)
    parser.add_argument("--why", action="append", default=[], metavar="KEY=VALUE", help="explain this choice instead")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="PLAN", help="two plan.json files, side by side")
    parser.add_argument("--html", type=Path, metavar="OUT", help="write the plan as a page, with its charts")


def run_plan(arguments: argparse.Namespace) -> int:
    """Show a plan, explain a choice, or compare two plans."""
    from orchestrator.commands import explain_choice, plan_advice, plan_job
    from orchestrator.config.loading import compose_job

    if arguments.html and (arguments.compare or arguments.why):
        other = "--compare" if arguments.compare else "--why"
        raise ConfigError(f"--html writes a plan, and {other} makes none", f"isotrain plan ... --html {arguments.html}")
    if arguments.compare:
        from orchestrator.planning.compare import compared, comparison, read_plan

        plans = [read_plan(path) for path in arguments.compare]
        print(json.dumps(comparison(*plans)) if arguments.json else "\n".join(compared(*plans)))
        return 0
    if arguments.why:
        lines = explain_choice(arguments.overrides, arguments.why)
        print(json.dumps({"asked": arguments.why, "why": lines}) if arguments.json else "\n".join(lines))
        return 0
    planned = plan_job(compose_job(arguments.overrides))
    advice, more = plan_advice(planned), {"warning": planned.warning} if planned.warning else {}
    if arguments.html:
        from orchestrator.pages.document import write_page
        from orchestrator.pages.plan_page import plan_page

        write_page(arguments.html, plan_page(planned.plan, planned.job, planned.model, advice, planned.warning))
        more["page"] = str(arguments.html)
    show_plan(planned, advice, arguments.json, more)
    return 0


def show_plan(planned: Planned, advice: Advice, as_json: bool, more: Mapping[str, str]) -> None:
    """Print a plan with its advice, and what else there is to say of it by name."""
    from orchestrator.planning.show import plan_summary, render

    if as_json:
        print(json.dumps(plan_summary(planned.plan, planned.job, planned.model, advice) | dict(more)))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else WIDTH_ELSEWHERE)
    console.print(render(planned.plan, planned.job, planned.model, advice))
    for name, text in more.items():
        console.print(f"\n{name}: {text}", markup=False)


def add_bench(parser: argparse.ArgumentParser) -> None:
    """What to measure, on which rows, and where to write it."""
    parser.add_argument("what", choices=("planner",), help="planner: estimates against published, measured runs")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines (.jsonl, .gz, .xz); the repository's own")
    parser.add_argument("--fit", action="store_true", help="find the constants anew and write them into constants.py")
    parser.add_argument("--leave-out", action="store_true", help="and fit again without each group (a minute)")
    parser.add_argument("--here", action="store_true", help="instead: runs on this machine, measured now (5 minutes)")
    parser.add_argument(
        "--single", action="store_true", help="instead: runs on one device of this machine, its memory too"
    )
    parser.add_argument("--choice", action="store_true", help="and search the best layout of each row (a minute)")
    parser.add_argument("--write", type=Path, action="append", default=[], metavar="PAGE", help="fill its marks there")


def run_bench(arguments: argparse.Namespace) -> int:
    """Score the planner."""
    if arguments.here:
        from orchestrator.bench.planner_here import bench_here

        return bench_here(arguments.json, arguments.write)
    if arguments.single:
        from orchestrator.bench.planner_single import bench_single

        return bench_single(arguments.json, arguments.write)
    from orchestrator.bench.planner import bench

    return bench(arguments.rows, arguments.json, arguments.fit, arguments.write, arguments.leave_out, arguments.choice)
