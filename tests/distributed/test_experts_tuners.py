"""DoRA, PiSSA and an NF4 base on experts and routers: what PEFT has no place for is held against the formulas.

The oracle is transformers' model, whose weights are put in at each step as the tuner's definition makes them: for
every logical expert ``W + s (B A - B0 A0)``, its rows stretched to the magnitudes; of an NF4 base the dequantised W.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.func import functional_call

from orchestrator.checkpoint.experts import weight_places
from orchestrator.checkpoint.export import export_adapter, export_merged
from orchestrator.errors import ConfigError
from orchestrator.generate import generate
from parallel import nf4
from parallel.seeding import DropoutClock
from parallel.topology import Topology
from tests.helpers import exported, peft_loop, runs
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

R, SCALE, PREFIX = 4, 2.0, "base_model.model."
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2}
SHAPE |= {"moe_intermediate_size": 128}
TARGETS = ("q_proj", "o_proj", "gate", "gate_proj", "up_proj", "down_proj")
CASES: dict[str, dict[str, Any]] = {
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "dora-pissa": {"dora": True, "init": "pissa"},
    "nf4": {"quantise": "nf4"},
    "dora-nf4": {"quantise": "nf4", "dora": True},
}
PLACES: dict[str, dict[str, Any]] = {
    "one": {},
    "dp2-ep2": {"topology": Topology(dp=2, ep=2)},
    "dp2-etp2": {"topology": Topology(dp=2, etp=2)},
    "tp2-dp2-ep2-etp2": {"topology": Topology(tp=2, dp=2, ep=2, etp=2), "sp": True},
    "cp2-ep2": {"topology": Topology(cp=2, ep=2)},
    "pp2-dp2-ep2": {"topology": Topology(pp=2, dp=2, ep=2), "recompute": "full"},
}
EVERYWHERE = "tp2-dp2-ep2-etp2"
QUICK = [("dora", EVERYWHERE), ("dora-pissa", EVERYWHERE), ("nf4", "pp2-dp2-ep2")]
FINER = [
    *((case, place) for case in ("dora", "nf4") for place in PLACES if (case, place) not in QUICK),
    *(("pissa", EVERYWHERE), ("pissa", "pp2-dp2-ep2"), ("dora-nf4", EVERYWHERE)),
]


def run_of(case: str, **where: Any) -> Run:
    return Run("qwen3_moe", targets=TARGETS, changes=tuple(SHAPE.items()), eps=1e-6, **CASES[case], **where)


class Merged:
    """Transformers' model with an adapter put into its weights anew at each call; :attr:`learns` are the adapter's."""

    def __init__(self, run: Run, folder: Path, start: dict[str, torch.Tensor]) -> None:
        from transformers import AutoModelForCausalLM

        self.run = run
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.fixed: dict[str, torch.Tensor] = {}
        self.learns: dict[str, torch.Tensor] = {}
        for name, value in start.items():
            rank = 1 if name.endswith("lora_B.weight") else 0
            if run.init == "pissa" and value.dim() == 2:
                value, self.fixed[name] = (half.clone() for half in value.chunk(2, dim=rank))
            self.learns[name] = value.clone().requires_grad_()

    def __call__(self, tokens: torch.Tensor) -> Any:
        return functional_call(self.model, {name: self.weight(name) for name, _ in self.parameters()}, (tokens,))

    def parameters(self) -> list[tuple[str, torch.Tensor]]:
        """What of the model is not as it was."""
        quantised = "proj" if self.run.quantise else "-"
        names = {name.split(".lora_")[0].removeprefix(PREFIX) for name in self.learns}
        return [
            (name, each.detach())
            for name, each in self.model.named_parameters()
            if name.removesuffix(".weight") in names or ".mlp.experts." in name or quantised in name
        ]

    def weight(self, name: str) -> torch.Tensor:
        whole = self.model.get_parameter(name).detach()
        module = name.removesuffix(".weight")
        if ".mlp.experts." not in name:
            return self.logical(module, whole, "proj" in name)
        stem, leaf = module.rsplit(".", 1)
        parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
        experts = [
            torch.cat(
                [
                    self.logical(f"{stem}.{number}.{part}", rows, True)
                    for part, rows in zip(parts, expert.chunk(len(parts)), strict=True)
                ]
            )
            for number, expert in enumerate(whole)
        ]
        return torch.stack(experts)

    def logical(self, module: str, weight: torch.Tensor, is_linear: bool) -> torch.Tensor:
        weight = nf4.round_trip(weight) if self.run.quantise and is_linear else weight
        a, b, length = (
            f"{PREFIX}{module}.{name}" for name in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        if a not in self.learns:
            return weight
        changed = weight + SCALE * (self.learns[b] @ self.learns[a])
        if a in self.fixed:
            changed = changed + SCALE * (self.fixed[b] @ self.fixed[a])
        if length in self.learns:
            changed = changed * (self.learns[length] / changed.detach().norm(dim=1))[:, None]
        return changed

    def train(self) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
        clock = DropoutClock(self.run.seed, self.run.tokens)
        trained = list(self.learns.values())
        optimizer = torch.optim.AdamW(trained, lr=self.run.learning_rate, weight_decay=0.0, eps=self.run.eps)
        losses, norms = [], []
        for step in range(self.run.steps):
            optimizer.zero_grad()
            losses.append(peft_loop.backward(self.run, step, self, clock))
            norms.append(float(torch.nn.utils.clip_grad_norm_(trained, 1.0)))
            optimizer.step()
        joined = {name: value.detach() for name, value in self.learns.items()}
        for name, value in self.fixed.items():
            joined[name] = torch.cat([joined[name], value], dim=1 if name.endswith("lora_B.weight") else 0)
        return losses, norms, joined


def weights(states: list[list[tuple[Any, ...]]]) -> dict[str, torch.Tensor]:
    return {name: value for (name, kind), value in runs.merge(states).items() if kind == "weight"}


@pytest.fixture(scope="module")
def oracle(pool: Pool, tiny_model: Callable[..., Path]) -> Callable[[str], Any]:
    """Losses, norms and adapter of a case by the formulas, from the start that one process of ours has."""
    known: dict[str, Any] = {}

    def of(case: str) -> Any:
        if case not in known:
            folder = tiny_model("qwen3_moe", **SHAPE)
            run = run_of(case)
            start = weights([pool.run(1, runs.train, run.on(steps=0), str(folder))[0][2]])
            if run.init == "pissa":  # is computed when a step needs it
                start = weights([pool.run(1, started, run, str(folder))[0]])
            known[case] = Merged(run, folder, start).train()
        return known[case]

    return of


def started(run: Run, folder: str) -> list[tuple[Any, ...]]:
    engine, groups = runs.open_engine(run, folder)
    engine.evaluate(runs.microbatches(run, 0, 0))
    state = runs.pieces(engine)
    groups.close()
    return state


@pytest.mark.parametrize(("case", "place"), [*QUICK, *(pytest.param(*cell, marks=pytest.mark.grid) for cell in FINER)])
def test_training_is_the_formulas(
    pool: Pool, tiny_model: Callable[..., Path], oracle: Callable[[str], Any], case: str, place: str
) -> None:
    losses, norms, adapter = oracle(case)
    run = run_of(case, **PLACES[place])
    found = pool.run(run.topology.world_size, runs.train, run, str(tiny_model("qwen3_moe", **SHAPE)))
    assert found[0][0] == pytest.approx(losses, rel=1e-5)
    assert found[0][1] == pytest.approx(norms, rel=1e-4)
    peft_loop.assert_equal(weights([state for _, _, state in found]), adapter)


@pytest.mark.parametrize(
    ("case", "place"),
    [
        ("dora", EVERYWHERE),
        *(pytest.param("lora", place, marks=pytest.mark.grid) for place in PLACES if place != "one"),
    ],
)
def test_dropout_on_experts_belongs_to_the_token(
    pool: Pool, tiny_model: Callable[..., Path], one_process: Callable[[str], Any], case: str, place: str
) -> None:
    """Whichever rank an expert's tokens come to, and in whatever order; it is no dropout of zeros either."""
    losses, norms, adapter, without = one_process(case)
    assert all(abs(one - other) > 1e-4 for one, other in zip(losses[1:], without[1:], strict=True))
    run = dropping(case, **PLACES[place])
    found = pool.run(run.topology.world_size, runs.train, run, str(tiny_model("qwen3_moe", **SHAPE)))
    assert found[0][0] == pytest.approx(losses, rel=1e-5)
    assert found[0][1] == pytest.approx(norms, rel=1e-4)
    peft_loop.assert_equal(weights([state for _, _, state in found]), adapter)


