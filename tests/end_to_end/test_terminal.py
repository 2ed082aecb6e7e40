"""A run on a terminal shows a panel that is drawn in place; its log has plain lines."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import ISOTRAIN, Folder, Shell, wait_for
from tests.helpers.screen import Screen


def test_on_a_terminal_the_first_of_several_ranks_draws_the_panel(
    shell: Shell, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    screen, run = Screen(columns=120), Folder(tmp_path / "run")
    words = tiny_run_model.words(cluster="laptop", topology__dp=2, run_dir=run.path)
    terminal = screen.stream
    process = subprocess.Popen(
        [*ISOTRAIN, "train", *words],
        cwd=shell.folder,
        env=shell.environment | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    try:
        wait_for(lambda: bool(screen.lines()) and process.poll() is not None, timeout_s=150)
    finally:
        process.kill()
    shown = screen.lines()
    assert process.returncode == 0, shown
    (first,) = (row for row, line in enumerate(shown) if line.startswith("step "))  # one panel, whatever was drawn
    assert shown[first] == f"step 6/6  {'━' * 30}  ETA 0s"
    losses = run.losses
    curve = re.fullmatch(r"loss (\S+)  ([▁▂▃▄▅▆▇█]+)  lowest (\S+)", shown[first + 1])
    assert curve is not None and len(curve[2]) == 6
    assert (curve[1], curve[3]) == (f"{losses[6]:.4f}", f"{min(losses.values()):.4f}")
    assert curve[2].index("█") == max(losses, key=lambda step: losses[step]) - 1
    assert re.match(r"\d+ tokens/s  \S+ s per step  lr .*  memory \S+ GiB$", shown[first + 2])
    log = (run.path / "logs" / "rank-0.log").read_text(encoding="utf-8")
    assert len(re.findall(r"^step \d/6  loss ", log, re.MULTILINE)) == 6 and "\x1b[" not in log
