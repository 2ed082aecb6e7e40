"""Runs the tests of the battery, and gathers by case how they ended and how long runs took to recover."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.battery import ROOT, Case

RECOVERY = "recovery_s"
LONGEST_S = 30.0  # from a fault until a new step is trained; what takes longer is red
LAST_LINES = 12


@dataclass(frozen=True)
class Ended:
    """How one test function ended, over its parameters: ``outcome`` is the worst of passed, skipped and failed.

    ``why``: the reason of a skip, or the first line of a failure; ``recovery_s``: what its runs took to recover.
    """

    node: str
    outcome: str
    duration_s: float
    why: str = ""
    recovery_s: tuple[float, ...] = ()


def groups(cases: Sequence[Case]) -> list[list[str]]:
    """The tests of these cases, each once; those on Slurm apart, so that a cluster is up for them only.

    Example:
        >>> groups([Case(1, "x", ("tests/slurm/test_x.py::test_x", "tests/test_y.py::test_y"))])
        [['tests/test_y.py::test_y'], ['tests/slurm/test_x.py::test_x']]
    """
    nodes = dict.fromkeys(node for case in cases for node in case.tests)
    on_slurm = [node for node in nodes if node.startswith("tests/slurm/")]
    here = [node for node in nodes if node not in on_slurm]
    return [group for group in (here, on_slurm) if group]


def run_tests(nodes: Sequence[str]) -> list[Ended]:
    """Run tests in one call of pytest.

    Raises:
        RuntimeError: pytest could not run them.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        report = Path(folder) / "report.xml"
        kept = ["-o", "junit_family=xunit1", f"--junitxml={report}"]  # only this form holds recovery times
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *kept, *nodes]
        done = subprocess.run(
            argv, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=sys.stderr, check=False
        )
        if done.returncode not in (0, 1) or not report.exists():
            raise RuntimeError(f"pytest ended with {done.returncode} and has not run the tests")
        return read_report(report.read_text(encoding="utf-8"), nodes)


def read_results(file: Path) -> dict[str, Ended]:
    """What an earlier run has found, by node."""
    if not file.exists():
        return {}
    values = json.loads(file.read_text(encoding="utf-8"))
    return {value["node"]: Ended(**value | {"recovery_s": tuple(value["recovery_s"])}) for value in values}


def write_results(file: Path, ended: Mapping[str, Ended]) -> None:
    """Keep it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(one) for one in ended.values()], indent=1) + "\n", encoding="utf-8")


def read_report(text: str, nodes: Iterable[str]) -> list[Ended]:
    """What a JUnit report says of these tests; one that is not in it has failed.

    Example:
        >>> text = '<testsuite><testcase classname="tests.launch.test_x" name="test_y[1]" time="2"/></testsuite>'
        >>> read_report(text, ["tests/launch/test_x.py::test_y"])
        [Ended(node='tests/launch/test_x.py::test_y', outcome='passed', duration_s=2.0, why='', recovery_s=())]
    """
    found: dict[str, list[xml.Element]] = {}
    for element in xml.fromstring(text).iter("testcase"):
        name = element.get("name", "").partition("[")[0]
        found.setdefault(f"{element.get('classname', '').replace('.', '/')}.py::{name}", []).append(element)
    return [_ended(node, found.get(node, [])) for node in nodes]


def _ended(node: str, elements: Sequence[xml.Element]) -> Ended:
    if not elements:
        return Ended(node, "failed", 0.0, "the test was not found")
    outcome, why = "passed", ""
    for tag, meaning in (("skipped", "skipped"), ("error", "failed"), ("failure", "failed")):
        for element in elements:
            if (end := element.find(tag)) is not None:
                outcome, why = meaning, end.get("message", "").splitlines()[0] if end.get("message") else tag
    recovered = [
        float(one.get("value", ""))
        for element in elements
        for one in element.iter("property")
        if one.get("name") == RECOVERY
    ]
    return Ended(node, outcome, sum(float(one.get("time", 0)) for one in elements), why, tuple(recovered))
