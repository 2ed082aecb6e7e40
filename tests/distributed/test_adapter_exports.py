"""Every adapter: trained here it says the same in peft, trained by peft the same here, and it goes on anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.export import export_adapter, export_merged
from parallel.topology import Topology
from tests.helpers import exported, peft_loop, runs
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

TOLERANCE = 1e-4
EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj")
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "pissa-dora-rslora": {"init": "pissa", "dora": True, "rslora": True, "targets": ("q_proj", "up_proj", "o_proj")},
    "modules-to-save": {"family": "qwen2", "modules_to_save": ("embed_tokens", "lm_head", "norm")},
    "output-layer": {"family": "qwen2", "targets": ("lm_head", "q_proj")},
    "pissa-output-layer": {"family": "qwen2", "init": "pissa", "targets": ("lm_head", "q_proj")},
    "embedding": {"family": "qwen2", "targets": ("embed_tokens", "q_proj")},
    "dora-ends": {"family": "qwen2", "dora": True, "targets": ("lm_head", "embed_tokens", "q_proj")},
    "pissa-dora-output-layer": {"family": "qwen2", "init": "pissa", "dora": True, "targets": ("lm_head",)},
    "deepseek": {
        "family": "deepseek_v3",
        "targets": ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", *EXPERTS),
    },
    "tied-embedding": {"modules_to_save": ("embed_tokens",)},
    "dora-rslora-bias": {"family": "qwen2", "dora": True, "rslora": True, "targets": ("q_proj", "up_proj", "o_proj")},
}
SUBSUMED = ("rslora", "pissa", "dora", "pissa-output-layer")  # by the kinds that hold several of them
STEPS, COMPLETED = 4, 2


def run_of(kind: str, **changes: Any) -> Run:
    return Run(**{"steps": STEPS, "learning_rate": 1e-2, **KINDS[kind], **changes})


def one(answers: list[Any]) -> torch.Tensor:
    """The logits of the ranks that have them; all equal."""
    found = [each for each in answers if each is not None]
    assert all(np.array_equal(each, found[0]) for each in found)
    return torch.from_numpy(found[0])


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.grid] * (kind in SUBSUMED)) for kind in KINDS])
def test_an_export_says_in_peft_what_it_says_here(
    pool: Pool, tiny_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """Trained on TP=2 (SP) x PP=2, exported both ways; then loaded back on TP=3 (qwen2: TP=2)."""
    run = run_of(kind, topology=Topology(tp=2, pp=2), sp=True)
    base = tiny_model(run.family)
    ours = one(pool.run(4, exported.train_and_save, run, str(base), str(tmp_path / "checkpoints")))
    checkpoint = tmp_path / "checkpoints" / f"step-{STEPS:06d}"
    export_adapter(checkpoint, tmp_path / "peft")
    theirs = exported.peft_logits(base, tmp_path / "peft")
    assert (theirs - exported.model_logits(base)).abs().max() > 0.1
    assert (theirs - ours).abs().max() <= TOLERANCE
    export_merged(checkpoint, base, tmp_path / "merged")
    assert (exported.model_logits(tmp_path / "merged") - ours).abs().max() <= TOLERANCE
    config = exported.config_of(tmp_path / "peft")
    assert (config["use_dora"], config["use_rslora"], config["init_lora_weights"]) == (run.dora, run.rslora, True)
    there = run.on(topology=Topology(tp=3), sp=run.model.is_moe)
    back = one(pool.run(3, exported.logits_of_adapter, there, str(base), str(tmp_path / "peft")))
    assert (back - ours).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["dora", "rslora", "modules-to-save", "dora-ends"])
def test_an_adapter_that_peft_trained_says_here_what_it_says_there(
    pool: Pool, tiny_model: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    run = run_of(kind, topology=Topology(tp=2))
    base = tiny_model(run.family)
    model, clock = peft_loop.make_model(run, base)
    peft_loop.train(run, model, clock)
    ends = {"save_embedding_layers": False} if "embed_tokens" in run.targets else {}  # PEFT would add the base's
    model.save_pretrained(tmp_path / "theirs", **ends)
    ours = one(pool.run(2, exported.logits_of_adapter, run, str(base), str(tmp_path / "theirs")))
    assert (ours - exported.peft_logits(base, tmp_path / "theirs")).abs().max() <= TOLERANCE


@pytest.mark.parametrize("kind", ["dora", "pissa", "tied-embedding"])
def test_a_checkpoint_goes_on_elsewhere(pool: Pool, tiny_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Saved on TP=2 (SP), gone on with on PP=2 x DP=2: the losses and the adapter of the uninterrupted run."""
    run = run_of(kind)
    base = tiny_model(run.family)
    whole = pool.run(1, runs.train, run, str(base))[0]
    before = run.on(topology=Topology(tp=2), sp=True, steps=COMPLETED)
    pool.run(2, exported.train_and_save, before, str(base), str(tmp_path))
    after = run.on(topology=Topology(pp=2, dp=2))
    checkpoint = str(tmp_path / f"step-{COMPLETED:06d}")
    found = pool.run(4, exported.go_on, after, str(base), checkpoint, COMPLETED)
    assert found[0][0] == pytest.approx(whole[0][COMPLETED:], rel=1e-5)
    reached, expected = runs.merge([state for _, state in found]), runs.merge([whole[2]])
    assert reached.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.linalg.vector_norm(reached[key] - value) <= 1e-4 * torch.linalg.vector_norm(value), key


def test_fault_6_dora_without_its_magnitudes_is_neither_written_nor_read(
    pool: Pool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Fault 6 of the design: DoRA without its magnitudes loads in peft without an error, and means something else."""
    from safetensors.torch import load_file, save_file

    from orchestrator.checkpoint.adapter import lora_pairs
    from orchestrator.checkpoint.hf_reader import AdapterReader
    from orchestrator.errors import ConfigError

    run = run_of("dora")
    base = tiny_model(run.family)
    ours = one(pool.run(1, exported.train_and_save, run, str(base), str(tmp_path / "checkpoints")))
    adapter = tmp_path / "peft"
    export_adapter(tmp_path / "checkpoints" / f"step-{STEPS:06d}", adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    magnitudes = [name for name in tensors if name.endswith(".lora_magnitude_vector")]
    assert exported.config_of(adapter)["use_dora"] is True and len(magnitudes) == run.model.layers * 7
    shutil.copytree(adapter, tmp_path / "lost")
    kept = {name: value for name, value in tensors.items() if name not in magnitudes}
    save_file(kept, tmp_path / "lost" / "adapter_model.safetensors")
    silent = exported.peft_logits(base, tmp_path / "lost")
    assert (silent - ours).abs().max() > 10 * TOLERANCE  # what the fault does to its victims
    with pytest.raises(ConfigError, match=r"has use_dora=True, but no .*lora_magnitude_vector"):
        lora_pairs(AdapterReader(tmp_path / "lost"), tmp_path / "lost")
