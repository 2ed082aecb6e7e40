"""What certify shrinks, lists, compares and shows, without training anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.certify import report
from orchestrator.certify.command import Cell, Request, certify, tuner_rows
from orchestrator.certify.comparing import Error, errors
from orchestrator.certify.grid import REFERENCE, Layout, layouts
from orchestrator.certify.keeping import Growing, about, counts
from orchestrator.certify.report import MARK, Outputs, certified, markdown, render
from orchestrator.certify.shrinking import shrunken
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.save import save
from orchestrator.commands import plan_job
from orchestrator.config.loading import compose_job
from orchestrator.errors import ConfigError
from orchestrator.planning import certified as certified_plans
from parallel.capabilities import legal_tensor_sizes, quantised_tensor_sizes
from parallel.families import read_model
from parallel.shards import Box, Shard
from parallel.specs import ModelSpec
from tests.helpers.runs import config

GREEN = Cell("lora", Layout("dp2", (), 2), "green", (Error("loss", "step 1", 2e-7, 1e-5),))
RED = Cell("lora", Layout("tp2", (), 2), "red", (Error("weight", "q_proj", 2e-3, 1e-4),))
FAILED = Cell("full", Layout("tp2", (), 2), "red", reason="rank 1:\nBoom: no")
REFUSED = Cell("full", Layout("dp2", (), 2), "refused", reason="3 heads | tp=2")
FACTS = about(Request(compose_job(["model=smollm2_135m"])), {"model_type": "llama"})


@given(
    kv=st.integers(1, 40), group=st.integers(1, 8), ffn=st.integers(1, 400).map(lambda size: 8 * size),
    layers=st.integers(1, 90), ranks=st.integers(2, 8),
)  # fmt: skip
def test_a_small_model_is_cut_by_the_same_sizes(kv: int, group: int, ffn: int, layers: int, ranks: int) -> None:
    changes = {"num_key_value_heads": kv, "num_attention_heads": kv * group, "intermediate_size": ffn}
    large = read_model(config("llama", num_hidden_layers=layers, **changes))
    small = read_model(shrunken(config("llama", num_hidden_layers=layers, **changes), ranks))

    def cuts(model: ModelSpec) -> list[int]:
        return [size for size in legal_tensor_sizes(model) if size <= ranks]

    assert cuts(small) == cuts(large) and small.heads // small.kv_heads == group
    assert small.layers == min(layers, max(ranks + 1, 5))


@pytest.mark.parametrize(("family", "windows"), [
    ("llama", ()), ("mistral", 5 * (7,)), ("gemma2", (7, 0, 7, 0, 7)), ("gemma3_text", (7, 7, 7, 7, 0)),
])  # fmt: skip
def test_a_small_model_has_both_kinds_of_layers(family: str, windows: tuple[int, ...]) -> None:
    large = config(family, num_hidden_layers=26, sliding_window=4096) | {"sliding_window_pattern": 6}
    assert read_model(shrunken(large, 4)).windows == windows
    kinds = {"layer_types": [("full", "sliding")[layer % 6 != 5] + "_attention" for layer in range(26)]}
    small = shrunken(large | kinds, 4)
    assert len(small.get("layer_types", [0] * 5)) == 5


@pytest.mark.parametrize("name", ["smollm2_135m", "llama3_8b", "qwen3_8b"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_quantised_small_model_is_cut_by_the_same_sizes_too(name: str, ranks: int) -> None:
    given = compose_job([f"model={name}"]).model.config or {}
    large, small = (read_model(each) for each in (given, shrunken(given, ranks)))
    legal = [[size for size in quantised_tensor_sizes(model) if size <= ranks] for model in (large, small)]
    assert legal[0] == legal[1] != []


def test_a_small_mixture_of_experts_keeps_its_cuts() -> None:
    given = compose_job(["model=qwen3_30b_a3b"]).model.config
    small = read_model(shrunken(given or {}, 4))
    assert (small.experts, small.experts_per_token, small.expert_ffn % 4, small.qk_norm) == (4, 2, 0, True)


def test_columns_are_every_topology_once() -> None:
    names = [layout.name for layout in layouts(4, moe=False)]
    assert len(names) == len(set(names)) and REFERENCE.name not in names
    assert {"tp2", "tp4+sp", "tp2·pp2+vpp2", "pp2·dp2+distributed", "dp3"} <= set(names)
    assert not any("ep" in name for name in names)
    assert all(layout.ranks <= 4 for layout in layouts(4, moe=True))


def test_rows_are_every_tuner_and_dropout() -> None:
    assert {"lora", "full", "lora+dropout"} <= set(tuner_rows())
    assert list(tuner_rows(["full"])) == ["full"]
    assert "galore" not in tuner_rows() and list(tuner_rows(["galore"])) == ["galore"]
    with pytest.raises(ConfigError, match="--tuner qora is none of"):
        tuner_rows(["qora"])


@pytest.mark.parametrize(
    ("ranks", "only", "words", "hint"),
    [
        (2, "tp7", "--only tp7 leaves no topology of up to 2 processes", "--only tp2"),
        (0, "", "--up-to 0: there is no topology of fewer than 2 processes", "--up-to 4"),
    ],
)
def test_a_grid_without_columns_is_refused_with_a_name_that_is_there(
    ranks: int, only: str, words: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        certify(Request(compose_job(["model=smollm2_135m"]), ranks, only=only))
    assert raised.value.hint == hint


def a_run(folder: Path, change: float = 0.0, steps: int = 2, loss: float = 2.0, name: str = "w") -> Path:
    """A run folder with metrics and a checkpoint after each step."""
    lines = [json.dumps({"step": step + 1, "loss": loss, "grad_norm": 1.0}) for step in range(steps)]
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    for step in range(1, steps + 1):
        value = torch.full((2, 2), 1.0 + change * (step == steps))
        box = Box.whole((2, 2))
        shards = [Shard(name, kind, (2, 2), box, value) for kind in ("weight", "exp_avg", "exp_avg_sq")]
        contents = Contents("model", {"step": step}, {"config.json": b"{}"}, {})
        save(folder / "checkpoints", step, iter(shards), contents)
    return folder


@pytest.mark.parametrize(
    ("other", "what", "value"),
    [
        ({"change": 0.01}, "weight", 0.01),
        ({"loss": 2.002}, "loss", 1e-3),
        ({"loss": float("nan")}, "loss", float("nan")),
        ({"name": "v"}, "weight", float("inf")),
    ],
)
def test_errors_are_found_where_they_are(tmp_path: Path, other: dict[str, float], what: str, value: float) -> None:
    one = a_run(tmp_path / "one")
    assert all(error.value == 0 for error in errors(one, a_run(tmp_path / "same"), 2))
    found = {error.what: error for error in errors(one, a_run(tmp_path / "other", **other), 2)}  # type: ignore[arg-type]
    assert found[what].value == pytest.approx(value, nan_ok=True) and found[what].share > 1


def test_a_grid_is_shown_whole_and_a_certificate_is_json(tmp_path: Path) -> None:
    from rich.console import Console

    cells = [GREEN, RED, REFUSED, FAILED]
    console = Console(width=60, record=True, file=(tmp_path / "shown").open("w"))
    console.print(render(cells, 60))
    text = console.export_text()
    assert "2e-07" in text and "weight 2e-03" in text.replace("\n", " ") and "failed" in text
    assert "1 green, 2 red, 1 refused" in text and "Boom: no" in text
    page = markdown(cells)
    assert "| tp2 | **red** weight 2e-03 | **red** failed |" in page and "| dp2 | 2e-07 | - |" in page
    broken = Cell("lora", Layout("pp2", (), 2), "red", (Error("loss", "step 1", float("nan"), 1e-5),))
    growing = Growing.begun(tmp_path / "certificate.json", FACTS, resume=False)
    growing.finish([*cells, broken])
    value = json.loads((tmp_path / "certificate.json").read_text())
    assert value["counts"] == counts([*cells, broken]) and value["cells"][-1]["errors"][0]["value"] is None
    assert value["tolerances"] == {"loss": 1e-5, "tensor": 1e-4, "logits": 1e-4}


def test_what_a_stopped_grid_has_done_counts_for_the_next(tmp_path: Path) -> None:
    file = tmp_path / "certificate.json"
    stopped = Growing.begun(file, FACTS, resume=True)
    assert stopped.known == {} and stopped.keep() is None
    for cell in (GREEN, RED, REFUSED):
        stopped.add(cell)
    assert stopped.keep() == tmp_path / "certificate.json.part" and not file.exists()
    again = Growing.begun(file, FACTS, resume=True)
    assert again.known == {("lora", "dp2"): GREEN}
    whole = again.finish([RED])  # of other columns: what is known stays
    assert [path.name for path in tmp_path.iterdir()] == ["certificate.json"]
    assert Growing.begun(file, FACTS, resume=True).known == again.known and whole["seconds"] >= 0
    assert Growing.begun(file, FACTS, resume=False).known == {}


def test_cells_of_other_code_or_of_another_job_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "certificate.json"
    Growing.begun(file, FACTS, resume=False).finish([GREEN])
    other = about(Request(compose_job(["model=smollm2_135m", "tuner.targets=[q_proj]"])), {"model_type": "llama"})
    for facts, word in ((FACTS | {"source": "0"}, "another source"), (other, "another job"), (FACTS, "no certificate")):
        if word == "no certificate":
            file.write_text("[1]")
        with pytest.raises(ConfigError, match=word) as raised:
            Growing.begun(file, facts, resume=True)
        assert raised.value.hint.endswith("certificate-2.json")


def test_a_page_without_marks_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing")
    with pytest.raises(ConfigError, match="has no two marks"):
        certified(Request(compose_job(["model=smollm2_135m"])), Outputs(tmp_path / "c.json", page))
    assert MARK.format(name="llama") == "<!-- certified llama -->"


def test_what_is_shipped_is_what_was_green_together_and_nowhere_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certified_plans, "SHIPPED", tmp_path / "certified.json")
    monkeypatch.setattr(report, "SHIPPED", tmp_path / "certified.json")

    def warned(*words: str) -> str:
        alone = ["topology.tp=1", "topology.pp=1", "topology.dp=1"]
        return plan_job(compose_job(["model=qwen3_8b", "cluster.memory_gib=600", *alone, *words])).warning

    assert warned("topology.tp=2") == ""  # nothing is shipped

    def cell(verdict: str, *features: str) -> Cell:
        return Cell("lora", Layout("-", (), 2), verdict, features=features)

    sp = "topology.sp=true"
    report.ship("qwen3", [cell("green"), cell("green", "tp", "sp"), cell("green", "tp", "pp"), cell("green", "dp")])
    assert [warned("topology.tp=2"), warned("topology.tp=2", sp)] == ["", ""]
    words = "lora on qwen3 with pp with sp (isotrain certify shows whether it holds)"
    assert warned("topology.tp=2", "topology.pp=2", sp).endswith(words)
    assert warned("tuner=full").startswith("not certified: full on qwen3 (isotrain certify")
    report.ship("qwen3", [cell("green", "tp"), cell("red", "tp", "pp")])
    assert "with pp, pp with tp, tp (" in warned("topology.tp=2", "topology.pp=2")
    report.ship("llama", [cell("green")])
    assert set(certified_plans.shipped()) == {"qwen3", "llama"}
    report.ship("qwen3", [Cell("full", Layout("-", (), 2), "green", features=("tp",))])
    assert set(certified_plans.shipped()["qwen3"]) == {"lora", "full"}  # a certificate of some tuners keeps the others
