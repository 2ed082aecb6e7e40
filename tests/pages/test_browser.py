"""Pages in a real browser, without a network: they open, log nothing, and run no script but their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.pages.plan_page import plan_page
from orchestrator.pages.run_page import report_end
from orchestrator.planning.advice import advise
from orchestrator.planning.plan import make_plan
from tests.pages.chromium import Rendered
from tests.pages.jobs import H100X64, JOB, LLAMA3_8B
from tests.pages.parsed import parsed
from tests.pages.run_folders import write_run_folder

pytestmark = pytest.mark.browser
Opened = Callable[[Path], Rendered]


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
