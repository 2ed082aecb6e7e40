"""A run is the same run on every topology: stopped anywhere, resumed anywhere, loaded by transformers and peft."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.cli import main
from orchestrator.pages.run_folder import read_run
from tests.end_to_end.conftest import TinyRun
from tests.end_to_end.shell import Folder, Shell, close, distance, tensors
from tests.pages.parsed import parsed

ADAPTER = Path("adapter/adapter_model.safetensors")
ELSEWHERE = {
    "tp3": ["topology.tp=3", "topology.pp=1"],
    "dp3": ["topology.dp=3", "topology.pp=1"],  # of 4 rows: two micro-batches each, two of the six without rows
    "cp2-dp2": ["topology.cp=2", "topology.pp=1"],
    "one-process": ["cluster=one", "topology.pp=1"],
}


@pytest.mark.parametrize(
    "place", [pytest.param(place, marks=[pytest.mark.grid] * (place not in ("tp3", "dp3"))) for place in ELSEWHERE]
)
def test_resumed_elsewhere_a_run_goes_on_as_if_nothing_had_happened(
    shell: Shell, uninterrupted: Folder, tmp_path: Path, place: str
) -> None:
    resumed = uninterrupted.copied(tmp_path / "resumed", rewound_to=3)
    done = shell.isotrain("resume", str(resumed.path), *ELSEWHERE[place])
    assert f"resuming {resumed.path} after step 3 of 6" in done.err
    assert "step 4/6" in done.err and "step 3/6" not in done.err
    assert re.search(r"^step 6/6  loss \d.*  ETA 0s$", done.err, re.MULTILINE) and "\x1b" not in done.err  # in a pipe
    assert sorted(resumed.losses) == [1, 2, 3, 4, 5, 6]
    assert close(uninterrupted.losses, resumed.losses)
    assert distance(resumed.checkpoint(6) / ADAPTER, uninterrupted.checkpoint(6) / ADAPTER) < 1e-5
    state = json.loads((resumed.checkpoint(6) / "state.json").read_text())
    assert (state["step"], state["samples_consumed"], state["optimizer_steps"]) == (6, 24, 6)


def test_training_changes_the_adapter_and_uses_all_four_ranks(uninterrupted: Folder) -> None:
    plan = json.loads((uninterrupted.path / "plan.json").read_text())
    assert (plan["ranks_used"], plan["topology"]["pp"], plan["topology"]["dp"]) == (4, 2, 2)
    assert uninterrupted.latest == "step-000006" and uninterrupted.steps == [3, 6]
    assert {exit["code"] for exit in uninterrupted.exits.values()} == {0} and len(uninterrupted.exits) == 4
    assert distance(uninterrupted.checkpoint(3) / ADAPTER, uninterrupted.checkpoint(6) / ADAPTER) > 1e-2
    for line in uninterrupted.metrics.values():
        assert line.keys() >= {"loss", "grad_norm", "learning_rate", "tokens", "step_s", "tokens_per_s"}


def test_a_run_leaves_its_page_and_every_ranks_pace(uninterrupted: Folder) -> None:
    run = read_run(uninterrupted.path)
    assert not run.problems and [(one.code, one.step, one.ranks) for one in run.launches] == [(0, 6, 4)]
    assert [(pace.rank, pace.steps, pace.last_step) for pace in run.paces] == [(rank, 6, 6) for rank in range(4)]
    for pace in run.paces:
        assert 0 < pace.least_s <= pace.median_s <= pace.most_s and pace.wait_s >= 0
        assert 2**26 < pace.peak_memory_bytes < 2**34
    found = parsed((uninterrupted.path / "report.html").read_text(encoding="utf-8"))
    assert not found.wrong and not found.loads
    assert "Run: uninterrupted" in found.text and f"{uninterrupted.losses[6]:.4f}" in found.text


def test_the_adapter_folder_is_a_peft_adapter_and_its_loss_is_the_trained_models(
    uninterrupted: Folder, tiny_run_model: TinyRun
) -> None:
    """The loss of step 4, by transformers and peft from the adapter of step 3, on the rows of step 4."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base(tiny_run_model), uninterrupted.checkpoint(3) / "adapter")
    assert loss_of_step(model, tiny_run_model, 4) == pytest.approx(uninterrupted.losses[4], rel=1e-5)
    job = (uninterrupted.path / "job.yaml").read_text()
    assert "dp: null" in job and "pp: 2" in job  # what was asked, not what was derived


