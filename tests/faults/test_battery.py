"""The list of faults is whole: every case has tests that are there, or says in words why not."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.faults.__main__ import main
from tests.faults.battery import CASES, ROOT, Case, read_battery
from tests.faults.disturbed import Recovered
from tests.faults.running import Ended, read_report
from tests.faults.soak import Soak, Soaked
from tests.faults.table import is_red, outcome, table

BATTERY = read_battery()


def functions(path: Path) -> set[str]:
    """The test functions of a file."""
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def test_every_case_is_there_once_and_in_order() -> None:
    assert [case.number for case in BATTERY] == list(range(1, CASES + 1))
    assert len({case.title for case in BATTERY}) == CASES


@pytest.mark.parametrize("case", BATTERY, ids=lambda case: str(case.number))
def test_the_tests_of_a_case_are_there_and_what_is_missing_is_said(case: Case) -> None:
    for node in case.tests:
        path, _, name = node.partition("::")
        assert name.startswith("test_") and name in functions(ROOT / path), f"case {case.number} names {node}"
    for words in (case.limit, case.open):
        assert not words or len(words.split()) >= 5, f"case {case.number} says {words!r}"


def test_every_test_of_this_folder_is_in_the_battery() -> None:
    named = {node for case in BATTERY for node in case.tests}
    for path in sorted((ROOT / "tests" / "faults").glob("test_*.py")):
        if path != Path(__file__):
            there = {f"tests/faults/{path.name}::{name}" for name in functions(path) if name.startswith("test_")}
            assert there <= named


def test_a_case_that_says_nothing_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "battery.yaml"
    file.write_text("- {case: 7, title: x}\n")
    with pytest.raises(ValueError, match="case 7 has no test, and neither 'limit' nor 'open' says why"):
        read_battery(file)
    file.write_text("- {case: 7, title: x, test: [y]}\n")
    with pytest.raises(ValueError, match="keys that are not known: \\['test'\\]"):
        read_battery(file)


REPORT = """<testsuites><testsuite>
<testcase classname="tests.a.test_a" name="test_one[0]" time="1.5"><properties>
<property name="recovery_s" value="4.25"/></properties></testcase>
<testcase classname="tests.a.test_a" name="test_one[1]" time="1.0"/>
<testcase classname="tests.a.test_a" name="test_red[0]" time="1.0">
<failure message="assert 1 == 2&#10;more"/></testcase>
<testcase classname="tests.a.test_a" name="test_red[1]" time="1.0"><skipped message="no Slurm here"/></testcase>
<testcase classname="tests.a.test_a" name="test_away" time="0.0"><skipped message="no Slurm here"/></testcase>
</testsuite></testsuites>"""


def test_the_table_says_how_every_case_ended() -> None:
    nodes = [f"tests/a/test_a.py::test_{name}" for name in ("one", "red", "away", "gone")]
    ended = {one.node: one for one in read_report(REPORT, nodes)}
    assert ended[nodes[0]] == Ended(nodes[0], "passed", 2.5, "", (4.25,))
    assert ended[nodes[1]] == Ended(nodes[1], "failed", 2.0, "assert 1 == 2")
    assert (ended[nodes[3]].outcome, ended[nodes[3]].why) == ("failed", "the test was not found")
    cases = [
        Case(1, "good", (nodes[0],)),
        Case(2, "bad", tuple(nodes[:2])),
        Case(3, "away", (nodes[2],)),
        Case(4, "not yet", open="some words"),
        Case(5, "never", limit="because"),
        Case(6, "half", (nodes[0],), open="the rest"),
    ]
    found = [outcome(case, ended) for case in cases]
    assert found == ["passes", "**fails**", "not run", "not tested yet", "limit", "passes"]
    assert is_red(cases, ended) and not is_red([cases[0], *cases[2:]], ended)
    text = table(cases, ended)
    assert "| 1 | good | passes | 1 | 4.2 |  |" in text
    assert "**test_red**: assert 1 == 2 |" in text and "**test_away**: no Slurm here |" in text
    assert "| 6 | half | passes | 1 | 4.2 | not tested yet: the rest |" in text
    assert "6 cases: 2 passes, 1 fails, 1 not run, 1 not tested yet, 1 limit." in text


def test_a_run_that_trains_again_too_late_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    took = {BATTERY[2].tests[0]: (30.0,), BATTERY[3].tests[0]: (12.0, 30.1)}
    monkeypatch.setattr(
        "tests.faults.__main__.run_tests",
        lambda nodes: [Ended(node, "passed", 1.0, "", took.get(node, ())) for node in nodes],
    )
    results = ["--results", str(tmp_path / "faults.json")]
    assert main(["run", "--case", "3", *results]) == 0
    assert "too late" not in capsys.readouterr().out
    assert main(["run", "--case", "3", "--case", "4", *results]) == 1
    said = capsys.readouterr().out
    assert f"| 4 | {BATTERY[3].title} | **too late** | {len(BATTERY[3].tests)} | 21.1 (12.0 to 30.1 of 2) |" in said
    assert "trained again after 30.1 s, not within 30 s" in said and "1 passes, 1 too late." in said


@pytest.mark.parametrize(
    ("recovery_s", "differs", "code"), [(30.0, (), 0), (30.1, (), 1), (30.0, ("the loss of 2 steps differs",), 1)]
)
def test_a_soak_is_red_where_the_runs_differ_or_one_trains_again_too_late(
    recovery_s: float,
    differs: tuple[str, ...],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recovered = tuple(Recovered("a rank is killed (SIGKILL)", 0, 20, seconds) for seconds in (9.0, recovery_s))
    soaked = Soaked(Soak(2, 1.0, 0), recovered, 40, 5.0, 60.0, 20.0, differs)
    monkeypatch.setattr("tests.faults.soak.run_soak", lambda soak, folder: soaked)
    assert main(["soak"]) == code
    assert ("| **30.1: too late** |" in capsys.readouterr().out) == (recovery_s > 30)
