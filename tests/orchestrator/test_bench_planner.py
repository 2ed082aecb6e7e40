"""The planner's benchmark: scored as its rows ask for, whatever they hold; what the model promises of whole runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.bench import planner, planner_fit
from orchestrator.bench.planner_rows import network_of, setup_of_row, shape_of_row, stage_sizes
from orchestrator.bench.planner_score import (
    ROWS,
    Prediction,
    Score,
    memory_errors,
    out_of_memory,
    over_groups,
    predict,
    read_off,
    read_rows,
    reading,
    regrets,
    time_errors,
)
from orchestrator.cli import main
from orchestrator.errors import DataError
from orchestrator.planning.constants import Constants
from orchestrator.planning.memory import StageMemory, stage_memory
from orchestrator.planning.timing import step_time

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def published() -> list[dict[str, Any]]:
    return read_rows(ROWS)[0]


@pytest.fixture(scope="module")
def predictions(published: list[dict[str, Any]]) -> list[Prediction]:
    return [predict(row) for row in published]


def row_of(published: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(row for row in published if row["id"].startswith(name))


def test_there_are_at_most_twelve_constants_and_shares_are_shares() -> None:
    constants = Constants()
    assert len(fields(Constants)) <= 12
    assert all(0 < getattr(constants, name) <= 1 for name in planner_fit.SHARES)
    assert constants.slack >= 1


def test_the_published_rows_are_estimated_as_well_as_the_page_says(predictions: list[Prediction]) -> None:
    """The guard against a change that makes the model worse; the bounds are what was reached, rounded up."""
    assert len(predictions) == 3862
    times = time_errors(predictions)
    assert over_groups(times.values()).value < 0.12
    assert over_groups(time_errors(one for one in predictions if one.is_dense).values()).value < 0.09
    assert over_groups(memory_errors(predictions).values()).value < 0.14
    found, alarms = out_of_memory(predictions)
    assert found.value >= 0.8 and alarms.value <= 0.05
    assert regrets(predictions)["vtrain-multi"].value < 0.03
    page = (DOCS / "planner.md").read_text(encoding="utf-8")
    for group, score in times.items():
        assert f"| {group} | {score.value:.1%} |" in page, (
            f"isotrain bench planner --leave-out --write docs/planner.md: {group}"
        )


def test_every_scorable_row_with_a_device_is_estimated(
    published: list[dict[str, Any]], predictions: list[Prediction]
) -> None:
    refused = [
        one.row for row, one in zip(published, predictions, strict=True) if row["scorable"]["time"] and one.reason
    ]
    assert not refused


def test_causes_and_owners_add_up(predictions: list[Prediction]) -> None:
    for one in predictions[::50]:
        if not one.reason:
            assert sum(one.causes.values()) == pytest.approx(one.step_s)


def made(group: str, key: str, step: float, measured: float, **more: Any) -> Prediction:
    return Prediction(f"{group}-{key}-{step}", group, step_s=step, measured_s=measured, key=key, **more)


def test_errors_are_over_medians_of_equal_configurations_then_over_groups() -> None:
    same = [made("a", "1", 1.0, 1.0), made("a", "1", 1.0, 2.0), made("a", "1", 1.0, 50.0)]
    times = time_errors([*same, made("a", "2", 3.0, 2.0), made("b", "1", 1.0, 1.0)])
    assert times == {"a": Score(0.5, 2), "b": Score(0.0, 1)}
    assert over_groups(times.values()) == Score(0.25, 3)


def test_regret_is_what_the_favourite_costs_and_one_that_does_not_fit_is_none() -> None:
    slow, fast = made("s", "1", 1.0, 3.0, sweep="x"), made("s", "2", 2.0, 2.0, sweep="x")
    large = made("s", "3", 0.5, 9.0, sweep="x", fits=False)
    assert regrets([slow, fast, large]) == {"s": Score(0.5, 1)}
    assert regrets([slow]) == {}


def test_out_of_memory_is_found_or_a_false_alarm() -> None:
    rows = [made("g", str(n), 1.0, 1.0, fits=fits, ran_out=out) for n, (fits, out) in enumerate(
        [(False, True), (True, True), (True, False), (True, False), (False, False)])]  # fmt: skip
    assert out_of_memory(rows) == (Score(0.5, 2), Score(pytest.approx(1 / 3), 3))


def test_kinds_of_readings_are_never_mixed(predictions: list[Prediction]) -> None:
    assert len({kind for _, kind in memory_errors(predictions)}) > 4


SMALL: dict[str, Any] = {
    "id": "small", "group": "g", "gpu": "H100", "seq": 2048, "mbs": 1, "gbs": 16, "gpus": 8, "gpus_per_node": 8,
    "model": {"name": "llama", "layers": 8, "hidden": 1024, "heads": 8, "kv_heads": 8, "ffn": 4096, "vocab": 32000},
    "tp": 2, "pp": 2, "dp": 2, "scorable": {"time": True, "memory": False}, "target": {"step_s": 1.0},
    "measured": {}, "config_key": "k",
}  # fmt: skip


@given(st.dictionaries(st.sampled_from([*SMALL, "vpp", "zero", "recompute", "args", "peft", "cp", "ep"]), st.one_of(
    st.none(), st.integers(-3, 99), st.floats(), st.text(max_size=4), st.booleans(), st.lists(st.just(1), max_size=2),
    st.dictionaries(st.sampled_from(["layers", "hidden", "experts", "oom", "step_s"]), st.none() | st.integers(-2, 9)),
)))  # fmt: skip
@settings(max_examples=200)
def test_odd_rows_are_listed_with_a_reason_and_never_a_traceback(changes: dict[str, Any]) -> None:
    one = predict(SMALL | changes)
    assert one.reason or one.step_s > 0


def test_broken_lines_and_files_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(SMALL) + "\n{oops\n[1]\n\n" + json.dumps(SMALL | {"gpu": "H1OO"}) + "\n")
    assert main(["bench", "planner", "--rows", str(file), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["time"] == {"g": {"value": pytest.approx(summary["time"]["g"]["value"]), "count": 1}}
    reasons = {each["row"]: each["reason"] for each in summary["not_predicted"]}
    assert reasons["line 2"].startswith("no JSON: ") and reasons["line 3"] == "no JSON object"
    assert reasons["small"].startswith("cluster.gpu=H1OO is not in the catalogue of devices; there is A100-80GB")
    assert main(["bench", "planner", "--rows", str(file)]) == 0
    assert "furthest off" in capsys.readouterr().out
    with pytest.raises(DataError, match=r"nothing\.jsonl cannot be read: "):
        read_rows(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpu": None}, "the kind of device was not printed"),
        ({"seq": None}, "the sequence length was not printed"),
        ({"mbs": None, "gbs": None}, "neither the micro-batch nor the global batch was printed"),
        ({"model": {"layers": 8}}, "model.hidden was not printed"),
        ({"pp": 1e300}, "pp=1e+300 is no size of a run"),
        ({"model": SMALL["model"] | {"kv_heads": 1e300}}, "odd sizes: they lead to no finite time"),
        ({"gpu": "MI999"}, "cluster.gpu=MI999 is not in the catalogue of devices; there is "),
    ],
)
def test_what_nothing_can_stand_in_for_is_said(change: dict[str, Any], reason: str) -> None:
    assert predict(SMALL | change).reason.startswith(reason)


def test_what_was_not_printed_is_filled_in_by_rules(published: list[dict[str, Any]]) -> None:
    assert shape_of_row(row_of(published, "dgxc-v25.04-pretrain-llama3-8b")).gated
    assert not shape_of_row(row_of(published, "mlm21-t1-1.7B")).gated
    assert shape_of_row(row_of(published, "dgxc-v25.05.01-pretrain-deepseek-v3")).latent is not None
    deepseek = shape_of_row(row_of(published, "dgxc-v25.05.01-pretrain-deepseek-v3"))
    assert deepseek.parameters() == pytest.approx(671e9, rel=0.02)
    assert setup_of_row(row_of(published, "mlm20-mp-a100-1B")).recompute == "full"  # would not fit otherwise
    assert network_of({"interconnect": "DGX A100 (NVSwitch), 8x200Gb/s HDR IB per node"}, 8) == 25e9
    assert network_of({"interconnect": "inter-node 800 Gb/s"}, 8) == 12.5e9
    assert network_of({"interconnect": "NVLink4 8-GPU + 400Gb/s IB"}, 8) == 50e9
    assert sum(stage_sizes(30, 4)) == 30 and stage_sizes(30, 4) == (7, 8, 8, 7)


def test_a_frozen_base_costs_no_weight_gradients_and_no_states() -> None:
    whole = setup_of_row(SMALL)
    thin = setup_of_row(SMALL | {"peft": "lora"})
    assert step_time(thin).matmul_s < 0.75 * step_time(whole).matmul_s
    full, lora = stage_memory(whole)[0], stage_memory(thin)[0]
    assert lora.optimizer < 0.1 * full.optimizer and lora.gradients < 0.1 * full.gradients
    assert stage_memory(setup_of_row(SMALL | {"peft": "qlora"}))[0].weights < 0.7 * lora.weights


def test_a_rank_alone_holds_no_buffers_of_communication() -> None:
    alone = setup_of_row(SMALL | {"tp": 1, "pp": 1, "dp": 1, "gpus": 1})
    assert stage_memory(alone)[0].overhead < 1e9 < stage_memory(setup_of_row(SMALL))[0].overhead


@pytest.mark.parametrize(
    ("less", "more", "cause"),
    [
        ({"tp": 1, "dp": 4}, {"tp": 2, "dp": 2}, "tensor_s"),
        ({"pp": 1, "dp": 4}, {"pp": 4, "dp": 1}, "bubble_s"),
        ({"vpp": 4}, {"vpp": 1}, "bubble_s"),
        ({}, {"recompute": "full"}, "recompute_s"),
        ({"cp": 1}, {"cp": 2, "dp": 1}, "context_s"),
        ({"dp": 2, "gpus_per_node": 8}, {"dp": 64, "gbs": 512}, "data_s"),
        ({"seq": 1024}, {"seq": 8192}, "attention_s"),
    ],
)
def test_every_cause_grows_with_what_causes_it(less: dict[str, Any], more: dict[str, Any], cause: str) -> None:
    few, many = (step_time(setup_of_row(SMALL | change)) for change in (less, more))
    assert getattr(many, cause) > getattr(few, cause)


def test_experts_talk_more_over_the_network_than_inside_a_domain() -> None:
    moe = SMALL["model"] | {"experts": 16, "topk": 4, "moe_ffn": 512}
    rows = {ep: SMALL | {"model": moe, "tp": 1, "pp": 1, "dp": 16, "ep": ep, "gpus": 16} for ep in (1, 8, 16)}
    times = {ep: step_time(setup_of_row(row)).expert_s for ep, row in rows.items()}
    assert times[1] == 0 < times[8] < times[16]
    once = setup_of_row(rows[16])
    once = replace(once, software=replace(once.software, sends_once=True))
    assert step_time(once).expert_s < times[16]


def test_what_a_reading_counts_is_the_programs() -> None:
    """A fork that prints what torch allocates, a program that prints nothing, and one that says what it prints."""
    rows = {row["group"]: row for row in read_rows(ROWS)[0] if (row.get("measured") or {}).get("mem_gb")}
    found = {group: reading(rows[group]) for group in ("zerobubble", "internevo", "bigscience-a100", "hf-ultrascale")}
    assert list(found.values()) == ["allocated", "all", "all", "reserved"]
    memory = StageMemory(5, 0, 0, 0, 0, 0, overhead=1, slack=2)
    assert [read_off(memory, counted) for counted in ("allocated", "reserved", "all")] == [5, 7, 8]


def test_of_layouts_that_are_alike_the_one_with_fewest_stages_is_liked() -> None:
    def one(key: str, step_s: float, stages: int, fits: bool = True) -> Prediction:
        return Prediction(key, "g", step_s=step_s, measured_s=float(key), fits=fits, key=key, sweep="s", stages=stages)

    assert regrets([one("3", 1.0, 2), one("2", 1.03, 1)])["g"].value == 0.0
    assert regrets([one("3", 1.0, 2), one("2", 1.05, 1)])["g"].value == 0.5
    assert regrets([one("3", 1.0, 2), one("2", 1.03, 1, fits=False)])["g"].value == 0.5


def test_descent_finds_constants_that_fit_better() -> None:
    rows = [
        row for row in read_rows(ROWS)[0] if row["group"] in ("narayanan21", "korthikanti22", "zerobubble", "ms-swift")
    ]
    known = planner_fit.known_times(rows)
    wrong = replace(Constants(), matmul=0.5)
    better = planner_fit.descend(
        wrong, lambda one: planner_fit.time_loss(known, one), (0.2,), but=planner_fit.OF_MEMORY
    )
    assert planner_fit.time_loss(known, better) < planner_fit.time_loss(known, wrong) - 0.05
    assert (better.slack, better.context_gb) == (wrong.slack, wrong.context_gb)
    memories = planner_fit.known_memories(rows)
    assert planner_fit.memory_loss(memories, wrong) < planner_fit.memory_loss(memories, replace(wrong, slack=2.0))


def test_fitted_constants_are_written_where_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(str(planner.constants_module.__file__))
    copy = tmp_path / "constants.py"
    copy.write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(planner.constants_module, "__file__", str(copy))
    found = replace(Constants(), latency_s=1.5e-05, slack=1.25)
    assert planner._fitted(found, as_json=True) == 0
    program = "import json, constants; print(json.dumps(vars(constants.FITTED)))"
    said = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, check=True, text=True)
    assert json.loads(said.stdout) == pytest.approx(asdict(found), rel=1e-3)


def test_leaving_a_group_out_scores_that_group(published: list[dict[str, Any]]) -> None:
    few = [row for row in published if row["group"] in ("narayanan21", "korthikanti22", "mlm2020")]
    found = planner_fit.leave_one_out(few)
    assert {group: score.count for group, score in found.items()} == {
        "narayanan21": 9,
        "korthikanti22": 4,
        "mlm2020": 6,
    }
