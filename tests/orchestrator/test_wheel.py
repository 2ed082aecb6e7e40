"""The wheel is whole: configs, Slurm files and data travel with it, and it works from an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "parallel", "launch", "hydra_plugins")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy (setuptools leaves a build folder behind), and unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in (*PACKAGES, "configs", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", source)
    (source / "README.md").write_text("# isotrain\n")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def files_below(folder: Path, pattern: str = "*") -> set[str]:
    found = (file.relative_to(folder) for file in folder.rglob(pattern) if file.is_file())
    return {file.as_posix() for file in found if "__pycache__" not in file.parts}


def test_every_module_config_and_slurm_file_is_in_the_wheel(unpacked: Path) -> None:
    for name in PACKAGES:
        assert files_below(ROOT / name, "*.py") == files_below(unpacked / name, "*.py"), name
    assert files_below(ROOT / "orchestrator" / "pages") == files_below(unpacked / "orchestrator" / "pages")
    for name in ("configs", "slurm"):
        assert files_below(ROOT / name) == files_below(unpacked / "orchestrator" / name), name
    assert files_below(ROOT / "orchestrator" / "datasets") == files_below(unpacked / "orchestrator" / "datasets")


def run_unpacked(unpacked: Path, empty: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(unpacked), "ISOTRAIN_CACHE": str(empty / "cache")}
    empty.mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *words], cwd=empty, env=environment, capture_output=True, text=True
    )


def test_a_plan_is_made_from_an_empty_folder(unpacked: Path, tmp_path: Path) -> None:
    done = run_unpacked(unpacked, tmp_path / "empty", "plan", "experiment=demo", "--json")
    assert done.returncode == 0, done.stderr
    assert '"pp": 2' in done.stdout
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_unpacked_wheel_uses_its_own_files(unpacked: Path, tmp_path: Path) -> None:
    code = "from orchestrator.config.loading import config_root; print(config_root())"
    environment = os.environ | {"PYTHONPATH": str(unpacked)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(unpacked / "orchestrator" / "configs"), done.stderr
