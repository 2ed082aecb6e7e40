"""Looking at the checkpoints of a real run: listed, proven, compared, and what a resume would do with them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.shell import Folder

Command = Callable[..., Any]


def test_a_run_lists_its_checkpoints(command: Command, uninterrupted: Folder, tmp_path: Path) -> None:
    run = uninterrupted.copied(tmp_path / "run")
    rows = command("checkpoints", str(run.path), "--json", code=0).json["checkpoints"]
    assert [(row["step"], row["topology"], row["state"]) for row in rows] == [
        (3, "pp=2 dp=2", "whole"),
        (6, "pp=2 dp=2", "whole"),
    ]
    assert [row["loss"] for row in rows] == [run.losses[3], run.losses[6]]
    size = sum(path.stat().st_size for path in run.checkpoint(6).rglob("*") if path.is_file())
    assert rows[1]["bytes"] == size - (run.checkpoint(6) / "manifest.json").stat().st_size
    flip(next(run.checkpoint(3).glob("optimizer/*")))
    assert "whole" in command("checkpoints", str(run.path), code=0).out
    done = command("checkpoints", str(run.path), "--verify", code=65)
    assert "6*" in done.out and "verified" in done.out and "is damaged: sha256" in done.out.replace("\n", " ")
    (run.checkpoint(6) / "state.json").write_text("{}")
    done = command("checkpoints", str(run.path), code=65)
    assert "3*" in done.out and "6*" not in done.out  # what a resume would go on from
    (run.checkpoint(3) / "manifest.json").unlink()
    assert "this is no whole checkpoint" in command("checkpoints", str(run.path), "--json", code=65).out


def test_a_folder_without_checkpoints_says_so(command: Command, tmp_path: Path) -> None:
    assert "holds no checkpoint" in command("checkpoints", str(tmp_path), code=64).err


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def test_verify_proves_one_and_compares_two(command: Command, uninterrupted: Folder, tmp_path: Path) -> None:
    run = uninterrupted.copied(tmp_path / "run")
    done = command("verify", str(run.path), code=0)
    assert f"{run.checkpoint(6)}: step 6, good: " in done.out and "are what was written" in done.out
    same = command("verify", str(run.path), str(uninterrupted.checkpoint(6)), code=0)
    assert "both hold the same training state, bit for bit" in same.out
    other = command("verify", str(run.checkpoint(3)), str(run.checkpoint(6)), code=1)
    assert "values differ by up to" in other.out and "more (--json lists all)" in other.out
    value = command("verify", str(run.checkpoint(3)), str(run.checkpoint(6)), "--json", code=1).json
    assert not value["comparison"]["equal"] and set(value["comparison"]["state"]) >= {"step", "samples_consumed"}
    assert any(one["name"].endswith("lora_B.weight") for one in value["comparison"]["different"])
    flip(run.checkpoint(6) / "adapter" / "adapter_model.safetensors")
    damaged = command("verify", str(run.path), str(run.checkpoint(3)), code=65)
    assert f"{run.checkpoint(6)}: damaged" in damaged.out and "adapter_model.safetensors is damaged" in damaged.out
    assert command("verify", str(run.path), "--json", code=65).json["checkpoints"][0]["good"] is False


@pytest.mark.parametrize(
    ("overrides", "same", "told"),
    [
        ([], True, {}),
        (["topology.tp=3", "topology.pp=1"], True, {"topology": ("pp=2 dp=2", "tp=3")}),
        (["steps=8"], False, {"steps": ("6", "8")}),
        (["steps=8", "optimizer.lr=0.1"], False, {"optimizer.lr": ("0.01", "0.1")}),
        (["batch.global_sequences=8"], False, {"batch.global_sequences": ("4", "8")}),
        (["precision=bf16"], False, {"precision": ("fp32", "bf16")}),
        (["checkpoint.every_steps=2"], True, {"checkpoint.every_steps": ("3", "2")}),
    ],
)
def test_a_resume_explains_itself_and_does_nothing(
    command: Command,
    uninterrupted: Folder,
    tmp_path: Path,
    overrides: list[str],
    same: bool,
    told: dict[str, tuple[str, str]],
) -> None:
    run = uninterrupted.copied(tmp_path / "run", rewound_to=3)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    value = command("resume", str(run.path), *overrides, "--explain", "--json", code=0).json
    assert (value["step"], value["same"]) == (3, same)
    changes = {change["what"]: (change["before"], change["now"]) for change in value["changes"]}
    assert changes.items() >= told.items() and all(change["effect"] for change in value["changes"])
    assert value["restored"]["data"] == "sample 13: row 13 of 20 in epoch 1"
    assert "after 3 updates" in value["restored"]["optimizer"] and "exp_avg_sq" in value["restored"]["optimizer"]
    words = command("resume", str(run.path), *overrides, "--explain", code=0).out
    assert "nothing has changed" in words if not overrides else ("stays the same run" in words) == same
    assert before == {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}


def test_what_is_explained_is_the_checkpoint_not_the_last_launch(
    command: Command, uninterrupted: Folder, tmp_path: Path
) -> None:
    """A launch with other values that died before its first save has left its job.yaml, and no step."""
    run = uninterrupted.copied(tmp_path / "run", rewound_to=3)
    job = (run.path / "job.yaml").read_text()
    assert "lr: 0.01" in job
    (run.path / "job.yaml").write_text(job.replace("lr: 0.01", "lr: 0.5"))
    value = command("resume", str(run.path), "--explain", "--json", code=0).json
    told = {change["what"]: (change["before"], change["now"]) for change in value["changes"]}
    assert told == {"optimizer.lr": ("0.01", "0.5")} and not value["same"]


def test_data_that_changed_under_their_name_are_told(
    command: Command, uninterrupted: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = uninterrupted.copied(tmp_path / "run", rewound_to=3)
    monkeypatch.setattr("orchestrator.explaining.hash_file", lambda path: "0" * 64)
    value = command("resume", str(run.path), "--explain", "--json", code=0).json
    assert [change["what"] for change in value["changes"]] == ["data"] and not value["same"]


def test_a_resume_explains_that_it_goes_on_before_a_damaged_checkpoint_and_tells_versions(
    command: Command, uninterrupted: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = uninterrupted.copied(tmp_path / "run")
    flip(run.checkpoint(6) / "adapter" / "adapter_model.safetensors")
    monkeypatch.setattr("orchestrator.checkpoint.manifest.importlib.metadata.version", lambda name: "9.9")
    done = command("resume", str(run.path), "--explain", code=0)
    assert "step-000006 is not usable" in done.out and f"would go on from {run.checkpoint(3)}, to step 6" in done.out
    assert "9.9" in done.out and "as far as both versions compute alike" in done.out.replace("\n", " ")


def test_a_job_file_with_the_old_name_of_keep_last_still_opens(
    command: Command, uninterrupted: Folder, tmp_path: Path
) -> None:
    run = uninterrupted.copied(tmp_path / "run", rewound_to=3)
    job = (run.path / "job.yaml").read_text()
    assert "keep_last: 3" in job
    (run.path / "job.yaml").write_text(job.replace("keep_last: 3", "keep: 2"))
    assert json.loads(command("resume", str(run.path), "--explain", "--json", code=0).out)["same"]
    typed = command("plan", "checkpoint.keep=2", code=64)
    assert "here it is 'checkpoint.keep_last'" in typed.err and os.linesep + "hint: checkpoint.keep_last=2" in typed.err
