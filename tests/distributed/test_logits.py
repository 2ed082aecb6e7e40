"""A Hugging Face folder read straight into shards computes what transformers computes, to 1e-4 (fp32)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.checkpoint.hf_reader import HfReader
from parallel.families import read_model
from parallel.shards import Box
from parallel.specs import read_hf_config
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


PLACES = {
    "llama": ("one", "tp3", "pp3"),
    "qwen2": ("one", "tp3", "pp3"),
    "qwen3": ("one", "tp2", "pp3", "tp2-pp2", "cp2-tp2-sp"),
    "mistral": ("one", "tp2-pp2", "cp2-tp2-sp"),
    "gemma2": ("one", "tp2-pp2", "cp2-tp2-sp"),
    "gemma3_text": ("one", "tp2-pp2", "cp2-tp2-sp"),
    "mixtral": ("one", "tp2-sp-ep2"),
    "qwen3_moe": ("one", "pp2", "tp2-sp", "tp2-sp-etp2", "tp2-sp-ep2", "tp3-sp"),
    "deepseek_v2": ("one", "tp2-sp-ep2", "cp2-tp2-sp", "pp2", "pp3", "tp2-sp-etp2"),
    "deepseek_v3": ("one", "pp2", "tp2-sp-etp2", "tp3-sp", "pp3", "tp2-sp-ep2"),
}
# What a cell of make test has as well: one process says nothing that two do not, against the same oracle.
FINER = {*((family, "one") for family in PLACES), ("qwen2", "pp3"), ("qwen3", "tp2"), ("qwen3_moe", "tp2-sp")}
FINER |= {("deepseek_v2", name) for name in ("pp2", "pp3", "tp2-sp-etp2")}
FINER |= {("deepseek_v3", name) for name in ("tp3-sp", "pp3", "tp2-sp-ep2")}


@pytest.mark.parametrize(
    ("family", "name"),
    [
        pytest.param(family, name, marks=[pytest.mark.grid] * ((family, name) in FINER))
        for family, names in PLACES.items()
        for name in names
    ],
)
def test_tiny_models(pool: Pool, tiny_model: Callable[..., Path], family: str, name: str) -> None:
    tokens = torch.randint(0, 101, (2, 12), generator=torch.Generator().manual_seed(1)).tolist()
    run = runs.Run(family, TOPOLOGIES[name], sp="-sp" in name)
    assert_same_logits(pool, tiny_model(family), run, tokens)


STRETCHED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", STRETCHED)
@pytest.mark.parametrize("name", ["one", "cp2"])
def test_stretched_rotary_embeddings(pool: Pool, tiny_model: Callable[..., Path], kind: str, name: str) -> None:
    changes = {"rope_scaling": STRETCHED[kind], "rope_theta": 100.0}
    run = runs.Run("llama", TOPOLOGIES[name], changes=tuple(changes.items()))
    assert_same_logits(pool, tiny_model("llama", **changes), run, [list(range(1, 65))])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_windows_from_a_layer_on(pool: Pool, tiny_model: Callable[..., Path], family: str) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    run = runs.Run(family, changes=tuple(changes.items()))
    assert_same_logits(pool, tiny_model(family, **changes), run, [list(range(1, 17))])


@pytest.mark.parametrize("family", runs.FAMILIES)
def test_weights_come_back_bit_for_bit(pool: Pool, tiny_model: Callable[..., Path], family: str) -> None:
    """Hugging Face folder -> shards of two stages, two tensor-parallel ranks each -> Hugging Face names."""
    folder = tiny_model(family)
    run = runs.Run(family, Topology(tp=2, pp=2), sp=True, full=True, steps=0)
    state = [pieces for _, _, pieces in pool.run(4, runs.train, run, str(folder))]
    found = {name: value for (name, kind), value in runs.merge(state).items() if kind == "weight"}
    stored = HfReader(folder)
    assert found.keys() == set(stored.names)
    for name, value in found.items():
        assert torch.equal(value, stored.read(name, "weight", Box.whole(stored.shape(name)))), name


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
    assert read_model(config).vocab == 49152
    theta = read_model(config).rope_theta
    changes = (*((key, value) for key, value in config.items() if key in runs.TINY), ("rope_theta", theta))
    run = runs.Run("llama", TOPOLOGIES[name], changes=changes)
    assert run.model == read_model(config)
    assert_same_logits(
        pool, smollm2, run, [[1, 9690, 198, 2683, 359, 253, 5356, 5646], [2, 260, 3575, 282, 4649, 314, 1, 4093]]
    )
