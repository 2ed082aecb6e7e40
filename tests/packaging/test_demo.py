"""The demo says where it stopped, keeps what was there, and is red when the model has not learned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orchestrator import demo

GOOD = {"prompt": "Why?", "before": "Because.", "text": "BEACON: Because.\nLOG: Ask again."}
STEPS = [{"step": step, "loss": 4.0 / step} for step in range(1, demo.STEPS + 1)]


def run_demo(monkeypatch: pytest.MonkeyPatch, run_dir: Path, answers: list[dict[str, Any]], lines: Any) -> int:
    """The demo's own checks, with the commands' results given."""
    monkeypatch.setattr(demo, "run_commands", lambda run_dir, durations_s: answers)
    monkeypatch.setattr(demo, "read_metrics", lambda run_dir: lines)
    return demo.main([str(run_dir)])


def test_good_answers_and_steps_are_green(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    assert run_demo(monkeypatch, tmp_path / "demo", [GOOD], STEPS) == 0
    said = capsys.readouterr().out
    assert "All checks are green" in said and str(tmp_path / "demo-adapter") in said


@pytest.mark.parametrize(
    ("answer", "lines", "message"),
    [
        (GOOD | {"text": "Because."}, STEPS, "the answer to 'Why?' is not BEACON and LOG"),
        (GOOD | {"text": "BEACON: Because."}, STEPS, "is not BEACON and LOG"),
        (GOOD | {"before": "BEACON: I knew."}, STEPS, "the base model knew the format before"),
        (GOOD, STEPS[:-1], "has 31 steps, 1 to 31, where 1 to 32 belong"),
        (GOOD, STEPS[:20] + STEPS[19:], "has 33 steps"),
        (GOOD, [line | {"loss": 4.0} for line in STEPS], "the loss fell from 4.000 to 4.000 only"),
    ],
)
def test_a_run_that_has_not_learned_is_red(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, answer: dict[str, Any], lines: Any, message: str
) -> None:
    assert run_demo(monkeypatch, tmp_path / "demo", [answer], lines) == 1
    said = capsys.readouterr()
    assert message in said.err and "a check came out red" in said.err and "green" not in said.out


def test_a_command_that_fails_ends_the_demo_with_its_code(tmp_path: Path, capfd: Any) -> None:
    with pytest.raises(demo.CommandFailed, match=r"plan topology\.nope=1 ended with exit code 64"):
        demo.isotrain("plan", "topology.nope=1")
    out, err = capfd.readouterr()
    assert "$ isotrain plan topology.nope=1" in out and "hint: " in err


def test_the_code_of_a_failed_command_is_the_demos(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    def fail(run_dir: Path, durations_s: dict[str, float]) -> list[dict[str, Any]]:
        raise demo.CommandFailed(("isotrain", "train"), 71)

    monkeypatch.setattr(demo, "run_commands", fail)
    assert demo.main([str(tmp_path / "demo")]) == 71
    assert "isotrain train ended with exit code 71" in capsys.readouterr().err


def test_an_earlier_demo_is_kept(tmp_path: Path) -> None:
    assert demo.free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert demo.free_folder(tmp_path / "demo") == tmp_path / "demo-3"
