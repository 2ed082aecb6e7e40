"""GaLore: on every topology the run that the paper's formulas make in one process, also after a resume elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.galore_spec import GaloreSpec
from parallel.seeding import DropoutClock
from parallel.topology import Topology
from tests.helpers import peft_loop, runs
from tests.helpers.cells import in_grid
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

LOSS_RTOL, TENSOR_RTOL = 1e-5, 1e-4
GALORE = GaloreSpec(rank=4, update_steps=2)
PLACES: dict[str, dict[str, Any]] = {
    "one": {},
    "tp3": {"topology": Topology(tp=3)},
    "tp2-sp-pp2": {"topology": Topology(tp=2, pp=2), "sp": True},
    "tp2-dp2": {"topology": Topology(tp=2, dp=2)},
    "dp2-cp2": {"topology": Topology(dp=2, cp=2)},
    "pp2-vpp2": {"topology": Topology(pp=2), "vpp": 2},
}
FINER = ("one", "tp3", "tp2-dp2", "dp2-cp2", "pp2-vpp2")


class PaperGalore:
    """Algorithm 2 of arXiv:2403.03507 on the linears of a transformers model's layers, AdamW on the rest."""

    def __init__(self, model: Any, spec: GaloreSpec, rate: float) -> None:
        self.spec, self.rate, self.steps = spec, rate, 0
        named = dict(model.named_parameters())
        self.linears = {name: each for name, each in named.items() if ".layers." in name and each.dim() == 2}
        self.state = {name: {"m": 0.0, "v": 0.0} for name in self.linears}
        self.rest = torch.optim.AdamW(
            [each for name, each in named.items() if name not in self.linears], lr=rate, weight_decay=0.0
        )

    def zero_grad(self) -> None:
        for parameter in self.linears.values():
            parameter.grad = None
        self.rest.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        for name, weight in self.linears.items():
            gradient, state = weight.grad, self.state[name]
            assert gradient is not None
            from_left = self.spec.axis(tuple(weight.shape)) == 0  # type: ignore[arg-type]
            if self.steps % self.spec.update_steps == 0:
                left, _, right = torch.linalg.svd(gradient.double())  # in fp32 it would add rounding of its own
                basis = (left[:, : self.spec.rank] if from_left else right[: self.spec.rank].t()).float()
                state["P"] = basis * (torch.arange(1.0, len(basis) + 1) @ basis).sign()
            low = state["P"].t() @ gradient if from_left else gradient @ state["P"]
            state["m"] = 0.9 * state["m"] + 0.1 * low
            state["v"] = 0.999 * state["v"] + 0.001 * low**2
            unbiased = state["m"] / (1 - 0.9 ** (self.steps + 1)), state["v"] / (1 - 0.999 ** (self.steps + 1))
            update = unbiased[0] / (unbiased[1].sqrt() + 1e-8)
            weight -= self.rate * self.spec.scale * (state["P"] @ update if from_left else update @ state["P"].t())
        self.rest.step()
        self.steps += 1

    def tensors(self) -> dict[tuple[str, str], torch.Tensor]:
        """Projectors and moments as checkpoints have them: the projected side first."""
        found = {}
        for name, state in self.state.items():
            turned = self.spec.axis(tuple(self.linears[name].shape)) == 1  # type: ignore[arg-type]
            moments = {"exp_avg": state["m"], "exp_avg_sq": state["v"]}
            found[name, "projector"] = state["P"]
            found |= {(name, kind): value.t() if turned else value for kind, value in moments.items()}
        return found


@pytest.fixture(scope="module")
def oracle(tiny_model: Callable[..., Path]) -> Callable[[str, GaloreSpec], Any]:
    """Losses, norms and state of the paper's run, computed once per model and projection."""
    known: dict[Any, Any] = {}

    def of(family: str, spec: GaloreSpec) -> Any:
        if (family, spec) not in known:
            from transformers import AutoModelForCausalLM

            run = Run(family, full=True, steps=5, galore=spec)
            model = AutoModelForCausalLM.from_pretrained(tiny_model(family), dtype=torch.float32)
            optimizer = PaperGalore(model, spec, run.learning_rate)
            losses, norms = peft_loop.train(run, model, DropoutClock(run.seed, run.tokens), optimizer)
            weights = {(name, "weight"): value.detach() for name, value in model.named_parameters()}
            known[family, spec] = losses, norms, weights | optimizer.tensors()
        return known[family, spec]

    return of


