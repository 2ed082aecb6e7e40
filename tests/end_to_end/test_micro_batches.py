"""Memory runs out on one rank of a real run: all go on with smaller micro-batches, and the run is the same."""

from __future__ import annotations

import json
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import ROOT, Folder, Shell, close

NO_MEMORY = """
    import importlib.abc, importlib.util, os, sys

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name != "parallel.engines.megatron":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module

            def planted(module):
                execute(module)
                step = module.MegatronEngine.train_step

                def train_step(self, microbatches, *more):
                    if os.environ.get("RANK") == "1" and len(microbatches[0].sample_ids) > 1:
                        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")
                    return step(self, microbatches, *more)

                module.MegatronEngine.train_step = train_step

            spec.loader.exec_module = planted
            return spec

    sys.meta_path.insert(0, Finder())
"""


@dataclass(frozen=True)
class SmallShell(Shell):
    """A shell whose rank 1 has no memory for two rows at once."""

    @property
    def environment(self) -> dict[str, str]:
        return super().environment | {"PYTHONPATH": f"{self.folder}:{ROOT}"}


@pytest.fixture
def small_shell(shell: Shell, tmp_path: Path) -> SmallShell:
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(NO_MEMORY))
    return SmallShell(tmp_path, shell.cache)


def test_out_of_memory_on_one_rank_goes_on_with_smaller_micro_batches(
    small_shell: SmallShell, tiny_run_model: TinyRun, uninterrupted: Folder
) -> None:
    run = Folder(small_shell.folder / "run")
    words = tiny_run_model.words(cluster="laptop", topology__pp=2, run_dir=run.path, batch__micro_sequences="auto")
    done = small_shell.isotrain("train", *words)
    assert "can't allocate memory" in done.err and "with batch.micro_sequences=1" in done.err
    assert close(run.losses, uninterrupted.losses)
    assert json.loads((run.path / "micro_batches.json").read_text()) == {"rows": 1, "settled": True}
    shown = small_shell.isotrain("train", *tiny_run_model.words(run_dir=run.path, cluster="laptop", topology__pp=2))
    assert "is finished: 6 of 6 steps" in shown.err  # it is the same job
