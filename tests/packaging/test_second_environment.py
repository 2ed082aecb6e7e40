"""Who installs the wheel can work from an empty folder: a second environment in which this checkout does not exist."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.orchestrator.tiny_tokenizer import write_tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("orchestrator", "parallel", "launch", "hydra_plugins", "configs", "slurm", "pyproject.toml", "README.md")
SHIPPED += ("LICENSE",)
ROWS = 8


@dataclass(frozen=True)
class Installed:
    """The second environment and an empty folder to work in."""

    python: Path
    folder: Path

    def run(self, *words: str) -> str:
        """Run one of its commands in the empty folder; returns standard output."""
        hidden = ("PYTHONPATH", "ISOTRAIN_CACHE", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        argv = [str(self.python.parent / words[0]), *words[1:]]
        done = subprocess.run(argv, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout


def must_run(*words: str | Path) -> None:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel of a copy of this tree in a new environment; its dependencies are those of this one, by path.

    Path lines in a ``.pth`` file do not pull in other ``.pth`` files, so the editable install stays out of sight.
    """
    folder = tmp_path_factory.mktemp("second")
    source = folder / "source"
    source.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    must_run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source)
    must_run(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    site = subprocess.check_output([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True)
    Path(site.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    must_run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel)
    empty = folder / "empty"
    empty.mkdir()
    return Installed(python, empty)


def test_the_checkout_is_out_of_sight(installed: Installed) -> None:
    code = "import orchestrator, parallel, launch; print(orchestrator.__file__, parallel.__file__, launch.__file__)"
    for file in installed.run("python", "-c", code).split():
        assert Path(file).is_relative_to(installed.python.parents[1]), file


def test_a_plan_of_a_known_model_needs_no_files(installed: Installed) -> None:
    plan = json.loads(installed.run("isotrain", "plan", "model=smollm2_135m", "cluster=laptop", "--json"))
    assert plan["topology"]["pp"] * plan["topology"]["tp"] * plan["topology"]["dp"] <= 4
    assert list(installed.folder.iterdir()) == []


def test_a_run_of_one_step_on_the_shipped_data(
    installed: Installed, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama", vocab_size=270, max_position_embeddings=512), model)
    write_tokenizer(model)
    words = ("data=lighthouse", "cluster=one", "steps=1", f"batch.global_sequences={ROWS}", "run_dir=runs/one")
    installed.run("isotrain", "train", f"model.path={model}", *words)
    run_dir = installed.folder / "runs" / "one"
    (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == 1
    assert (run_dir / "checkpoints" / "step-000001" / "adapter" / "adapter_model.safetensors").is_file()
    installed.run("isotrain", "export", "runs/one", "--to", "peft", "adapter")
    assert (installed.folder / "adapter" / "adapter_config.json").is_file()
