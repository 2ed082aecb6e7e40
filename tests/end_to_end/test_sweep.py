"""A sweep as a user types it: real runs, each the same as when it is trained alone."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Folder, Shell, close


def test_a_point_is_the_run_that_it_would_be_alone(
    shell: Shell, tiny_run_model: TinyRun, uninterrupted: Folder, tmp_path: Path
) -> None:
    folder = tmp_path / "the sweep"
    words = tiny_run_model.words(optimizer__lr="0.02,0.01", topology__tp="1,4", run_dir=f"'{folder}'")
    done = shell.isotrain("sweep", *words, "--jobs", "2", "--json")
    points = done.json["points"]
    assert [point["state"] for point in points] == ["done", "pruned", "done", "pruned"]
    assert "6 attention heads" in points[1]["reason"]
    same, other = (Folder(folder / points[number]["folder"]) for number in (2, 0))
    assert close(same.losses, uninterrupted.losses) and same.losses != other.losses
    best = min((other, same), key=lambda run: sum(run.losses.values()))
    assert best.path.name == done.json["best"]["folder"]
    again = shell.isotrain("sweep", str(folder))
    assert "2 impossible, 2 finished already" in again.err and "plot: " in again.err
