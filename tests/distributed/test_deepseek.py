"""DeepSeek's own parts on every topology: latent attention, routers with groups and biases, shared experts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.tensor_parallel import mappings

from orchestrator.checkpoint.export import export_merged
from orchestrator.checkpoint.hf_reader import HfReader
from orchestrator.config.job import TunerConfig
from parallel.shards import Box
from parallel.topology import Topology
from tests.distributed.test_adapter_exports import one
from tests.distributed.test_balancing import rows
from tests.distributed.test_experts import distance
from tests.distributed.test_logits import assert_same_logits
from tests.distributed.test_parity import assert_same
from tests.distributed.test_peft_oracle import backward, weights
from tests.helpers import exported, runs
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

FINER = pytest.mark.grid
BIAS_NAME = "model.layers.2.mlp.gate.e_score_correction_bias"
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


@pytest.mark.parametrize("name", [pytest.param(name, marks=[FINER] * (at > 3)) for at, name in enumerate(VARIANTS)])
def test_variants_say_what_transformers_says(pool: Pool, tiny_model: Callable[..., Path], name: str) -> None:
    family, changes = VARIANTS[name]
    run = Run(family, changes=tuple(changes.items()))
    assert_same_logits(pool, tiny_model(family, **changes), run, [list(range(1, 65)), list(range(64, 0, -1))])


LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
EVERYTHING = (*LATENT, "gate_proj", "up_proj", "down_proj", "gate")
# gradients of adapters on queries are 1e-6 here: with Adam's eps of 1e-8 their rounding grows to 1e-4 of the update
RUNS = {
    "lora": Run("deepseek_v3", targets=EVERYTHING, eps=1e-5),
    "full": Run("deepseek_v3", full=True, learning_rate=1e-4),
    "v2-lora": Run("deepseek_v2", targets=("q_proj", *EVERYTHING[2:]), eps=1e-5),
    "v2-full": Run("deepseek_v2", full=True, learning_rate=1e-4),
    "dense-lora": Run("deepseek_v3", targets=LATENT, eps=1e-5, changes=tuple(DENSE.items())),
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
    "pp2-vpp2": {"topology": Topology(pp=2), "vpp": 2},
    "pp2-full": {"topology": Topology(pp=2), "recompute": "full"},
}


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("lora", "tp2-sp-pp2"),
        ("full", "tp2-sp-pp2"),
        ("v2-lora", "tp2-sp-ep2-dp2"),
        ("v2-full", "cp2-tp2-sp"),
        ("dense-full", "tp2"),
        *(
            pytest.param(*cell, marks=FINER)
            for cell in (
                *(("lora", name) for name in ("tp2-sp-ep2-dp2", "ep2-pp2-distributed", "cp2-tp2-sp")),
                *(("lora", name) for name in ("pp2-full", "pp2-selective")),
                ("dense-lora", "tp2"),
                *(
                    ("full", name)
                    for name in ("ep2-pp2-distributed", "tp2-sp-ep2-dp2", "cp2-ulysses", "pp2-full", "pp2-vpp2")
                ),
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


def losing_shares(run: Run, base: str) -> Any:
    """Train where each rank keeps its own heads' share of the gradient of the keys' rotary part."""
    from parallel.provider_latent import LatentSelfAttention

    def kept(self: Any, rotary: torch.Tensor) -> torch.Tensor:
        if not self.config.sequence_parallel:
            return rotary
        gathered: torch.Tensor = mappings.gather_from_sequence_parallel_region(
            rotary, tensor_parallel_output_grad=False, group=self.tp_group
        )
        return gathered

    with patch.object(LatentSelfAttention, "_for_all_heads", kept):
        return runs.train(run, base)


@pytest.mark.parametrize(("what", "name"), [("dense-full", "tp2"), ("dense-full", "tp2-sp")])
def test_a_share_of_the_rotary_gradient_is_not_enough(
    pool: Pool, tiny_model: Callable[..., Path], what: str, name: str
) -> None:
    """The trap of replicated down projections; without the sum replicas drift apart, or the run is another one."""
    run, there = RUNS[what], RUNS[what].on(**CELLS[name])
    base = str(tiny_model(run.family, **dict(run.changes)))
    expected = runs.merge([pool.run(1, runs.train, run, base)[0][2]])
    found = [state for _, _, state in pool.run(2, losing_shares, there, base)]
    try:
        spoilt = runs.merge(found)
    except AssertionError as error:
        assert str(error).startswith("replicas of model.layers.0.") and str(error).endswith(" differ")
        return
    assert distance(spoilt, expected) > 1e-2


def train_with_transformers(run: Run, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """An ordinary loop; after each step biases move by the counts of its positions up to the last label."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    gates = [layer.mlp.gate for layer in model.model.layers if hasattr(layer.mlp, "gate")]
    chosen: dict[int, torch.Tensor] = {}
    for number, gate in enumerate(gates):
        gate.register_forward_hook(lambda module, inputs, out, number=number: chosen.update({number: out[2]}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(run.steps):
        batch = runs.global_batch(run, step)
        labels = torch.stack([row[1] for row in batch])
        optimizer.zero_grad()
        losses.append(backward(run, step, model))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for number, gate in enumerate(gates):
            counts = torch.zeros(run.model.experts)
            for index, learned in zip(chosen[number].view(*labels.shape, -1), labels != -100, strict=True):
                for token in index[: int(learned.nonzero().max()) + 1]:
                    counts[token] += 1
            gate.e_score_correction_bias += run.bias_rate * (counts.mean() - counts).sign()
    return losses, {key: value for key, value in model.state_dict().items() if ".experts." not in key}


BIASED = Run("deepseek_v3", full=True, learning_rate=1e-4, bias_rate=0.05, rows=rows(12))


@pytest.fixture(scope="module")
def biased(pool: Pool, tiny_model: Callable[..., Path]) -> tuple[Run, Path, Any]:
    """The run, its model and what it is on one process."""
    folder = tiny_model("deepseek_v3")
    return BIASED, folder, pool.run(1, runs.train, BIASED, str(folder))[0]


def test_biases_move_by_what_the_whole_batch_chose(biased: tuple[Run, Path, Any]) -> None:
    run, folder, (losses, _, state) = biased
    expected, tensors = train_with_transformers(run, folder)
    assert losses == pytest.approx(expected, rel=1e-5)
    found = {name: value for name, value in weights([state]).items() if name in tensors}
    assert found.keys() == tensors.keys() and distance(found, tensors) <= 1e-4
    before = HfReader(folder).read(BIAS_NAME, "weight", Box((0,), (8,)))
    assert (found[BIAS_NAME] - before).abs().min() > 0.04


@pytest.mark.parametrize(
    "changes",
    [
        CELLS["tp2-sp-ep2-dp2"],
        {"topology": Topology(cp=2, pp=2), "recompute": "full", "tokens": 16, "rows": rows(16)},
    ],
    ids=["tp2-ep2-dp2", "cp2-pp2-recompute-padding"],
)
def test_no_cut_and_no_padding_changes_biases(
    pool: Pool, biased: tuple[Run, Path, Any], changes: dict[str, Any]
) -> None:
    run, folder, (losses, _, state) = biased
    there = run.on(**changes)
    found = pool.run(there.topology.world_size, runs.train, there, str(folder))
    assert found[0][0] == pytest.approx(losses, rel=1e-5)
    merged, expected = (weights(states) for states in ([each[2] for each in found], [state]))
    assert distance(merged, expected) <= 1e-4


def test_a_run_with_biases_goes_on_elsewhere(pool: Pool, biased: tuple[Run, Path, Any]) -> None:
    """Stopped on TP=2 (SP) after two of three steps, gone on with on PP=2 x DP=2: biases are part of the state."""
    run, folder, (losses, _, state) = biased
    there = run.on(steps=2, **CELLS["tp2-sp"])
    saved = runs.merge([part for _, _, part in pool.run(2, runs.train, there, str(folder))])
    arrays = {key: value.numpy() for key, value in saved.items()}
    found = pool.run(4, runs.go_on, run.on(topology=Topology(pp=2, dp=2)), arrays, 2)
    assert found[0][0] == pytest.approx(losses[2:], rel=1e-5)
    assert distance(weights([part for _, part in found]), weights([state])) <= 1e-4


def test_the_balancing_loss_takes_shares_of_sigmoids(pool: Pool, tiny_model: Callable[..., Path]) -> None:
    run = Run("deepseek_v3", full=True, learning_rate=1e-4, balancing_loss=0.5)
    assert_same(pool, run, run.on(**CELLS["tp2-sp-ep2-dp2"]), str(tiny_model("deepseek_v3")))


def test_layers_that_predict_further_tokens_are_left_out(
    pool: Pool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    """As transformers leaves them out: V3's files hold them as one more layer."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_model("deepseek_v3"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    further = {
        name.replace("layers.3.", "layers.4."): value.clone() for name, value in tensors.items() if "layers.3." in name
    }
    save_file({**tensors, **further}, folder / "model.safetensors", {"format": "pt"})
    run = Run("deepseek_v3", full=True, steps=0, changes=(("num_nextn_predict_layers", 1),))
    state = runs.merge([pool.run(1, runs.train, run, str(folder))[0][2]])
    assert {name for name, kind in state if kind == "weight"} == tensors.keys()
    assert_same_logits(pool, folder, run, [[5, 9, 3, 77]])


def test_a_full_run_is_what_transformers_loads_with_its_biases(
    pool: Pool, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    run = RUNS["full"].on(learning_rate=1e-3, bias_rate=0.05, topology=Topology(tp=2, pp=2), sp=True)
    base = tiny_model("deepseek_v3")
    ours = one(pool.run(4, train_full_and_save, run, str(base), str(tmp_path / "checkpoints")))
    export_merged(tmp_path / "checkpoints" / f"step-{run.steps:06d}", None, tmp_path / "merged")
    theirs = exported.model_logits(tmp_path / "merged")
    assert (theirs - ours).abs().max() <= 1e-4 and (theirs - exported.model_logits(base)).abs().max() > 0.01
    box = Box((0,), (8,))
    before, after = (HfReader(each).read(BIAS_NAME, "weight", box) for each in (base, tmp_path / "merged"))
    assert (after - before).abs().max() > 0.04


def train_full_and_save(run: Run, base: str, checkpoints: str) -> Any:
    with patch.object(exported, "tuner_of", lambda run: TunerConfig(name="full")):
        return exported.train_and_save(run, base, checkpoints)


def test_biases_stay_fp32_in_16_bits(pool: Pool, tiny_model: Callable[..., Path]) -> None:
    base = str(tiny_model("deepseek_v3"))
    wide, narrow = (
        pool.run(1, runs.train, RUNS["full"].on(precision=each, bias_rate=0.01), base)[0] for each in ("fp32", "bf16")
    )
    assert narrow[0] == pytest.approx(wide[0], rel=2e-2) and narrow[1] == pytest.approx(wide[1], rel=0.2)
    started = HfReader(Path(base)).read(BIAS_NAME, "weight", Box((0,), (8,)))
    moved = (weights([narrow[2]])[BIAS_NAME] - started) / 0.01
    assert (moved - moved.round()).abs().max() < 1e-3 and moved.abs().max() >= 1


@pytest.mark.parametrize("change", [{"dora": True, "dropout": 0.2}, pytest.param({"init": "pissa"}, marks=FINER)])
def test_other_adapters_of_attention_equal_one_process(
    pool: Pool, tiny_model: Callable[..., Path], change: dict[str, Any]
) -> None:
    run = Run("deepseek_v3", targets=LATENT, eps=1e-5, **change)
    assert_same(pool, run, run.on(**CELLS["tp2-sp-pp2"]), str(tiny_model("deepseek_v3")))
