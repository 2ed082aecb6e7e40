"""Optimizer state in torch_dist folders: all ways in which megatron-core stores it, and what is refused by name."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orchestrator.checkpoint.load import open_checkpoint
from orchestrator.checkpoint.megatron_optimizer import read_numbers
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.save import save
from orchestrator.checkpoint.torch_dist import TorchDistReader
from orchestrator.checkpoint.torch_dist_writer import TorchDistWriter
from orchestrator.cli import main
from orchestrator.config.loading import compose_job
from orchestrator.convert import convert
from orchestrator.errors import ConfigError, DataError
from orchestrator.runs import decide_train, is_ours, write_run
from parallel.shards import Box, Shard
from tests.helpers.exported import hf_weights

Tensors = dict[tuple[str, str], torch.Tensor]
SCHEDULE = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "schedule": "cosine", "min_lr": 0.0}


def state_of(hf: Path, sixteen_bit: bool = False) -> Tensors:
    """What full tuning of this model might have come to."""
    draw = torch.Generator().manual_seed(3)
    found: Tensors = {}
    for name, weight in hf_weights(hf).items():
        found[name, "weight"] = weight.bfloat16() if sixteen_bit else weight
        for kind in ("exp_avg", "exp_avg_sq", *(["master"] * sixteen_bit)):
            found[name, kind] = torch.rand(weight.shape, generator=draw)
    return found


def saved(tensors: Tensors, hf: Path, run: Path) -> Path:
    """A run folder with this state after 6 steps."""
    shards = [Shard(name, kind, tuple(t.shape), Box.whole(tuple(t.shape)), t) for (name, kind), t in tensors.items()]
    state = {"step": 6, "samples_consumed": 48, "optimizer_steps": 5, "schedule": SCHEDULE | {"steps": 10}}
    save(run / "checkpoints", 6, shards, Contents("model", state, {"config.json": hf / "config.json"}))
    return run


def exported(tensors: Tensors, hf: Path, tmp_path: Path) -> Path:
    out = tmp_path / "torch_dist"
    assert main(["export", str(saved(tensors, hf, tmp_path / "before")), "--to", "torch_dist", str(out)]) == 0
    return out / "iter_0000006"


def read_back(run: Path) -> Tensors:
    reader = open_checkpoint(run, verify=True)
    return {key: reader.read(*key, Box.whole(each.tensor.shape)) for key, each in reader.manifest.tensors.items()}


def rewritten(folder: Path, out: Path, change: Callable[[str, torch.Tensor], tuple[str, torch.Tensor] | None]) -> Path:
    """The folder with each tensor under the key, and in the form, that ``change`` gives it; None leaves it out."""
    reader = TorchDistReader(folder)
    out.mkdir()
    with TorchDistWriter(out, torch.load(folder / "common.pt", weights_only=True)) as writer:
        for key in reader.keys:
            changed = change(key, reader.read(key, Box.whole(reader.stored(key).shape)))
            if changed is not None:
                writer.add(changed[0], (), (), changed[1].contiguous())
    return out


def equal(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], value) for key, value in theirs.items())


@pytest.mark.parametrize("sixteen_bit", [False, True], ids=["fp32", "bf16"])
def test_there_and_back_is_the_same_state(tiny_model: Any, tmp_path: Path, sixteen_bit: bool) -> None:
    hf = tiny_model("qwen2")
    tensors = state_of(hf, sixteen_bit)
    folder = exported(tensors, hf, tmp_path)
    assert convert(folder.parent, tmp_path / "run", model=str(hf), moments=True) == "torch_dist"
    assert equal(read_back(tmp_path / "run"), tensors)
    reader = open_checkpoint(tmp_path / "run")
    assert (reader.step, reader.state["optimizer_steps"], reader.state["data"]) == (6, 5, None)
    assert reader.state["schedule"] == {name: SCHEDULE[name] for name in ("lr", "betas", "eps", "weight_decay")}
    config = json.loads((reader.folder / "model/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == ("bfloat16" if sixteen_bit else "float32")
    size = sum(file.stat().st_size for file in folder.glob("*.distcp"))
    elements = sum(t.numel() for (_, kind), t in tensors.items() if kind == "weight")
    assert size < elements * (14 if sixteen_bit else 12) * 1.5  # a master's two names are one tensor


def by_dp(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """As megatron-core's distributed optimizer names masters."""
    return key.replace("fp32_param", "param"), tensor