def test_full_tuning_with_a_distributed_optimizer_is_the_same_run_elsewhere_and_in_other_formats(
    shell: Shell, tiny_run_model: TinyRun, tmp_path: Path, capsys: Any
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = Folder(tmp_path / "whole")
    changes: dict[str, Any] = {"tuner": "full", "optimizer__distributed": "true", "steps": 4}
    changes |= {"tuner__r": None, "tuner__alpha": None, "optimizer__lr": 0.001, "checkpoint__every_steps": 2}
    words = tiny_run_model.words(**changes, cluster="laptop", topology__pp=2, run_dir=whole.path)
    shell.isotrain("train", *words)
    resumed = whole.copied(tmp_path / "resumed", rewound_to=2)
    shell.isotrain("resume", str(resumed.path), "topology.pp=1", "topology.tp=2", "topology.dp=1")
    assert close(whole.losses, resumed.losses)
    one, two = (next((run.checkpoint(4) / "model").glob("*.safetensors")) for run in (whole, resumed))
    assert distance(one, two) < 1e-5
    trained = AutoModelForCausalLM.from_pretrained(whole.checkpoint(2) / "model")
    assert loss_of_step(trained, tiny_run_model, 3) == pytest.approx(whole.losses[3], rel=1e-5)
    assert len(AutoTokenizer.from_pretrained(whole.checkpoint(2) / "model")) == 266
    theirs, back = tmp_path / "megatron", Folder(tmp_path / "back")  # out to torch_dist, in again, and on
    assert main(["export", str(whole.checkpoint(2)), "--to", "torch_dist", str(theirs)]) == 0
    assert main(["convert", str(theirs), str(back.path), "--model", str(tiny_run_model.model), "--moments"]) == 0
    said = capsys.readouterr().err
    assert f"go on with: isotrain train tuner=full model.path={tiny_run_model.model} run_dir={back.path}" in said
    shell.isotrain("train", *tiny_run_model.words(**changes, run_dir=back.path))
    there = [json.loads(line) for line in (back.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in there] == [3, 4]
    assert close(whole.losses, {line["step"]: line["loss"] for line in there})
    assert distance(one, next((back.checkpoint(4) / "model").glob("*.safetensors"))) < 1e-5


def test_an_adapter_of_peft_is_where_a_run_may_start_and_every_sink_hears_of_it(
    shell: Shell, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base(tiny_run_model), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    folder = Folder(tmp_path / "run")
    words = tiny_run_model.words(
        steps=2,
        tuner__path=tmp_path / "adapter",
        tuner__targets="[q_proj,down_proj]",
        metrics__sinks="[jsonl,tensorboard,wandb]",
        run_dir=folder.path,
    )
    done = shell.isotrain("train", *words)
    assert folder.losses[1] == pytest.approx(loss_of_step(model, tiny_run_model, 1), rel=1e-5)
    saved = json.loads((folder.checkpoint(2) / "adapter/adapter_config.json").read_text())
    assert set(saved["target_modules"]) == {"q_proj", "down_proj"} and saved["r"] == 4
    assert (
        tensors(folder.checkpoint(2) / ADAPTER).keys()
        == tensors(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    )
    assert "wandb has no API key" in done.err
    assert sum(file.stat().st_size for file in (folder.path / "tensorboard").glob("events*")) > 200
    assert list((folder.path / "wandb").glob("offline-run-*/*.wandb"))
    shutil.rmtree(tmp_path / "adapter")  # a resumed run has no need of where it came from
    done = shell.isotrain("resume", str(folder.path), "steps=3", "metrics=jsonl")
    assert "after step 2 of 3" in done.err and sorted(folder.losses) == [1, 2, 3]


def base(tiny: TinyRun) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny.model, dtype=torch.float32).eval()


def loss_of_step(model: Any, tiny: TinyRun, step: int) -> float:
    """The mean loss over the label tokens of the rows of ``step``, one row at a time, without anything of ours but
    the order of samples and where labels are."""
    from orchestrator.config.job import DataConfig, ObjectiveConfig
    from orchestrator.data import SampleOrder, prepare

    data = prepare(DataConfig(path=str(tiny.data)), ObjectiveConfig(), tiny.model, 64, tiny.data.parent / "cache")
    total, count = 0.0, 0
    for row in SampleOrder(data.rows, 0).rows_at((step - 1) * 4, 4):
        tokens, learns = data.row(int(row))
        ids = torch.tensor(tokens.astype("int64"))[None]
        labels = torch.where(torch.tensor(learns), ids[0], -100)
        with torch.no_grad():
            logits = model(ids).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    return total / count
