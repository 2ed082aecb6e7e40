"""A run notes what it took, and the next plan like it says so; a broken ledger is said and ends nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Shell


def test_a_run_is_noted_and_the_next_plan_is_told(
    shell: Shell, tiny_run_model: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = tmp_path / "ledger.sqlite"
    monkeypatch.setenv("ISOTRAIN_LEDGER", str(ledger))
    words = tiny_run_model.words(steps=4, run_dir=tmp_path / "run", checkpoint__every_steps=0)
    shell.isotrain("train", *words)
    with sqlite3.connect(ledger) as noted:
        ((steps, seconds, peak),) = noted.execute("SELECT steps, measured_s, peak_bytes FROM runs").fetchall()
    assert steps == 3 and 0 < seconds < 60 and 1e8 < peak < 1e10
    assert "1 similar run in the ledger: steps took" in shell.isotrain("plan", *words).out
    ledger.write_text("broken")
    more = shell.isotrain("resume", str(tmp_path / "run"), "steps=8")
    assert f"this run is not in the ledger {ledger}" in more.err + (tmp_path / "run/logs/rank-0.log").read_text()
