"""A Hugging Face folder read straight into shards computes what transformers computes, to 1e-4 (fp32)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.specs import ModelSpec, read_hf_config
from parallel.topology import Topology
from tests.helpers import runs
from tests.helpers.pool import Pool

TOLERANCE = 1e-4
TOPOLOGIES = {
    "one": Topology(),
    "tp2": Topology(tp=2),
    "tp3": Topology(tp=3),
    "pp2": Topology(pp=2),
    "pp3": Topology(pp=3),
    "tp2-pp2": Topology(tp=2, pp=2),
    "cp2": Topology(cp=2),
    "cp2-tp2-sp": Topology(cp=2, tp=2),
    "tp2-sp": Topology(tp=2),
    "tp3-sp": Topology(tp=3),
    "tp2-sp-etp2": Topology(tp=2, etp=2),
    "tp2-sp-ep2": Topology(tp=2, ep=2),
}


def oracle(folder: Path, tokens: list[list[int]]) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def assert_same_logits(pool: Pool, folder: Path, run: runs.Run, tokens: list[list[int]]) -> None:
    found = [
        each for each in pool.run(run.topology.world_size, runs.logits, run, str(folder), tokens) if each is not None
    ]
    assert len(found) == run.topology.tp * run.topology.cp
    expected = oracle(folder, tokens)
    for logits in found:
        assert logits.shape == expected.shape
        assert np.abs(logits - expected).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *((family, name) for family in ("llama", "qwen2") for name in ("one", "tp3", "pp3")),
        *(("qwen3", name) for name in ("one", "tp2", "pp3", "tp2-pp2", "cp2-tp2-sp")),
        *(("qwen3_moe", name) for name in ("one", "pp2", "tp2-sp", "tp2-sp-etp2", "tp2-sp-ep2", "tp3-sp")),
    ],
)
def test_tiny_models(pool: Pool, tiny_model: Callable[..., Path], family: str, name: str) -> None:
    tokens = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(1)).tolist()
    run = runs.Run(family, TOPOLOGIES[name], sp="-sp" in name)
    assert_same_logits(pool, tiny_model(family), run, tokens)


@pytest.mark.parametrize("changes", [{"norm_topk_prob": False}])
def test_expert_weights_not_normalised(pool: Pool, tiny_model: Callable[..., Path], changes: dict[str, bool]) -> None:
    run = runs.Run("qwen3_moe", changes=tuple(changes.items()))
    assert_same_logits(pool, tiny_model("qwen3_moe", **changes), run, [[5, 9, 3, 77]])


def test_padded_vocabulary_and_untied_head(pool: Pool, tiny_model: Callable[..., Path]) -> None:
    """101 entries over 3 ranks: one row of padding, which must be no logit."""
    changes = {"tie_word_embeddings": False, "vocab_size": 100}
    run = runs.Run("llama", Topology(tp=3), changes=tuple(changes.items()))
    assert_same_logits(pool, tiny_model("llama", **changes), run, [[5, 9, 3, 99]])


@pytest.mark.parametrize("name", ["one", "tp3", "pp2", "pp3", "cp2"])
def test_smollm2(pool: Pool, smollm2: Path, name: str) -> None:
    config = read_hf_config(smollm2)
    assert ModelSpec.from_hf(config).vocab == 49152
    theta = ModelSpec.from_hf(config).rope_theta
    changes = (*((key, value) for key, value in config.items() if key in runs.TINY), ("rope_theta", theta))
    run = runs.Run("llama", TOPOLOGIES[name], changes=changes)
    assert run.model == ModelSpec.from_hf(config)
    assert_same_logits(
        pool, smollm2, run, [[1, 9690, 198, 2683, 359, 253, 5356, 5646], [2, 260, 3575, 282, 4649, 314, 1, 4093]]
    )
