"""QLoRA: training on an NF4 base is training on its dequantised values, the same codes wherever the base is cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestrator.checkpoint.export import export_adapter, export_merged
from parallel import nf4
from parallel.topology import Topology
from tests.helpers import exported, peft_loop, runs
from tests.helpers.cells import in_grid
from tests.helpers.pool import Pool
from tests.helpers.runs import Run

SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 192,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 64,
    "intermediate_size": 384,
}
CHANGES = tuple(SHAPE.items())
PLACES: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"topology": Topology(tp=2)},
    "tp3": {"topology": Topology(tp=3)},
    "tp2-sp-pp2": {"topology": Topology(tp=2, pp=2), "sp": True},
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "bias": {"family": "qwen2"},
    "dora": {"dora": True},
    "dropout": {"dropout": 0.2, "dora": True},
}
RUNS = [
    *(("llama", place) for place in PLACES),
    *((case, "tp2-sp-pp2") for case in ("bias", "dora", "dropout")),
    ("dora", "one"),
]


def dequantised(folder: Path, out: Path) -> Path:
    """A copy of a model whose decoder linears hold what NF4 makes of them."""
    out.mkdir()
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("proj.weight"):
            tensors[name] = nf4.round_trip(weight)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


@pytest.fixture(scope="module")
def oracle(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """PEFT's losses, norms and adapter on the dequantised base of a case."""
    known: dict[str, Any] = {}

    def of(case: str) -> Any:
        if case not in known:
            run = Run(changes=CHANGES, **CASES[case])
            folder = tmp_path_factory.mktemp("nf4")
            base = dequantised(tiny_model(run.family, **SHAPE), folder / "base")
            model, clock = peft_loop.make_model(run, base)
            known[case] = (*peft_loop.train(run, model, clock), peft_loop.adapter(model))
        return known[case]

    return of


@pytest.mark.parametrize(("case", "place"), in_grid(RUNS))
def test_training_equals_peft_on_the_dequantised_base(
    pool: Pool, tiny_model: Callable[..., Path], oracle: Callable[[str], Any], case: str, place: str
) -> None:
    losses, norms, adapter = oracle(case)
    run = Run(changes=CHANGES, quantise="nf4", **CASES[case], **PLACES[place])
    found = pool.run(run.topology.world_size, runs.train, run, str(tiny_model(run.family, **SHAPE)))
    assert found[0][0] == pytest.approx(losses, rel=1e-5)
    assert found[0][1] == pytest.approx(norms, rel=1e-4)
    state = runs.merge([state for _, _, state in found])
    peft_loop.assert_equal({name: value for (name, kind), value in state.items() if kind == "weight"}, adapter)


def held(run: Run, folder: str) -> tuple[dict[str, Any], int, int, int]:
    """This rank's dequantised linears, the bytes and elements of these, and the largest piece that was ever read."""
    from parallel.quantised import QuantisedLinear
    from parallel.shards import Box

    largest = 0

    class Watched:
        def __init__(self, reader: Any) -> None:
            self.reader = reader

        def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
            nonlocal largest
            if name.endswith("proj.weight"):
                largest = max(largest, box.elements)
            value: torch.Tensor = self.reader.read(name, kind, box)
            return value

    engine, groups = runs.open_engine(run, folder, Watched)
    linears = {
        name: module
        for chunk in engine._chunks
        for name, module in chunk.named_modules()
        if isinstance(module, QuantisedLinear)
    }
    tensors = [each for module in linears.values() for each in (*module.buffers(), *module.parameters())]
    weights = {name: module.weight.numpy() for name, module in linears.items()}
    groups.close()
    count = sum(weight.size for weight in weights.values())
    return weights, sum(each.numel() * each.element_size() for each in tensors), count, largest


def test_the_codes_are_those_of_the_uncut_base(pool: Pool, tiny_model: Callable[..., Path]) -> None:
    """Bit for bit: down_proj is cut by columns, q|k|v are fused by heads; and a rank reads only what it holds."""
    folder = str(tiny_model("llama", **SHAPE))
    run = Run(changes=CHANGES, quantise="nf4", topology=Topology(tp=3))
    ((whole, _, _, _),) = pool.run(1, held, run.on(topology=Topology()), folder)
    shards = pool.run(3, held, run, folder)
    name = "decoder.layers.1.mlp.linear_fc2.base"
    assert torch.equal(
        torch.cat([torch.from_numpy(each[0][name]) for each in shards], dim=1), torch.from_numpy(whole[name])
    )
    name = "decoder.layers.0.self_attention.linear_qkv.base"  # whole groups of heads, rank by rank
    assert torch.equal(torch.cat([torch.from_numpy(each[0][name]) for each in shards]), torch.from_numpy(whole[name]))
    name = "decoder.layers.0.mlp.linear_fc1.base"
    gates, ups = zip(*(torch.from_numpy(each[0][name]).chunk(2) for each in shards), strict=True)
    assert torch.equal(torch.cat([*gates, *ups]), torch.from_numpy(whole[name]))
    for _, size, count, largest in shards:
        assert size < 0.65 * count  # bytes for each element, tables and all of a tiny model included
        assert largest == 384 * 192 // 3


def test_nf4_changes_the_model(pool: Pool, tiny_model: Callable[..., Path]) -> None:
    folder = str(tiny_model("llama", **SHAPE))
    plain, packed = (
        pool.run(1, runs.logits, Run(changes=CHANGES, quantise=kind), folder, [[5, 9, 3, 77]])[0]
        for kind in (None, "nf4")
    )
    assert abs(plain - packed).max() > 1e-3


@pytest.mark.parametrize("case", ["llama", "dora"])
def test_an_export_says_elsewhere_what_it_says_here(
    pool: Pool, tiny_model: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    """The adapter on the dequantised base in peft, and merged into it: the base in the files is not what it knows."""
    original = tiny_model("llama", **SHAPE)
    run = Run(changes=CHANGES, quantise="nf4", learning_rate=1e-2, topology=Topology(tp=2, pp=2), **CASES[case])
    found = pool.run(4, exported.train_and_save, run, str(original), str(tmp_path / "checkpoints"))
    ours = torch.from_numpy(next(each for each in found if each is not None))
    checkpoint = tmp_path / "checkpoints" / f"step-{run.steps:06d}"
    export_adapter(checkpoint, tmp_path / "peft")
    base = dequantised(original, tmp_path / "dequantised")
    assert (exported.peft_logits(base, tmp_path / "peft") - ours).abs().max() <= 1e-4
    export_merged(checkpoint, original, tmp_path / "merged")
    assert (exported.model_logits(tmp_path / "merged") - ours).abs().max() <= 1e-4
    assert (exported.model_logits(original) - ours).abs().max() > 1e-2
