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
from tests.faults.running import run_tests

MARK = "<!-- {name}: written by `python -m tests.faults {name}` -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the battery of faults, or a soak; 1 where a case is red, or where the runs of the soak differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=main.__doc__)
    parser.add_argument("what", choices=("run", "soak"))
    parser.add_argument("--case", type=int, action="append", default=[], help="only this case; may be given again")
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
    cases = [case for case in read_battery() if not options.case or case.number in options.case]
    ended = run_tests(cases)
    return table.table(cases, ended), int(table.is_red(cases, ended))


def _soak(options: argparse.Namespace) -> tuple[str, int]:
    asked = soak.Soak(options.faults, options.minutes, options.seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        soaked = soak.run_soak(asked, Path(folder))
    return soak.table(soaked), int(bool(soaked.differs))


if __name__ == "__main__":
    sys.exit(main())
