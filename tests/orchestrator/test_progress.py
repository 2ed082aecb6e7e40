"""The live panel, as a person sees it on a (pseudo-)terminal."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from launch.output import CLEAR_LINE, Tee
from orchestrator import opening
from orchestrator.config.job import MetricsConfig
from orchestrator.metrics import Metrics
from orchestrator.opening import Asked, _open_metrics
from orchestrator.planning.plan import make_plan
from orchestrator.progress import Panel, sparkline
from tests.helpers.screen import Screen
from tests.pages.jobs import H100X64, JOB, LLAMA3_8B

VALUES = {
    "loss": 2.5,
    "grad_norm": 0.5,
    "learning_rate": 1e-3,
    "tokens": 100,
    "step_s": 0.5,
    "peak_memory_bytes": 2**30,
}


def test_the_panel_is_drawn_in_place_and_the_log_has_plain_lines(tmp_path: Path) -> None:
    screen, log = Screen(), io.StringIO()
    stream: object = Tee(screen.stream, log)
    metrics = Metrics(MetricsConfig(), tmp_path, 40, 1, stream, peak_tokens_per_s=400.0)  # type: ignore[arg-type]
    assert screen.lines() == [f"step 0/40  {'─' * 30}  ETA ?"]
    for step, loss in enumerate((2.5, 2.0, 1.5, 1.75), 1):
        metrics.log(step, VALUES | {"loss": loss})
    shown = screen.lines()
    assert shown[0].startswith(f"step 4/40  {'━' * 3}{'─' * 27}  ETA ") and len(shown) == 3
    assert shown[1] == "loss 1.7500  █▄▁▂  lowest 1.5000"
    assert shown[2] == "200 tokens/s  0.5 s per step  MFU 50%  lr 1.00e-03  grad norm 0.500  memory 1 GiB"
    metrics.close()
    assert screen.lines() == shown
    lines = log.getvalue().splitlines()
    assert len(lines) == 4 and lines[0].startswith("step 1/40  loss 2.5000") and "\x1b" not in log.getvalue()


def test_a_runs_panel_shows_mfu_where_its_devices_peak_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 H100s at 400e12 operations a second each, of 989e12; a token of Llama-3-8B takes 6 for a weight, and
    12 for each layer, width and token that its attention sees: half of the 8192 on the mean."""
    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen.stream)
    monkeypatch.setattr(opening, "model_spec", lambda model: LLAMA3_8B)
    operations = 6 * (8.03e9 - 128256 * 4096) + 12 * 32 * 4096 * 4096
    values = VALUES | {"tokens": 64 * 400e12 / operations, "step_s": 1.0}
    metrics = _open_metrics(Asked(JOB, make_plan(JOB, LLAMA3_8B, H100X64), tmp_path), 0, "")
    metrics.log(1, values)
    metrics.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["mfu"] == pytest.approx(400 / 989, rel=0.01)
    assert "  MFU 40%  " in screen.lines()[2]


def test_what_is_said_meanwhile_stands_above_the_panel() -> None:
    screen, log = Screen(), io.StringIO()
    stream = Tee(screen.stream, log)
    panel = Panel(stream, 10, 1)
    panel.log(1, VALUES)
    print("step 1: [/] a checkpoint could not be saved", file=stream)
    panel.log(2, VALUES)
    shown = screen.lines()
    assert shown[0] == "step 1: [/] a checkpoint could not be saved" and shown[1].startswith("step 2/10")
    panel.close()
    print("done", file=stream)
    assert screen.lines() == [*shown, "done"] and log.getvalue().count("could not be saved") == 1


def test_what_the_launcher_says_ends_no_drawing() -> None:
    """Another process writes on the same terminal; its line may be drawn over, but the panel is whole again."""
    screen = Screen()
    panel = Panel(screen.stream, 10, 1)
    panel.log(1, VALUES)
    screen.stream.write(f"{CLEAR_LINE}stopping after this step and saving\n")
    panel.log(2, VALUES)
    panel.close()
    assert [line.split("  ")[0] for line in screen.lines()[-3:]] == ["step 2/10", "loss 2.5000", "0.5 s per step"]


def test_a_narrow_terminal_cuts_lines_and_leaves_none_behind() -> None:
    narrow = Screen(24)
    panel = Panel(narrow.stream, 10, 1)
    for step in (1, 2, 3):
        panel.log(step, VALUES)
    assert len(narrow.lines()) == 3 and all(len(line) <= 24 for line in narrow.lines())
    assert narrow.lines()[0].startswith("step 3/10") and narrow.lines()[0].endswith("…")


def test_a_terminal_that_goes_away_ends_nothing() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(5, "Input/output error")

        def isatty(self) -> bool:
            return True

    log = io.StringIO()
    panel = Panel(Tee(Gone(), log), 10, 1)
    panel.log(1, VALUES)
    panel.close()
    assert log.getvalue().startswith("step 1/10")


@pytest.mark.parametrize("values", [[1.0], [3.0, 3.0], list(range(1000)), [float(-x) for x in range(7)]])
def test_a_sparkline_goes_as_its_values_do(values: list[float]) -> None:
    drawn = sparkline(values, width=20)
    assert len(drawn) == min(20, len(values))
    assert list(drawn) == sorted(drawn, reverse=values[0] > values[-1])


def test_a_loss_that_is_no_number_is_not_in_the_curve() -> None:
    screen = Screen()
    panel = Panel(screen.stream, 10, 1)
    for step, loss in enumerate((2.0, float("nan"), 1.0), 1):
        panel.log(step, VALUES | {"loss": loss})
    assert screen.lines()[1] == "loss 1.0000  █▁  lowest 1.0000"