def chained(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Of two optimizers, the second has the norms."""
    return (f"chained_{int('norm' in key)}.{key}" if key.startswith("optimizer.") else key), tensor


def padded(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    if "word_embeddings" in key or "output_layer" in key:
        tensor = torch.cat([tensor, torch.full((27, tensor.shape[1]), 7.0).to(tensor.dtype)])
    return key, tensor


def flat(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """``fully_sharded_model_space`` of earlier versions, as two tensor-parallel ranks with a stage for each layer."""
    if not key.startswith("optimizer."):
        return key, tensor
    cut = {axis: 2 for axis, size in enumerate(tensor.shape) if size % 2 == 0 and axis == tensor.dim() - 1}
    cut |= {0: tensor.shape[0]} if "decoder.layers." in key else {}
    cells = [cut.get(axis, 1) for axis in range(tensor.dim())]
    split = [size for whole, count in zip(tensor.shape, cells, strict=True) for size in (count, whole // count)]
    order = [*range(0, len(split), 2), *range(1, len(split), 2)]
    return key, tensor.reshape(split).permute(order).reshape(*cells, -1)


@pytest.mark.parametrize("form", [by_dp, chained, padded, flat])
def test_every_form_of_whole_tensors_comes_in(tiny_model: Any, tmp_path: Path, form: Any) -> None:
    hf = tiny_model("qwen2")
    tensors = state_of(hf, sixteen_bit=True)

    def change(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        return None if key.startswith("optimizer.state.param.") else form(key, tensor)

    folder = rewritten(exported(tensors, hf, tmp_path), tmp_path / "theirs", change)
    convert(folder, tmp_path / "run", model=str(hf), moments=True)
    assert equal(read_back(tmp_path / "run"), tensors)


def without_state(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    return None if key.startswith("optimizer.") else (key, tensor)


def in_buffers(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    if key.startswith("optimizer.state.exp_avg.decoder.final"):
        return "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(x).bucket_idx_0.exp_avg", tensor
    return without_state(key, tensor)


def of_some(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    return None if key == "optimizer.state.exp_avg_sq.decoder.final_layernorm.weight" else (key, tensor)


def in_half(key: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor] | None:
    return key, tensor.half() if key.startswith("optimizer.state.exp_avg.") else tensor


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (without_state, "holds no optimizer state, only weights", "leave --moments away"),
        (
            in_buffers,
            r"as flat buffers of data-parallel ranks \(1 of them, first optimizer\.distributed\.dp_group_idx_0\.gbuf",
            "--dist-ckpt-optim-fully-reshardable",
        ),
        (of_some, r"exp_avg_sq of 7 tensors, none of decoder\.final_layernorm\.weight: only Adam's", "leave --moments"),
        (in_half, r"holds exp_avg of \S+ as F16; read are F32 and BF16", "without --use-precision-aware-optimizer"),
    ],
)
def test_what_cannot_go_on_is_refused(tiny_model: Any, tmp_path: Path, change: Any, message: str, hint: str) -> None:
    hf = tiny_model("llama")
    folder = rewritten(exported(state_of(hf), hf, tmp_path), tmp_path / "theirs", change)
    with pytest.raises(ConfigError, match=message) as error:
        convert(folder, tmp_path / "run", model=str(hf), moments=True)
    assert hint in error.value.hint
    assert not (tmp_path / "run").exists()
    convert(folder, tmp_path / "weights", model=str(hf))  # as the hint says
    assert hf_weights(tmp_path / "weights").keys() == hf_weights(hf).keys()


def test_objects_of_ranks_are_refused_like_their_buffers(tiny_model: Any, tmp_path: Path) -> None:
    """``dp_zero_gather_scatter``: no tensor of the optimizer is listed, only objects."""
    hf = tiny_model("llama")
    folder = exported(state_of(hf), hf, tmp_path)
    (tmp_path / "theirs").mkdir()
    with TorchDistWriter(tmp_path / "theirs", {}) as writer:
        for key in (reader := TorchDistReader(folder)).keys:
            if not key.startswith("optimizer."):
                writer.add(key, (), (), reader.read(key, Box.whole(reader.stored(key).shape)))
        writer.add_nothing("optimizer.distributed.dp_group_idx_0.param_state/shard_0_1")
    with pytest.raises(ConfigError, match=r"as flat buffers .* first optimizer\.distributed\.dp_group_idx_0\.param_st"):
        convert(tmp_path / "theirs", tmp_path / "run", model=str(hf), moments=True)


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.proof),)


def numbers(folder: Path, **common: Any) -> Any:
    torch.save(common, folder / "common.pt")
    return read_numbers(folder)


def test_numbers_are_found_among_what_others_keep_and_nothing_of_it_is_run(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    group = {"lr": 0.5, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0, "step": torch.tensor(7.0)}
    beside = {"args": argparse.Namespace(a=torch.bfloat16, b=[Payload(proof)]), "iteration": 9, "evil": Payload(proof)}
    found = numbers(tmp_path, **beside, optimizer={0: {"optimizer": {"param_groups": [group]}}, 1: {"step": 7}})
    assert (found.iteration, found.steps) == (9, 7)
    assert found.hyperparameters == {"lr": 0.5, "betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.0}
    assert numbers(tmp_path, optimizer={"state": {"common_step": torch.tensor(4)}}).iteration == 4
    assert not proof.exists()
    torch.load(tmp_path / "common.pt", weights_only=False)
    numbers_with_payload = {"optimizer": {"step": 1}, "evil": Payload(proof)}
    torch.save(numbers_with_payload, tmp_path / "common.pt")
    torch.load(tmp_path / "common.pt", weights_only=False)
    assert proof.exists()  # it would have run


def test_numbers_that_say_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"common\.pt is missing: the count of the optimizer's steps is in it"):
        read_numbers(tmp_path)
    with pytest.raises(DataError, match=r"has taken \[2\.0, 3\.0\] steps, where one count is needed"):
        numbers(tmp_path, optimizer=[{"step": 2}, {"step": 3}])
    with pytest.raises(DataError, match=r"has taken \[\] steps"):
        numbers(tmp_path, optimizer={"param_groups": []})
    with pytest.raises(DataError, match="does not say how many steps the optimizer has taken: 'optimizer'"):
        numbers(tmp_path, iteration=3)
    for damaged in (b"", b"PK\x03\x04" + bytes(60), (tmp_path / "common.pt").read_bytes()[:200]):
        (tmp_path / "common.pt").write_bytes(damaged)
        with pytest.raises(DataError, match="does not say how many steps"):
            read_numbers(tmp_path)


def test_what_came_in_goes_on_only_as_what_it_is(tiny_model: Any, tmp_path: Path) -> None:
    hf, run = tiny_model("llama"), tmp_path / "run"
    convert(exported(state_of(hf), hf, tmp_path), run, model=str(hf), moments=True)

    def decided(*words: str, model: Path = hf) -> Any:
        return decide_train(run, compose_job([f"model.path={model}", f"run_dir={run}", *words]))

    decision = decided("tuner=full", "steps=8")
    assert (decision.kind, decision.step) == ("resume", 6)
    assert decision.message == f"going on in {run} after 6 steps of another tool, of 8"
    assert is_ours(run)
    for words, other, message, hint in (
        ([], hf, "holds a whole model with its moments, not an adapter", "tuner=full"),
        (["tuner=full", "optimizer=galore"], hf, "holds Adam's moments, which are none of galore", "optimizer=adamw"),
        (["tuner=full", "steps=6"], hf, "has done 6 steps in another tool, and steps=6 counts them", "steps=7"),
        (
            ["tuner=full", "steps=8"],
            tiny_model("llama", num_hidden_layers=5),
            "holds another model than .*: layers 4, not 5",
            f"model.path={run / 'checkpoints/step-000006/model'}",
        ),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            decided(*words, model=other)
        assert error.value.hint == hint
    assert decided("tuner=full", "steps=8", model=run / "checkpoints/step-000006/model").step == 6
    (run / "isotrain.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        decided("tuner=full")


def test_other_commands_know_what_came_in(tiny_model: Any, tmp_path: Path, capsys: Any) -> None:
    hf, run = tiny_model("llama"), tmp_path / "run"
    convert(exported(state_of(hf), hf, tmp_path), run, model=str(hf), moments=True)
    assert main(["verify", str(run)]) == 0 and main(["checkpoints", str(run)]) == 0
    words = ["tuner=full", "steps=8", "optimizer.schedule=constant", "batch.sequence_tokens=64", f"run_dir={run}"]
    write_run(run, compose_job([f"model.path={hf}", *words]), "{}")  # a launch that ended before its first save
    capsys.readouterr()
    assert main(["resume", str(run), "--explain"]) == 0
    said = capsys.readouterr().out
    assert "the first that step 7 has; what was read before lies in another tool" in said
    assert "constant, at step 6 of 8" in said and "after 5 updates" in said


def test_moments_are_of_torch_dist_only(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no torch_dist checkpoint, and others hold no moments") as error:
        convert(tiny_model("llama"), tmp_path / "run", moments=True)
    assert error.value.hint == "leave --moments away"


def test_an_export_says_what_it_left_out(tiny_model: Any, tmp_path: Path, capsys: Any) -> None:
    norm = "model.norm.weight"
    for family, left, message in (
        ("llama", {(norm, "exp_avg"), (norm, "exp_avg_sq")}, f"weights only: 1 weights have none, first {norm}, and"),
        ("qwen3_moe", set(), "weights only: megatron-core keeps that of experts in one optimizer with the rest, or"),
        ("llama", set(), "weights and the optimizer's state\n"),
    ):
        hf = tiny_model(family)
        run = saved({key: t for key, t in state_of(hf).items() if key not in left}, hf, tmp_path / "run")
        assert main(["export", str(run), "--to", "torch_dist", str(tmp_path / "out")]) == 0
        assert message in capsys.readouterr().err
        shutil.rmtree(run)
    assert main(["export", str(tiny_model("llama")), "--to", "torch_dist", str(tmp_path / "out")]) == 0
    assert "weights only: a model's folder has no optimizer state" in capsys.readouterr().err