def dropping(case: str, **where: Any) -> Run:
    changes = tuple(SHAPE.items())
    dora, settings = case == "dora", {"learning_rate": 1e-2, "dropout": 0.3}
    return Run("qwen3_moe", targets=TARGETS, changes=changes, eps=1e-6, dora=dora, **settings, **where)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def one_process(pool: Pool, tiny_model: Callable[..., Path]) -> Callable[[str], Any]:
    """Losses, norms and adapter of one process with dropout, and the losses without."""
    known: dict[str, Any] = {}

    def of(case: str) -> Any:
        if case not in known:
            folder, run = str(tiny_model("qwen3_moe", **SHAPE)), dropping(case)
            losses, norms, state = pool.run(1, runs.train, run, folder)[0]
            known[case] = losses, norms, weights([state]), pool.run(1, runs.train, run.on(dropout=0.0), folder)[0][0]
        return known[case]

    return of


def with_joined_experts(folder: Path, out: Path) -> Path:
    """A copy of a model in whose file a layer's experts are one tensor, as transformers 5 holds them."""
    tensors = load_file(folder / "model.safetensors")
    apart = {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
    for layer in range(SHAPE["num_hidden_layers"]):
        stem = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([apart[f"{stem}.{number}.{part}.weight"] for number in range(4)])
            for part in ("gate_proj", "up_proj", "down_proj")
        )
        tensors |= {f"{stem}.gate_up_proj": torch.cat([gate, up], dim=1), f"{stem}.down_proj": down}
    out.mkdir()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


