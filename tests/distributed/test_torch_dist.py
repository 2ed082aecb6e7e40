"""torch_dist checkpoints go both ways bit for bit: megatron-core's own model writes them, and reads ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.cli import main
from orchestrator.convert import convert
from parallel.families import read_model
from parallel.specs import read_hf_config
from parallel.topology import Topology
from tests.helpers import megatron_own
from tests.helpers.exported import hf_weights
from tests.helpers.pool import Pool

FINER = [
    ("qwen3", {}, Topology(pp=4), "stacked", 101),
    ("qwen3", {}, Topology(tp=2, dp=2), "numbered", 104),
    ("llama", {"tie_word_embeddings": False}, Topology(tp=3), "numbered", 102),
    ("qwen3_moe", {}, Topology(dp=4, ep=4), "numbered", 101),
    ("qwen3_moe", {}, Topology(tp=2, pp=2), "numbered", 128),
]
CELLS = [
    ("llama", {"num_key_value_heads": 2}, Topology(tp=2, pp=2), "stacked", 128),
    ("qwen2", {"num_key_value_heads": 2}, Topology(tp=2, pp=2), "numbered", 102),
    ("qwen3_moe", {}, Topology(tp=2, dp=2, ep=2, etp=2), "stacked", 102),
    *(pytest.param(*cell, marks=pytest.mark.grid) for cell in FINER),
]


@pytest.mark.parametrize(("family", "changes", "topology", "style", "vocab"), CELLS)
def test_what_megatron_core_writes_comes_in_bit_for_bit(
    pool: Pool, tiny_model: Any, tmp_path: Path, family: str, changes: Any, topology: Topology, style: str, vocab: int
) -> None:
    hf = tiny_model(family, **changes)
    saved = tmp_path / "saved/iter_0000007"
    saved.mkdir(parents=True)
    (tmp_path / "saved/latest_checkpointed_iteration.txt").write_text("7")
    spec = read_model(read_hf_config(hf))
    pool.run(topology.world_size, megatron_own.save, spec, hf, saved, topology, style, vocab)
    words = ["convert", str(tmp_path / "saved"), str(tmp_path / "hf"), "--model", str(hf)]
    assert main(words) == 0
    theirs, ours = hf_weights(hf), hf_weights(tmp_path / "hf")
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    ("family", "changes", "topology", "vocab"),
    [
        pytest.param("llama", {"num_key_value_heads": 2}, Topology(), 101, marks=pytest.mark.grid),
        ("qwen2", {"num_key_value_heads": 2}, Topology(tp=2, pp=2), 128),
        ("qwen3_moe", {}, Topology(tp=2, dp=2, ep=2, etp=2), 102),
    ],
    ids=["llama", "qwen2", "qwen3_moe"],
)
def test_megatron_core_loads_what_we_export(
    pool: Pool, tiny_model: Any, tmp_path: Path, family: str, changes: Any, topology: Topology, vocab: int
) -> None:
    hf = tiny_model(family, **changes)
    assert main(["export", str(hf), "--to", "torch_dist", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/latest_checkpointed_iteration.txt").read_text() == "release\n"
    spec = read_model(read_hf_config(hf))
    results = pool.run(topology.world_size, megatron_own.differing, spec, hf, tmp_path / "out/release", topology, vocab)
    assert all(count > 5 and not wrong for count, wrong in results), results
    assert convert(tmp_path / "out", tmp_path / "back", model=str(hf)) == "torch_dist"
    theirs, ours = hf_weights(hf), hf_weights(tmp_path / "back")
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((hf / "config.json").read_text())
