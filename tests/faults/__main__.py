"""``python -m tests.faults run`` and ``python -m tests.faults soak``: the tables of docs/reliability.md."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from orchestrator.marks import between_marks
from tests.faults import soak, table
from tests.faults.battery import read_battery
from tests.faults.running import groups, read_results, run_tests, write_results

MARK = "<!-- {name}: written by `python -m tests.faults {name}` -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the battery of faults, or a soak; 1 where a case is red, the soak's runs differ, or one recovered late."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=main.__doc__)
    parser.add_argument("what", choices=("run", "soak"))
    parser.add_argument("--case", type=int, action="append", default=[], help="run only this; may be given again")
    parser.add_argument("--results", type=Path, default=Path("runs/faults.json"), help="what was found, of all cases")
    parser.add_argument("--faults", type=int, default=60, help="of the soak (60)")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the soak, before its undisturbed run (60)")
    parser.add_argument("--seed", type=int, default=0, help="of the soak: which fault when, and to which rank (0)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="fill its marks there")
    options = parser.parse_args(arguments)
    text, code = _run(options) if options.what == "run" else _soak(options)
    print(text)
    if options.write is not None:
        page = options.write.read_text(encoding="utf-8")
        options.write.write_text(between_marks(page, MARK.format(name=options.what), text), encoding="utf-8")
    return code


def _run(options: argparse.Namespace) -> tuple[str, int]:
    battery = read_battery()
    asked = [case for case in battery if not options.case or case.number in options.case]
    ended = read_results(options.results) if options.case else {}
    for nodes in groups(asked):
        ended |= {one.node: one for one in run_tests(nodes)}
        write_results(options.results, ended)
    known = [case for case in battery if case in asked or (options.case and ended.keys() >= set(case.tests))]
    return table.table(known, ended), int(table.is_red(known, ended))


def _soak(options: argparse.Namespace) -> tuple[str, int]:
    asked = soak.Soak(options.faults, options.minutes, options.seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soaked = soak.run_soak(asked, Path(folder))
    return soak.table(soaked), int(soaked.is_red)


if __name__ == "__main__":
    sys.exit(main())
