"""The page of a run: its figures are the folder's, whatever the folder's state; no peak is thinned away."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.cli import main
from orchestrator.errors import ConfigError
from orchestrator.history import Launch
from orchestrator.pace import RankPace
from orchestrator.pages.attempts import attempts_of
from orchestrator.pages.curves import curve_chart, spread_chart, thinned
from orchestrator.pages.run_folder import read_run
from orchestrator.pages.run_page import report_end, run_page, state
from tests.pages.parsed import Parsed, parsed
from tests.pages.run_folders import write_run_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_folder(tmp_path_factory.mktemp("runs") / "first")


@pytest.fixture
def damaged(folder: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(folder, tmp_path / "run"))


def read_page(folder: Path) -> Parsed:
    found = parsed(run_page(read_run(folder)))
    assert not found.wrong and not found.loads
    return found


def test_the_page_says_what_is_in_the_folder(folder: Path) -> None:
    said = read_page(folder).text
    for words in (
        *("Run: first", "300", "of 300", "Killed", "rank 7 was killed by SIGKILL", "64 ranks", "1 ended early"),
        *("pp=4 dp=16", "2023-11-14", "2 checkpoints", "node1", "30 GiB"),
    ):
        assert words in said, words


def test_launches_are_those_that_ended_and_those_without_a_word(damaged: Path) -> None:
    assert [one.code for one in attempts_of(read_run(damaged))] == [86, 0]
    lines = (damaged / "launches.jsonl").read_text().splitlines()
    (damaged / "launches.jsonl").write_text(lines[1] + "\n")
    first, second = attempts_of(read_run(damaged))
    assert (first.code, first.words, second.code) == (None, "left no word", 0)
    assert first.ended - first.started == pytest.approx(180, abs=1)  # the last step that it logged


def test_the_state_is_that_of_the_newest_launch(damaged: Path) -> None:
    run = read_run(damaged)
    assert state(run, attempts_of(run)).startswith("done (2023-11-14")
    assert state(run, []) == "not started yet"
    (damaged / "states").mkdir()
    (damaged / "states" / "rank-0.json").write_text('{"rank": 0, "pid": 1}')
    running = read_run(damaged)
    assert state(running, attempts_of(running)) == "running: 1 ranks are on this machine"


def test_measured_memory_stands_beside_the_plans(folder: Path) -> None:
    run = read_run(folder)
    assert run.plan is not None
    said = " ".join(read_page(folder).text.split())
    assert "measured / planned" in said and f"{30 * 2**30 / run.plan.memory[0].total:.2f}" in said


@pytest.mark.parametrize("seed", range(5))
def test_a_thinned_curve_keeps_its_extremes_and_its_order(seed: int) -> None:
    chance = random.Random(seed)
    points = [(step, None if chance.random() < 0.01 else chance.gauss(0, 1)) for step in range(1, 20_001)]
    points[chance.randrange(20_000)] = (points[chance.randrange(20_000)][0], 50.0)
    points.sort(key=lambda one: one[0])
    kept = thinned(points, 100)
    values = [value for _, value in points if value is not None]
    left = [value for _, value in kept if value is not None]
    assert len(kept) <= 300 and kept == sorted(kept, key=lambda one: one[0]) and set(kept) <= set(points)
    assert (min(left), max(left)) == (min(values), max(values)) and None in {value for _, value in kept}


def test_a_value_that_is_no_number_breaks_the_line_and_is_marked() -> None:
    found = parsed(curve_chart([(1, 2.0), (2, 1.0), (3, None), (4, 1.5), (5, 1.0)], "loss"))
    curve, marks = found.of("path")
    assert curve["d"].count("M") == 2 and curve["d"].count("L") == 2 and marks["d"].count("M") == 1
    assert [box["data-tip"] for box in found.of("rect")][2] == "step 3\nloss no number"


def test_of_many_ranks_the_slowest_is_not_lost(folder: Path) -> None:
    paces = list(read_run(folder).paces) * 100
    found = parsed(spread_chart(paces))
    assert len(found.of("rect")) <= 160 and "step 900 ms to 1.5 s, median 1 s" in found.of("rect")[0]["data-tip"]


def test_a_long_run_is_a_small_page(tmp_path: Path) -> None:
    text = run_page(read_run(write_run_folder(tmp_path / "long", steps=100_000)))
    assert len(text.encode()) < 2_000_000
    assert [path for path in parsed(text).of("path") if path.get("fill") == "var(--c3)"]  # the one loss that is none
    assert "steps 1 to 1,000\nloss 2 to 9.5" in text  # the one step with 9.5 is the 123rd


BREAKS = {
    "plan.json": "plan.json: ",
    "job.yaml": "job.yaml: ",
    "metrics.jsonl": "metrics.jsonl: 1 of 1 lines cannot be read",
    "environment.jsonl": "environment.jsonl: 1 of 1 lines cannot be read",
    "launches.jsonl": "launches.jsonl: 1 of 1 lines cannot be read",
    "checkpoints/step-000300/manifest.json": "checkpoints/step-000300 has no manifest.json that can be read",
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("how", ["gone", "rubbish"])
def test_whatever_is_damaged_is_said_and_the_rest_is_shown(damaged: Path, name: str, how: str) -> None:
    if how == "gone":
        (damaged / name).unlink()
    else:
        (damaged / name).write_bytes(b"\xff{]\x00: rubbish\n")
    run = read_run(damaged)
    found = read_page(damaged)
    assert "Run: run" in found.text
    if how == "rubbish":
        assert any(BREAKS[name] in problem for problem in run.problems), run.problems
        assert "What cannot be read" in found.text


def test_a_line_that_is_being_written_is_no_damage(damaged: Path) -> None:
    with (damaged / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 301, "lo')
    run = read_run(damaged)
    assert not run.problems and len(run.steps) == 300


@pytest.mark.parametrize(
    "line", ['{"step": "7"}', '{"step": null}', "[1]", '{"step": 5, "loss": "low", "time": []}', "{}"]
)
def test_lines_of_strange_types_do_not_end_the_page(damaged: Path, line: str) -> None:
    for name in ("metrics.jsonl", "environment.jsonl", "launches.jsonl", "paces/rank-1.json"):
        (damaged / name).write_text(f"{line}\n")
    read_page(damaged)


def test_a_folder_without_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run folder: it has none of job") as raised:
        read_run(tmp_path)
    assert raised.value.hint == "isotrain report DIR"


def test_the_command_writes_the_page_and_says_how_the_run_is(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(damaged)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("step 300, done (2023-11-14") and f"page: {damaged / 'report.html'}" in out
    (damaged / "plan.json").write_text("{")
    assert main(["report", str(damaged), "--html", str(tmp_path / "a.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(tmp_path / "a.html") and told["step"] == 300 and "plan.json" in told["problems"][0]


def test_the_end_of_a_run_is_not_disturbed_by_a_page_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: object) -> None:
        raise KeyError("a plan from the future")

    report_end(tmp_path)
    (tmp_path / "job.yaml").touch()
    (tmp_path / "report.html").mkdir()
    report_end(tmp_path)
    assert not list((tmp_path / "report.html").iterdir())
    with monkeypatch.context() as patched:
        patched.setattr("orchestrator.pages.run_page.run_page", fail)
        report_end(tmp_path)
    assert "report.html was not written: KeyError('a plan from the future')" in capsys.readouterr().err


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.integers(), st.floats(), st.text(max_size=5))
VALUES = st.one_of(LEAVES, st.lists(LEAVES, max_size=2), st.dictionaries(st.text(max_size=3), LEAVES, max_size=2))


def lines_of(names: Sequence[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    usual = st.sampled_from(names)
    return st.lists(st.dictionaries(usual, VALUES, max_size=len(names)), max_size=4)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=lines_of(["step", "time", "loss", "step_s", "tokens_per_s", "peak_memory_bytes"]),
    starts=lines_of(["time", "host", "git", "packages"]),
    launches=st.one_of(lines_of([field.name for field in fields(Launch)]), st.lists(st.builds(Launch).map(asdict))),
    pace=st.one_of(VALUES, st.builds(RankPace).map(asdict)),
    manifest=lines_of(["about", "files"]),
)
def test_no_content_of_a_folder_ends_in_a_traceback(
    tmp_path: Path, steps: Any, starts: Any, launches: Any, pace: Any, manifest: Any
) -> None:
    files = {"metrics": steps, "environment": starts, "launches": launches}
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    saved = tmp_path / "checkpoints" / "step-000001" / "manifest.json"
    for file, value in ((tmp_path / "paces" / "rank-0.json", pace), (saved, manifest)):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    read_page(tmp_path)
