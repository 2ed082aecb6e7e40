"""What ranks and launchers write down beside training: whole, small, and never a reason to end."""

from __future__ import annotations

import json
from pathlib import Path

from launch.exits import RankExit
from orchestrator.history import history_file, note_launch
from orchestrator.pace import EVERY_S, RECENT, Pace, pace_file
from orchestrator.planning.plan import make_plan
from tests.pages.jobs import H100X64, JOB, LLAMA3_8B


def test_a_ranks_pace_is_written_every_minute_and_at_the_end(tmp_path: Path) -> None:
    now = [0.0]
    pace = Pace(tmp_path, 3, lambda: 2**30, clock=lambda: now[0])
    file = pace_file(tmp_path, 3)
    pace.note(1, 5.0, 0.5)
    assert not file.exists()
    now[0] = EVERY_S
    pace.note(2, 1.0, 0.1)
    written = json.loads(file.read_text())
    assert (written["rank"], written["steps"], written["last_step"], written["slowest_step"]) == (3, 2, 2, 1)
    assert (written["least_s"], written["median_s"], written["most_s"]) == (1.0, 3.0, 5.0)
    assert written["wait_s"] == 0.3 and written["peak_memory_bytes"] == 2**30
    pace.note(3, 9.0, 0.0)
    pace.write()
    assert json.loads(file.read_text())["slowest_step"] == 3
    assert [one.name for one in file.parent.iterdir()] == ["rank-3.json"]


def test_only_the_newest_steps_are_kept(tmp_path: Path) -> None:
    pace = Pace(tmp_path, 0, lambda: 0)
    for step in range(1, RECENT + 11):
        pace.note(step, 100.0 if step == 5 else 1.0, 0.0)
    pace.write()
    written = json.loads(pace_file(tmp_path, 0).read_text())
    assert written["steps"] == RECENT and written["most_s"] == 1.0


def test_a_folder_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    pace = Pace(tmp_path / "gone", 0, lambda: 0)
    pace.note(1, 1.0, 0.0)
    pace.write()
    note_launch(tmp_path / "gone", 0.0, 0, None)
    assert not (tmp_path / "gone").exists()


def test_every_launch_is_a_line(tmp_path: Path) -> None:
    plan = make_plan(JOB, LLAMA3_8B, H100X64)
    (tmp_path / "plan.json").write_text(plan.to_json())
    note_launch(tmp_path, 10.0, 86, RankExit(3, 86, "Killed", "rank 3 was killed", "", 4, 11.0))
    note_launch(tmp_path, 20.0, 130, None)
    note_launch(tmp_path, 30.0, 0, None)
    lines = [json.loads(line) for line in history_file(tmp_path).read_text().splitlines()]
    assert [(one["started"], one["code"], one["cause"], one["rank"]) for one in lines] == [
        (10.0, 86, "Killed", 3),
        (20.0, 130, "Aborted", None),
        (30.0, 0, "done", None),
    ]
    assert {(one["ranks"], one["topology"]) for one in lines} == {(64, str(plan.topology))}