def named(state: dict[tuple[str, str], torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"{name} {kind}": value for (name, kind), value in state.items()}


@pytest.mark.parametrize("place", in_grid(PLACES, FINER))
def test_training_is_the_papers(
    pool: Pool, tiny_model: Callable[..., Path], oracle: Callable[..., Any], place: str
) -> None:
    """Weights, projectors and moments of q, k and v, gate and up apart, in a model whose layers hold them fused."""
    family = "llama" if place == "tp3" else "qwen3"
    losses, norms, expected = oracle(family, GALORE)
    run = Run(family, full=True, steps=5, galore=GALORE, **PLACES[place])
    found = pool.run(run.topology.world_size, runs.train, run, str(tiny_model(family)))
    assert found[0][0] == pytest.approx(losses, rel=LOSS_RTOL)
    assert found[0][1] == pytest.approx(norms, rel=TENSOR_RTOL)
    state = runs.merge([state for _, _, state in found])  # which also checks that replicas are equal bit for bit
    peft_loop.assert_equal(named({key: state[key] for key in expected}), named(expected), TENSOR_RTOL)
    plain = {name for name, kind in state if kind == "exp_avg"} - {name for name, kind in state if kind == "projector"}
    assert {state[name, "exp_avg"].shape == state[name, "weight"].shape for name in plain} == {True}


@pytest.mark.parametrize(
    "projection", ["reverse_std", *(pytest.param(each, marks=pytest.mark.grid) for each in ("left", "right"))]
)
def test_either_side_is_projected_whichever_is_cut(
    pool: Pool, tiny_model: Callable[..., Path], oracle: Callable[..., Any], projection: str
) -> None:
    spec = GaloreSpec(rank=4, update_steps=2, projection=projection)
    losses, _, expected = oracle("qwen3", spec)
    run = Run("qwen3", full=True, steps=5, galore=spec, topology=Topology(tp=2))
    found = pool.run(2, runs.train, run, str(tiny_model("qwen3")))
    assert found[0][0] == pytest.approx(losses, rel=LOSS_RTOL)
    state = runs.merge([state for _, _, state in found])
    peft_loop.assert_equal(named({key: state[key] for key in expected}), named(expected), TENSOR_RTOL)


EXPERT_PLACES: dict[str, Topology] = {
    "dp2-ep2": Topology(dp=2, ep=2),
    "tp2-etp2": Topology(tp=2, etp=2),
    "dp4-ep2-etp2": Topology(dp=4, ep=2, etp=2),
}


@pytest.mark.parametrize("place", in_grid(EXPERT_PLACES, ("dp2-ep2", "tp2-etp2")))
def test_every_expert_has_a_subspace_of_its_own(pool: Pool, tiny_model: Callable[..., Path], place: str) -> None:
    """A rank of 6 is more than the router's 4 rows, of which one is rounding: no softmax knows a common shift."""
    folder = str(tiny_model("qwen3_moe"))
    run = Run("qwen3_moe", full=True, galore=GaloreSpec(rank=6, update_steps=2), eps=1e-6)
    (losses, _, one), *_ = pool.run(1, runs.train, run, folder)
    topology = EXPERT_PLACES[place]
    there = run.on(topology=topology, sp=topology.tp > 1)
    found = pool.run(topology.world_size, runs.train, there, folder)
    assert found[0][0] == pytest.approx(losses, rel=LOSS_RTOL)
    state, expected = runs.merge([state for _, _, state in found]), runs.merge([one])
    assert state["model.layers.1.mlp.experts.3.up_proj.weight", "projector"].shape == (32, 6)
    assert state["model.layers.1.mlp.gate.weight", "projector"].shape == (4, 4)
    weights = [{name: value for (name, kind), value in each.items() if kind == "weight"} for each in (state, expected)]
    peft_loop.assert_equal(*weights, TENSOR_RTOL)
    assert not state["model.layers.1.mlp.gate.weight", "projector"][:, 3].any()


def test_a_resume_elsewhere_is_the_uninterrupted_run(pool: Pool) -> None:
    """Between two choices of the subspace: the projector comes from the checkpoint."""
    run = Run("qwen3", full=True, steps=5, galore=GALORE)
    uninterrupted, _, end = pool.run(1, runs.train, run)[0]
    there = run.on(topology=Topology(tp=2, pp=2), sp=True, steps=3)
    state = runs.merge([state for _, _, state in pool.run(4, runs.train, there)])
    arrays = {key: value.numpy() for key, value in state.items()}
    found = pool.run(2, runs.go_on, run.on(topology=Topology(dp=2)), arrays, 3)
    assert found[0][0] == pytest.approx(uninterrupted[3:], rel=LOSS_RTOL)
    peft_loop.assert_equal(named(runs.merge([state for _, state in found])), named(runs.merge([end])), TENSOR_RTOL)


def test_masters_are_stepped_below_fp32(pool: Pool) -> None:
    """What is saved after two steps goes on to the same bits, and frozen weights have no state."""
    run = Run("llama", full=True, galore=GALORE, precision="bf16", topology=Topology(tp=2), freeze=("o_proj",))
    losses, _, _ = pool.run(2, runs.train, run)[0]
    state = runs.merge([state for _, _, state in pool.run(2, runs.train, run.on(steps=2))])
    kinds = {kind for name, kind in state if "layers.0.mlp.up_proj" in name}
    assert kinds == {"weight", "projector", "exp_avg", "exp_avg_sq", "master"}
    assert {kind for name, kind in state if "o_proj" in name} == {"weight"}
    found = pool.run(2, runs.go_on, run, {key: value.numpy() for key, value in state.items()}, 2)
    assert found[0][0] == losses[2:]
