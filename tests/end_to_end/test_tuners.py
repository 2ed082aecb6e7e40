"""A tuner's whole life by the commands alone: trained, gone on with on another topology, exported, loaded by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Folder, Shell, close, distance


@pytest.mark.grid
def test_dora_from_pissas_start_goes_on_elsewhere_and_is_what_peft_makes_of_it(
    shell: Shell, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = Folder(tmp_path / "run")
    words = tiny_run_model.words(tuner="dora", tuner__init="pissa", tuner__loraplus_lr_ratio=4, run_dir=run.path)
    shell.isotrain("train", *words)
    resumed = run.copied(tmp_path / "resumed", rewound_to=3)
    shell.isotrain("resume", str(resumed.path), "cluster=laptop", "topology.tp=3", "topology.sp=true", "topology.dp=1")
    assert close(run.losses, resumed.losses)
    file = Path("adapter/adapter_model.safetensors")
    assert distance(resumed.checkpoint(6) / file, run.checkpoint(6) / file) < 1e-5

    shell.isotrain("export", str(resumed.path), "--to", "peft", str(tmp_path / "adapter"))
    shell.isotrain("export", str(resumed.path), "--to", "merged", str(tmp_path / "merged"))

    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    tokens = torch.arange(24).reshape(2, 12)
    adapted = PeftModel.from_pretrained(load(tiny_run_model.model), str(tmp_path / "adapter"))
    with torch.no_grad():
        before, after, merged = (
            model(tokens).logits for model in (load(tiny_run_model.model), adapted, load(tmp_path / "merged"))
        )
    assert (after - merged).abs().max() <= 1e-4
    assert (after - before).abs().max() > 1e-2


@pytest.mark.grid
def test_galore_goes_on_elsewhere_between_two_subspaces(shell: Shell, tiny_run_model: TinyRun, tmp_path: Path) -> None:
    """Steps 4 to 6 are made with the subspace of step 1, which the checkpoint holds; megatron-core has none of it."""
    run = Folder(tmp_path / "run")
    settings = {"tuner": "full", "optimizer": "galore", "optimizer__galore__rank": 4, "tuner__r": None}
    words = tiny_run_model.words(**settings, tuner__alpha=None, optimizer__lr=0.001, run_dir=run.path)
    shell.isotrain("train", *words)
    resumed = run.copied(tmp_path / "resumed", rewound_to=3)
    shell.isotrain("resume", str(resumed.path), "cluster=laptop", "topology.tp=3", "topology.sp=true", "topology.dp=1")
    assert close(run.losses, resumed.losses)
    file = Path("model/model.safetensors")
    assert distance(resumed.checkpoint(6) / file, run.checkpoint(6) / file) < 1e-5
    said = shell.isotrain("export", str(run.path), "--to", "torch_dist", str(tmp_path / "out"))
    assert "weights only: its moments are those of projected gradients (GaLore)" in said.err
    refused = shell.isotrain("resume", str(run.path), "steps=8", "optimizer=adamw", code=64)
    assert "was trained with optimizer.name=galore; its checkpoint does not fit adamw" in refused.err
