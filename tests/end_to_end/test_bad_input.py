"""Every bad input is one screen with a hint and the right code, and costs nothing that was saved before."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.conftest import TinyRun, write_chat
from tests.end_to_end.shell import ISOTRAIN, Done, Folder, Shell, close, distance, is_one_screen

# what is wrong: (the changes, the code, a piece of the message, a piece of the hint)
BEFORE_ANYTHING_STARTS: dict[str, tuple[dict[str, object], int, str, str]] = {
    "no data file": (
        {"data__path": "nowhere.jsonl"},
        64,
        "nowhere.jsonl: there is no such file",
        "data=lighthouse",
    ),
    "no model folder": ({"model__path": "nowhere"}, 64, "model.path=nowhere is no folder here", "model.path="),
    "no model in the folder": ({"model__path": "."}, 64, "no Hugging Face model", "model.path="),
    "unknown key": ({"optimizer__lrr": 1}, 64, "'optimizer.lr'", "optimizer.lr=1"),
    "unknown section": ({"optimiser__lr": 1}, 64, "'optimizer.lr'", "optimizer.lr=1"),
    "unknown choice": ({"cluster": "laptpo"}, 64, "no configs/cluster/laptpo.yaml", "cluster=laptop"),
    "wrong type": ({"steps": "many"}, 64, "steps='many' should be a whole number", "steps=100"),
    "out of range": ({"steps": 0}, 64, "steps=0 should be at least 1", "steps=1"),
    "heads do not divide": ({"topology__tp": 4, "cluster": "laptop"}, 64, "6 attention heads", "topology.tp=3"),
    "batch does not divide": (
        {"cluster": "laptop", "batch__micro_sequences": 4, "batch__global_sequences": 6},
        64,
        "batch.global_sequences=6 is no multiple of",
        "batch.micro_sequences=",
    ),
    "too few ranks": (
        {"topology__tp": 2},
        64,
        "needs 2 ranks (pp=1 dp=1 cp=1 tp=2) but cluster has 1",
        "topology.tp=1  or  cluster.gpus_per_node=2",
    ),
    "rows too long": (
        {"batch__sequence_tokens": 10**6},
        64,
        "batch.sequence_tokens=1000000 is more than the model's",
        "batch.sequence_tokens=",
    ),
    "unknown target": ({"tuner__targets": "[q_prj]"}, 64, "'q_prj' matches no linear layer", "q_proj"),
    "no override": ({"steps": "[1"}, 64, "is no override", "steps="),
}


@pytest.mark.parametrize("wrong", BEFORE_ANYTHING_STARTS)
def test_what_cannot_work_is_said_before_anything_starts(
    command: Callable[..., Any], tiny_run_model: TinyRun, tmp_path: Path, wrong: str
) -> None:
    changes, code, message, hint = BEFORE_ANYTHING_STARTS[wrong]
    words = tiny_run_model.words(**changes, run_dir=tmp_path / "run")
    done: Done = command("train", *words, "--json", code=code)
    assert message in done.json["error"] and hint in done.json["hint"]
    assert message in done.err and hint in done.hint and is_one_screen(done.err)
    assert not (tmp_path / "run").exists()


def test_the_hint_for_heads_works_if_typed(command: Callable[..., Any]) -> None:
    done: Done = command("plan", "experiment=demo", "topology.pp=1", "topology.tp=2", code=64)
    assert "9 attention heads" in done.err
    command("plan", "experiment=demo", "topology.pp=1", *shlex.split(done.hint), code=0)


def test_folders_that_are_not_ours_are_refused_and_left_alone(
    command: Callable[..., Any], tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("mine")
    for run_dir, message in ((file, "is a file"), (theirs, "is not empty and holds no run"), (file / "x", "cannot be")):
        done: Done = command("train", *tiny_run_model.words(run_dir=run_dir), "--json", code=64)
        assert message in done.json["error"] and done.hint == "run_dir=ANOTHER" and is_one_screen(done.err)
    assert file.read_text() == "mine" and [path.name for path in theirs.iterdir()] == ["thesis.tex"]
    assert "no job.yaml" in command("resume", str(tmp_path / "nothing"), "--json", code=64).err


def test_a_model_in_pickle_is_refused_without_being_read(
    command: Callable[..., Any], tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_run_model.model, model)
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    words = tiny_run_model.words(model__path=model, run_dir=tmp_path / "run")
    done: Done = command("train", *words, "--json", code=64)
    assert "pytorch_model.bin, but pickled weights are not opened" in done.json["error"]
    assert (
        "isotrain convert" in done.hint
        and "--allow-pickle" in done.hint
        and is_one_screen(done.err)
        and not (tmp_path / "run").exists()
    )


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_good_one_before_it(
    shell: Shell, uninterrupted: Folder, tmp_path: Path
) -> None:
    run = uninterrupted.copied(tmp_path / "run")
    flip_a_bit(run.checkpoint(6) / "adapter/adapter_model.safetensors")
    done = shell.isotrain("resume", str(run.path), "cluster=one", "topology.pp=1", "steps=7", "optimizer.lr=0.01")
    assert "step-000006 is not usable" in done.err and "sha256" in done.err
    assert f"going on from {run.checkpoint(3)}" in done.err and "step 4/7" in done.err
    assert sorted(run.losses) == list(range(1, 8)) and run.losses[4] == pytest.approx(uninterrupted.losses[4], rel=1e-5)


def test_where_every_checkpoint_is_damaged_the_run_ends_with_65(
    shell: Shell, uninterrupted: Folder, tmp_path: Path
) -> None:
    run = uninterrupted.copied(tmp_path / "run")
    for file in (run.checkpoint(3) / "optimizer").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-100])
    (run.checkpoint(6) / "manifest.json").unlink()
    words = ("resume", str(run.path), "cluster=one", "topology.pp=1", "steps=7", "--json")
    done = shell.isotrain(*words, code=65)
    assert "no good checkpoint in" in done.json["message"] and "run_dir=" in done.hint and is_one_screen(done.err)
    assert run.metrics.keys() == uninterrupted.metrics.keys()


def test_data_changed_under_its_name_are_noticed(shell: Shell, tiny_run_model: TinyRun, tmp_path: Path) -> None:
    data = write_chat(tmp_path / "chat.jsonl")
    run = Folder(tmp_path / "run")
    shell.isotrain("train", *tiny_run_model.words(data__path=data, run_dir=run.path, steps=1))
    write_chat(data, rows=21)
    words = tiny_run_model.words(data__path=data, run_dir=run.path, steps=2)
    done = shell.isotrain("train", *words, "--json", code=65)
    assert f"data.path={data} has changed since step 1" in done.json["message"] and is_one_screen(done.err)
    typed = shlex.split(done.hint.partition(": ")[2].replace("OTHER_FILE", str(tiny_run_model.data)))
    assert typed[:3] == ["isotrain", "resume", str(run.path)]
    shell.isotrain(*typed[1:], "steps=2")
    assert sorted(run.losses) == [1, 2]


def test_a_loss_that_is_no_number_gives_up_and_saves_nothing_of_it(
    shell: Shell, tiny_run_model: TinyRun, tmp_path: Path
) -> None:
    run = Folder(tmp_path / "run")
    words = tiny_run_model.words(
        run_dir=run.path, optimizer__lr=1e30, optimizer__warmup_steps=0, checkpoint__every_steps=1
    )
    done = shell.isotrain("train", *words, "--json", code=93)
    assert "loss nan" in done.json["message"] and f"isotrain resume {run.path} optimizer.lr=1e+29" in done.hint
    assert is_one_screen(done.err) and all(step < 6 for step in run.steps)


def test_no_space_left_ends_with_71_and_leaves_the_last_good_checkpoint(
    shell: Shell, uninterrupted: Folder, tmp_path: Path
) -> None:
    run = uninterrupted.copied(tmp_path / "run")
    kib = (run.checkpoint(6) / "adapter/adapter_model.safetensors").stat().st_size // 1024 - 4
    argv = [*ISOTRAIN, "resume", str(run.path), "cluster=one", "topology.pp=1", "steps=7", "--json"]
    # the limit is on every file of the process: a coverage database that grows beyond it would be a second failure
    unmeasured = "unset COVERAGE_PROCESS_START COVERAGE_PROCESS_CONFIG"
    done = shell.run(["bash", "-c", f"{unmeasured}; ulimit -f {kib}; {shlex.join(argv)}"], code=71)
    assert is_one_screen(done.err) and done.hint
    assert run.steps == [3, 6] and run.latest == "step-000006"
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == [
        "latest",
        "step-000003",
        "step-000006",
    ]
    name = "adapter/adapter_model.safetensors"
    assert distance(run.checkpoint(6) / name, uninterrupted.checkpoint(6) / name) == 0.0
    shell.isotrain(*argv[3:])  # with room again the same command goes on
    assert close(uninterrupted.losses, {step: loss for step, loss in run.losses.items() if step < 7}, 0)
    assert run.steps[-1] == 7


def test_a_finished_run_whose_end_is_damaged_is_not_finished(
    shell: Shell, uninterrupted: Folder, tmp_path: Path
) -> None:
    run = uninterrupted.copied(tmp_path / "run")
    flip_a_bit(run.checkpoint(6) / "adapter/adapter_model.safetensors")
    out = tmp_path / "adapter"
    refused = shell.isotrain("export", str(run.path), "--to", "peft", str(out), code=65)
    assert refused.hint == f"isotrain export {run.path}/checkpoints/step-000003 --to peft {out}"
    shell.isotrain(*shlex.split(refused.hint)[1:])
    done = shell.isotrain("resume", str(run.path), "--json")
    assert "the checkpoint of step 6" in done.err and "is damaged: going on before it" in done.err
    assert done.json["step"] == 6 and close(uninterrupted.losses, run.losses)
    assert "is finished: 6 of 6" in shell.isotrain("resume", str(run.path), "--json").json["message"]


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-10] ^= 1
    file.write_bytes(bytes(data))