def assert_same_weights(joined: Path, apart: Path) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (joined, apart))
    for key, value in one.items():
        for name, place in weight_places(key, tuple(value.shape)):
            assert torch.allclose(value[place.slices][0], other[name], atol=1e-6), name


@pytest.mark.parametrize("case", [pytest.param("dora", marks=pytest.mark.grid), "dora-nf4", "pissa"])
def test_an_export_says_in_transformers_what_it_says_here(
    pool: Pool, tiny_model: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    """Merged; as an adapter of PEFT only where it has a place for all of it, which the checkpoint says to PEFT too."""
    from peft import PeftConfig

    folder = tiny_model("qwen3_moe", **SHAPE)
    run = run_of(case, **PLACES[EVERYWHERE]).on(learning_rate=1e-2)
    found = pool.run(4, exported.train_and_save, run, str(folder), str(tmp_path / "checkpoints"))
    ours = torch.from_numpy(next(each for each in found if each is not None))
    checkpoint = tmp_path / "checkpoints" / f"step-{run.steps:06d}"
    export_merged(checkpoint, folder, tmp_path / "merged")
    assert (exported.model_logits(tmp_path / "merged") - ours).abs().max() <= 1e-4
    assert (exported.model_logits(folder) - ours).abs().max() > 1e-2
    joined = with_joined_experts(folder, tmp_path / "joined")
    export_merged(checkpoint, joined, tmp_path / "merged-joined")
    assert_same_weights(tmp_path / "merged-joined", tmp_path / "merged")
    if not run.dora:
        export_adapter(checkpoint, tmp_path / "peft")
        assert (exported.peft_logits(folder, tmp_path / "peft") - ours).abs().max() <= 1e-4
        return
    with pytest.raises(
        ConfigError, match="has DoRA or dropout on experts or routers, which PEFT has no place"
    ) as caught:
        export_adapter(checkpoint, tmp_path / "peft")
    assert caught.value.hint == "export it with --to merged"
    with pytest.raises(ConfigError, match="which PEFT has no place for"):
        generate(checkpoint / "adapter", ["Who?"])
    with pytest.raises(KeyError, match="ISOTRAIN_LORA"):
        PeftConfig.from_pretrained(str(checkpoint / "adapter"))
