"""Commands that look at checkpoints: verify, checkpoints, and what a resume would do."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from orchestrator.errors import ExitCode

SHOWN = 10  # differences on a screen; --json has all


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``isotrain verify``."""
    parser.add_argument("path", type=Path, metavar="A", help="a checkpoint, or a run folder: its newest one")
    parser.add_argument("other", type=Path, nargs="?", metavar="B", help="another: do both hold one training state?")


def run_verify(arguments: argparse.Namespace) -> int:
    """``isotrain verify A [B]``: 65 for damage, 1 where two differ."""
    from orchestrator.checkpoint.verify import compare, verify_newest

    reports = [verify_newest(path.expanduser()) for path in (arguments.path, arguments.other) if path]
    if not arguments.json:
        for report in reports:
            _print_report(report)
    if not all(report.good for report in reports):
        if arguments.json:
            print(json.dumps({"code": int(ExitCode.DATA), "checkpoints": [_report(report) for report in reports]}))
        return int(ExitCode.DATA)
    comparison = compare(*(report.folder for report in reports)) if len(reports) == 2 else None
    code = ExitCode.DONE if comparison is None or comparison.equal else ExitCode.RED
    if arguments.json:
        values = {"code": int(code), "checkpoints": [_report(report) for report in reports]}
        print(json.dumps(values | ({"comparison": _comparison(comparison)} if comparison else {})))
    elif comparison is not None:
        _print_comparison(comparison)
    return int(code)


def _report(report: Any) -> dict[str, Any]:
    return vars(report) | {"folder": str(report.folder), "good": report.good}


def _comparison(comparison: Any) -> dict[str, Any]:
    return vars(comparison) | {"equal": comparison.equal, "different": [vars(one) for one in comparison.different]}


def _print_report(report: Any) -> None:
    if report.good:
        counts = f"{report.files} files, {report.tensors} tensors, {report.bytes:,} bytes"
        print(f"{report.folder}: step {report.step}, good: {counts} are what was written")
    else:
        print(f"{report.folder}: damaged")
    for line in (*report.problems, *report.warnings):
        print(f"  {line}")


def _print_comparison(comparison: Any) -> None:
    if comparison.equal:
        print("both hold the same training state, bit for bit")
        return
    print("they differ:")
    lines = [f"{name}: in the first only" for name in comparison.only_in_first]
    lines += [f"{name}: in the second only" for name in comparison.only_in_second]
    lines += [f"{one.name} ({one.kind}): {one.reason}" for one in comparison.different]
    lines += [f"state.json: {key}" for key in comparison.state]
    for line in lines[:SHOWN]:
        print(f"  {line}")
    if len(lines) > SHOWN:
        print(f"  and {len(lines) - SHOWN} more (--json lists all)")


def add_checkpoints(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``isotrain checkpoints``."""
    parser.add_argument("path", type=Path, metavar="DIR", help="a run folder")
    parser.add_argument("--verify", action="store_true", help="hash every file now; else sizes are checked")


def run_checkpoints(arguments: argparse.Namespace) -> int:
    """``isotrain checkpoints DIR``: 65 where one is damaged."""
    from orchestrator.checkpoint.listing import list_checkpoints

    rows = list_checkpoints(arguments.path.expanduser(), hashed=arguments.verify)
    code = ExitCode.DONE if all(row.good for row in rows) else ExitCode.DATA
    if arguments.json:
        print(json.dumps({"code": int(code), "checkpoints": [row.summary() for row in rows]}))
        return int(code)
    from rich.table import Table

    table = Table("step", "loss", "MB", "written by", "holds", "state", caption="* is what a resume goes on from")
    for row in rows:
        loss = "" if row.loss is None else f"{row.loss:.4f}"
        step = f"{row.step}{'*' if row.is_next else ''}"
        table.add_row(step, loss, f"{row.bytes / 1e6:,.1f}", row.topology, row.room, row.state)
    _console().print(table)
    return int(code)


def run_explain(arguments: argparse.Namespace) -> int:
    """``isotrain resume DIR --explain``: 0, whether it stays the same run or not."""
    from orchestrator.commands import explain

    explanation = explain(arguments.run_dir, arguments.overrides)
    if arguments.json:
        print(json.dumps(explanation.summary()))
        return 0
    from rich.table import Table

    for note in explanation.notes:
        print(note)
    print(f"would go on from {explanation.checkpoint}, to step {explanation.steps}")
    restored = Table("restored", "", show_header=True)
    for name, words in explanation.restored.items():
        restored.add_row(name, words)
    _console().print(restored)
    if explanation.changes:
        table = Table("changed", "then", "now", "effect")
        for change in explanation.changes:
            table.add_row(change.what, change.before, change.now, change.effect)
        _console().print(table)
    verdict = "it stays the same run" if explanation.same else "it becomes another run after this step"
    print(verdict if explanation.changes else "nothing has changed: it is the same run")
    return 0


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)
