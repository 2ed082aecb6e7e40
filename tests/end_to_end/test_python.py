"""From Python: the same in three lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import ROOT, Folder, Shell

PROGRAM = """
import sys
from orchestrator import compose_job, export, plan_job, train
words = sys.argv[2:]
assert plan_job(compose_job(words)).plan.ranks_used == 1
finished = train(words)
print(finished.code, finished.step, export(finished.run_dir, "peft", __import__("pathlib").Path(sys.argv[1])))
"""


def test_plan_train_and_export_are_functions(shell: Shell, tiny_run_model: TinyRun, tmp_path: Path) -> None:
    run = Folder(tmp_path / "run")
    words = tiny_run_model.words(steps=1, run_dir=run.path, metrics__progress="false")
    done = shell.run([sys.executable, "-c", PROGRAM, str(tmp_path / "out"), *words])
    assert done.out == f"0 1 {tmp_path / 'out'}\n" and "step 1/1" not in done.err
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert run.steps == [1]


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, orchestrator; print(sorted({'torch', 'hydra', 'megatron', 'yaml'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
