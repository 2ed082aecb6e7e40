"""What the pages tell people to type works: every block marked ``run`` is run as written, in one folder, in order.

A fenced block of shell is marked ``sh run``, ``sh run CODE`` (it ends with that exit code) or ``sh skip: REASON``;
Python is run where it says ``python run``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(?P<language>\w+) *(?P<mark>[^\n]*)\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = {"sh", "bash", "console", "shell"}
MARK = re.compile(r"run(?: (?P<code>\d+))?|skip: \S.{5,}")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


@dataclass(frozen=True)
class Block:
    """One fenced block; ``line`` is that of its first line of text."""

    page: str
    line: int
    language: str
    mark: str
    text: str

    @property
    def place(self) -> str:
        """``README.md:12``."""
        return f"{self.page}:{self.line}"

    @property
    def argv(self) -> list[str]:
        """The process that runs it."""
        return (
            [sys.executable, "-c", self.text]
            if self.language == "python"
            else ["bash", "-euo", "pipefail", "-c", self.text]
        )


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    name = page.relative_to(ROOT).as_posix()
    return [
        Block(name, text.count("\n", 0, found.start()) + 2, found["language"], found["mark"].strip(), found["text"])
        for found in FENCE.finditer(text)
    ]


ALL = [block for page in PAGES if page.exists() for block in blocks(page)]
RUN = [block for block in ALL if block.mark.startswith("run")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all blocks are run, one after the other."""
    return tmp_path_factory.mktemp("pages")


@pytest.mark.parametrize("block", [block for block in ALL if block.language in SHELL], ids=lambda block: block.place)
def test_every_shell_block_is_run_or_says_why_not(block: Block) -> None:
    assert MARK.fullmatch(block.mark), f"{block.place}: mark it 'run', 'run CODE' or 'skip: REASON', not {block.mark!r}"


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.place)
def test_what_a_page_says_works(block: Block, folder: Path, smollm2: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        block.argv, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=280
    )
    expected = int(block.mark.removeprefix("run") or 0)
    said = f"{block.place} ended with {done.returncode}, not {expected}:\n{block.text}\n{done.stdout}\n{done.stderr}"
    assert done.returncode == expected, said
    assert expected == 0 or "hint: " in done.stderr, said


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"


def test_tests_that_the_readme_names_are_there() -> None:
    named = re.findall(r"`(tests/[\w/.]+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


def test_the_demos_questions_are_not_in_its_data() -> None:
    from orchestrator.demo import QUESTIONS

    data = (ROOT / "orchestrator" / "datasets" / "lighthouse.jsonl").read_text(encoding="utf-8").lower()
    assert not [question for question in QUESTIONS if question.lower() in data]


def test_every_exit_code_is_explained() -> None:
    from orchestrator.errors import ExitCode

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [code for code in ExitCode if f"\n| {int(code)} |" not in readme]
