"""Before a rank trains: what it needs to be started, and where an error by hand may leave its word."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import ConfigError
from orchestrator.locking import locked
from orchestrator.runs import decide_train, is_ours, write_run
from orchestrator.torchrun import asked_run_dir
from orchestrator.worker import main
from tests.orchestrator.test_assemble import JOB


def test_a_worker_without_a_launch_says_how_to_start_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="needs RANK and WORLD_SIZE") as caught:
        main(tmp_path)
    assert caught.value.hint == "isotrain train ..."


def test_a_plan_for_more_ranks_than_were_started_is_refused_before_any_group_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestrator import compose_job, plan_job

    job = compose_job(["experiment=demo"])
    write_run(tmp_path / "run", job, plan_job(job).plan.to_json())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"the plan uses 4 ranks .* but 2 were started") as caught:
        main(tmp_path / "run")
    assert caught.value.hint == "torchrun --nproc-per-node 4 ..."


def test_a_word_is_left_in_our_folders_only(tmp_path: Path) -> None:
    empty, theirs, ours, early = (tmp_path / name for name in ("empty", "theirs", "ours", "early"))
    for folder in (empty, theirs, early):
        folder.mkdir()
    (theirs / "thesis.tex").write_text("mine")
    (early / "exits").mkdir()
    write_run(ours, JOB, "{}")
    assert [is_ours(folder) for folder in (empty, theirs, ours, early, tmp_path / "new")] == [
        *(True, False, True, True, True)
    ]
    assert not is_ours(theirs / "thesis.tex") and not is_ours(theirs / "thesis.tex" / "run")
    with locked(ours):
        assert not is_ours(ours)  # someone trains in it


def test_what_a_launch_that_failed_early_leaves_is_no_other_run(tmp_path: Path) -> None:
    for name in ("exits", "logs", "states", "checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / ".lock").touch()
    assert decide_train(tmp_path, JOB).kind == "start"
    (tmp_path / "checkpoints" / "step-000004").mkdir()
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        decide_train(tmp_path, JOB)


def test_the_run_folder_is_found_among_words_that_need_not_be_right() -> None:
    assert asked_run_dir(["stps=1", "run_dir=a", "run_dir='/b'"]) == Path("/b")
    assert asked_run_dir(["run_dir="]) is None and asked_run_dir(["run_dirs=a"]) is None
