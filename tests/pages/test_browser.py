"""Pages in a real browser, without a network: they open, log nothing, and run no script but their own."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.pages.plan_page import plan_page
from orchestrator.pages.run_page import CURVES, report_end
from orchestrator.planning.advice import advise
from orchestrator.planning.plan import make_plan
from tests.end_to_end.conftest import make_tiny_run
from tests.end_to_end.shell import Folder, Shell
from tests.faults.disturbed import Disturbed
from tests.pages.chromium import Rendered
from tests.pages.jobs import H100X64, JOB, LLAMA3_8B
from tests.pages.parsed import Parsed, parsed
from tests.pages.run_folders import write_run_folder

pytestmark = pytest.mark.browser
Opened = Callable[[Path], Rendered]
STEPS = 60


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = make_plan(JOB, LLAMA3_8B, H100X64)
    file = tmp_path_factory.mktemp("page") / "plan.html"
    file.write_text(plan_page(plan, JOB, LLAMA3_8B, advise(JOB, LLAMA3_8B, H100X64, plan)), encoding="utf-8")
    return file


def test_a_plan_opens_and_says_all_that_is_in_it(plan_file: Path, opened: Opened) -> None:
    page = opened(plan_file)
    assert page.console == []
    assert parsed(page.dom).text.split() == parsed(plan_file.read_text(encoding="utf-8")).text.split()


def test_a_run_opens_and_says_all_that_is_in_it(opened: Opened, tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run", steps=2000)
    report_end(folder)
    page = opened(folder / "report.html")
    assert page.console == []
    assert parsed(page.dom).text.split() == parsed((folder / "report.html").read_text(encoding="utf-8")).text.split()


@pytest.mark.timeout(600)
def test_a_real_run_that_lost_a_rank_opens_with_the_curves_of_its_metrics(opened: Opened, tmp_path: Path) -> None:
    run = lose_a_rank(tmp_path)
    page = opened(run.path / "report.html")
    assert page.console == []
    found = parsed(page.dom)
    said = found.text
    assert f"loss{run.losses[STEPS]:.4f}of the last step" in said
    assert "rank 1 was killed by SIGKILL" in said and "1 ended early" in said
    lines = curves(found)
    for name, label, *_ in CURVES:
        values = [metrics[name] for metrics in run.metrics.values()]
        assert len(values) == STEPS
        check_drawn(lines[f"{label} over steps"], values)


def lose_a_rank(folder: Path) -> Folder:
    """STEPS steps of a tiny model on two ranks, of which one is killed on the way."""
    run = Folder(folder / "run")
    tiny = make_tiny_run(folder)
    words = tiny.words(cluster="laptop", topology__dp=2, steps=STEPS, checkpoint__every_steps=5, run_dir=run.path)
    disturbed = Disturbed(Shell(folder, folder / "cache"), words, run, 2)
    try:
        disturbed.start()
        disturbed.wait_beyond(5)
        disturbed.hit("a rank is killed (SIGKILL)", 1, random.Random(0))
        disturbed.finish()
    finally:
        disturbed.kill()
    return run


def curves(found: Parsed) -> dict[str, str]:
    """The line of each drawing that has one, by the drawing's name."""
    lines, drawing = {}, ""
    for element, values in found.attributes:
        if element == "svg":
            drawing = values["aria-label"]
        elif element == "path" and values.get("class") == "line":
            lines[drawing] = values["d"]
    return lines


def check_drawn(line: str, values: list[float]) -> None:
    """A point of ``line`` for every value, equally far apart, and as high as the value is between least and most."""
    assert line.startswith("M") and line.count("M") == 1
    points = [tuple(map(float, point.split())) for point in line[1:].split("L")]
    assert len(points) == len(values)
    across = [x for x, _ in points]
    apart = (across[-1] - across[0]) / (len(values) - 1)
    assert across == pytest.approx([across[0] + apart * step for step in range(len(values))], abs=0.11)
    heights, least, most = [y for _, y in points], min(values), max(values)
    room = (max(heights) - min(heights)) / ((most - least) or 1.0)
    assert heights == pytest.approx([min(heights) + room * (most - value) for value in values], abs=0.11)


def test_what_the_pointer_is_over_says_its_figures(plan_file: Path, opened: Opened, tmp_path: Path) -> None:
    """The policy is taken out for this test, or the pointer could not be moved by a script."""
    move = """<script>
      const one = document.querySelector("rect[data-tip]");
      one.dispatchEvent(new MouseEvent("pointermove", {bubbles: true, clientX: 9, clientY: 9}));
      document.title = document.getElementById("tip").textContent === one.dataset.tip ? "said" : "silent";
    </script></body>"""
    text = plan_file.read_text(encoding="utf-8").replace("Content-Security-Policy", "none").replace("</body>", move)
    file = tmp_path / "moved.html"
    file.write_text(text, encoding="utf-8")
    assert "<title>said</title>" in opened(file).dom


def test_a_script_that_is_not_the_pages_own_does_not_run(plan_file: Path, opened: Opened, tmp_path: Path) -> None:
    intruder = '<script>document.title = "intruder"</script><img src="http://127.0.0.1:9/a.png"></body>'
    file = tmp_path / "intruder.html"
    file.write_text(plan_file.read_text(encoding="utf-8").replace("</body>", intruder), encoding="utf-8")
    page = opened(file)
    assert "<title>intruder</title>" not in page.dom
    assert len([line for line in page.console if "Content Security Policy" in line]) == 2
