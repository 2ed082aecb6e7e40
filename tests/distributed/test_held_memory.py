"""The planner's bytes against what ranks really hold: weights, gradients, optimizer, and saved tensors at their peak.

The oracle is torch: storages of parameters and buffers, and what autograd's hooks see it keep. Ranks of a stage may
hold different experts, whose tokens differ; the planner deals them out evenly, so their mean is compared.
"""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from parallel.topology import Topology
from tests.helpers.held_memory import held, predicted
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

TOLERANCE = 0.03
ENDS = ("lm_head", "embed_tokens", "q_proj")
CELLS = {
    "lora": Run(),
    "dora": Run(dora=True),
    "experts-full": Run("mixtral", full=True),
    "lora-recomputed": Run(recompute="full"),
    "full-pp2": Run(topology=Topology(pp=2), full=True),
    "lora-tp2-sp": Run(topology=Topology(tp=2), sp=True),
    "dora-ends-tp2-sp": Run("qwen2", topology=Topology(tp=2), sp=True, dora=True, targets=ENDS),
    "full-dp2-distributed-bf16": Run(topology=Topology(dp=2), distributed=True, full=True, precision="bf16"),
}
FINER = {
    "full": Run(full=True),
    "lora-bf16": Run(precision="bf16"),
    "pissa": Run(init="pissa"),
    "lora-ends": Run("qwen2", targets=ENDS),
    "dora-ends-bf16": Run("qwen2", dora=True, targets=ENDS, precision="bf16"),
    "attention-only": Run(targets=("q_proj", "v_proj")),
    "embedding-learns": Run(modules_to_save=("embed_tokens",)),
    "embedding-learns-bf16": Run(modules_to_save=("embed_tokens",), precision="bf16"),
    "norms-on-heads": Run("qwen3"),
    "windows": Run("mistral"),
    "gemma2": Run("gemma2"),
    "gemma3": Run("gemma3_text", full=True),
    "latent-lora": Run("deepseek_v2"),
    "latent-full": Run("deepseek_v3", full=True),
    "latent-selective": Run("deepseek_v3", full=True, recompute="selective"),
    "latent-full-tp2-sp": Run("deepseek_v3", topology=Topology(tp=2), sp=True, full=True),
    "latent-lora-tp2-sp": Run("deepseek_v3", topology=Topology(tp=2), sp=True),
    "latent-full-cp2": Run("deepseek_v2", topology=Topology(cp=2), full=True),
    "experts-lora": Run("qwen3_moe", targets=r".*(self_attn|experts).*"),
    "experts-dora": Run("qwen3_moe", targets=r".*(self_attn|experts).*", dora=True),
    "full-recomputed": Run(full=True, recompute="full"),
    "lora-selective": Run(recompute="selective"),
    "full-selective": Run(recompute="selective", full=True),
    "lora-tp2": Run(topology=Topology(tp=2)),
    "full-tp2": Run(topology=Topology(tp=2), full=True),
    "full-tp2-sp": Run(topology=Topology(tp=2), sp=True, full=True),
    "dora-tp2-sp": Run(topology=Topology(tp=2), sp=True, dora=True),
    "experts-tp2-sp": Run("mixtral", topology=Topology(tp=2), sp=True, full=True),
    "experts-etp2": Run("mixtral", topology=Topology(tp=2, etp=2), sp=True, full=True),
    "lora-pp2": Run(topology=Topology(pp=2)),
    "lora-pp2-vpp2": Run(topology=Topology(pp=2), vpp=2),
    "full-pp2-vpp2": Run(topology=Topology(pp=2), vpp=2, full=True),
    "lora-cp2": Run(topology=Topology(cp=2)),
    "full-cp2-ulysses": Run(topology=Topology(cp=2), cp_comm="ulysses", full=True),
    "experts-ep2": Run("mixtral", topology=Topology(dp=2, ep=2)),
    "experts-full-ep2": Run("mixtral", topology=Topology(dp=2, ep=2), full=True),
    "lora-dp2-distributed": Run(topology=Topology(dp=2), distributed=True),
}


@pytest.mark.parametrize("name", [*CELLS, *(pytest.param(name, marks=pytest.mark.grid) for name in FINER)])
def test_a_rank_holds_what_the_plan_says(pool: Pool, name: str) -> None:
    longer = {"tokens": 128, "changes": (("max_position_embeddings", 128),)}
    run = replace((CELLS | FINER)[name], **longer)  # type: ignore[arg-type]
    ranks = [one for one in pool.run(run.topology.world_size, held, run) if one is not None]
    for stage, memory in enumerate(predicted(run)):
        owners = asdict(memory)
        owners["weights"] += owners["adapters"]
        here = [measured for place, measured in ranks if place == stage]
        for owner in here[0]:
            mean = sum(measured[owner] for measured in here) / len(here)
            assert owners[owner] == pytest.approx(mean, rel=TOLERANCE), f"{owner} of stage {stage}"


def test_what_is_measured_is_what_a_known_graph_keeps() -> None:
    import torch

    from tests.helpers.held_memory import SavedTensors, unpack

    weight = torch.ones(10, 10, requires_grad=True)
    saved = SavedTensors(frozenset({weight.untyped_storage().data_ptr()}))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, unpack):
        half = torch.ones(6, 10)[:3]  # of which autograd keeps the whole storage, once
        out = (half @ weight).exp() + half @ weight
        assert saved.bytes == saved.peak == 6 * 10 * 4 + 3 * 10 * 4
        out.sum().backward()
    assert (saved.bytes, saved.peak) == (0, 360)
