"""DeepSeek's own parts on every topology: latent attention, routers with groups and biases, shared experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parallel.topology import Topology
from tests.distributed.test_logits import assert_same_logits
from tests.distributed.test_parity import assert_same
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

FINER = pytest.mark.grid
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 100.0}
DENSE = {"first_k_dense_replace": 4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v2-groups": ("deepseek_v2", {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}),
    "v2-latent-queries": ("deepseek_v2", {"q_lora_rank": 20, "routed_scaling_factor": 1.5}),
    "v2-yarn": ("deepseek_v2", {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}),
    "v2-yarn-apart": ("deepseek_v2", {"rope_scaling": {**YARN, "mscale": 0.9, "mscale_all_dim": 0.4}}),
    "v3-yarn-plain": ("deepseek_v3", {"rope_scaling": YARN}),
    "v3-halves": ("deepseek_v3", {"rope_interleave": False}),
    "v3-plain-queries": ("deepseek_v3", {"q_lora_rank": None, "norm_topk_prob": False}),
    "v3-one-group": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
    "v3-wide-values": ("deepseek_v3", {"v_head_dim": 32, "qk_nope_head_dim": 4}),
    "v3-dense": ("deepseek_v3", DENSE),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_say_what_transformers_says(pool: Pool, tiny_model: Callable[..., Path], name: str) -> None:
    family, changes = VARIANTS[name]
    run = Run(family, changes=tuple(changes.items()))
    assert_same_logits(pool, tiny_model(family, **changes), run, [list(range(1, 65)), list(range(64, 0, -1))])


LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
EVERYTHING = (*LATENT, "gate_proj", "up_proj", "down_proj", "gate")
RUNS = {
    "lora": Run("deepseek_v3", targets=EVERYTHING),
    "full": Run("deepseek_v3", full=True, learning_rate=1e-4),
    "v2-lora": Run("deepseek_v2", targets=("q_proj", *EVERYTHING[2:])),
    "v2-full": Run("deepseek_v2", full=True, learning_rate=1e-4),
    "dense-lora": Run("deepseek_v3", targets=LATENT, changes=tuple(DENSE.items())),
    "dense-full": Run("deepseek_v3", full=True, learning_rate=1e-4, changes=tuple(DENSE.items())),
}
CELLS: dict[str, dict[str, Any]] = {
    "tp2": {"topology": Topology(tp=2)},
    "tp2-sp": {"topology": Topology(tp=2), "sp": True},
    "tp2-sp-pp2": {"topology": Topology(tp=2, pp=2), "sp": True},
    "tp2-sp-ep2-dp2": {"topology": Topology(tp=2, dp=2, ep=2), "sp": True},
    "ep2-pp2-distributed": {"topology": Topology(pp=2, dp=2, ep=2), "distributed": True},
    "cp2-tp2-sp": {"topology": Topology(cp=2, tp=2), "sp": True},
    "cp2-ulysses": {"topology": Topology(cp=2), "cp_comm": "ulysses"},
    "pp2-selective": {"topology": Topology(pp=2), "recompute": "selective"},
    "pp2-full": {"topology": Topology(pp=2), "recompute": "full"},
}


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("lora", "tp2-sp-pp2"),
        ("full", "tp2-sp-pp2"),
        ("v2-lora", "tp2-sp-ep2-dp2"),
        ("v2-full", "cp2-tp2-sp"),
        ("full", "ep2-pp2-distributed"),
        ("dense-lora", "tp2"),
        ("dense-full", "tp2"),
        ("lora", "pp2-selective"),
        *(
            pytest.param(*cell, marks=FINER)
            for cell in (
                *(("lora", name) for name in ("tp2-sp-ep2-dp2", "ep2-pp2-distributed", "cp2-tp2-sp", "pp2-full")),
                *(("full", name) for name in ("tp2-sp-ep2-dp2", "cp2-ulysses", "pp2-full")),
                *(("v2-lora", name) for name in ("tp2-sp-pp2", "cp2-ulysses")),
                *(("v2-full", name) for name in ("tp2-sp-pp2", "ep2-pp2-distributed")),
                *(("dense-full", name) for name in ("tp2-sp", "cp2-tp2-sp")),
            )
        ),
    ],
)
def test_a_run_equals_one_process(pool: Pool, tiny_model: Callable[..., Path], what: str, name: str) -> None:
    """From weights that attend and route sharply, as those of families with windows."""
    run = RUNS[what]
    assert_same(pool, run, run.on(**CELLS[name]), str(tiny_model(run.family, **dict(run.changes))))
