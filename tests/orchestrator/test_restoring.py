"""A run goes on with the data, the base and the model that its checkpoint was made with, or says why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from orchestrator.checkpoint.base import check_base, fingerprint
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.save import save
from orchestrator.config.job import BatchConfig, DataConfig, JobConfig, ModelConfig
from orchestrator.errors import ConfigError, DataError
from orchestrator.restoring import Restoring, restore
from orchestrator.training import Cursor
from parallel.shards import Box, Shard

JOB = JobConfig(model=ModelConfig(path="/model"), data=DataConfig(path="/data"), batch=BatchConfig(global_sequences=8))


class Named:
    """An engine with these tensors; what it loads it notes."""

    def __init__(self, *names: str) -> None:
        self.tensors = {name: torch.zeros(2, 2) for name in names}
        self.steps = 0

    def shards(self) -> Iterator[Shard]:
        for name, data in self.tensors.items():
            yield Shard(name, "weight", (2, 2), Box.whole((2, 2)), data)

    def load(self, reader: Any, *, moments: bool) -> None:
        for name, data in self.tensors.items():
            data.copy_(reader.read(name, "weight", Box.whole((2, 2))))

    def set_optimizer_steps(self, steps: int) -> None:
        self.steps = steps


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def wanted(tmp_path: Path) -> Restoring:
    data = {"path": "/data", "sha256": "d" * 64, "rows": 20}
    state = {"step": 6, "samples_consumed": 24, "optimizer_steps": 6, "data": data}
    shards = [Shard(name, "weight", (2, 2), Box.whole((2, 2)), torch.ones(2, 2)) for name in ("a", "b")]
    contents = Contents("adapter", state, {}, {"model": "/model", "base": "b" * 64})
    save(tmp_path / "checkpoints", 6, shards, contents)
    return Restoring(JOB, tmp_path, "d" * 64, "b" * 64, dist.group.WORLD)  # type: ignore[arg-type]


def test_it_goes_on_at_the_sample_after_the_last_whatever_a_step_takes_now(wanted: Restoring) -> None:
    engine: Any = Named("a", "b")
    assert restore(engine, 0, wanted) == Cursor(6, 24)
    assert engine.steps == 6 and all(bool(data.eq(1).all()) for data in engine.tensors.values())


def test_a_model_with_fewer_or_more_tensors_is_refused(wanted: Restoring) -> None:
    fewer: Any = Named("a")
    with pytest.raises(ConfigError, match="holds what this job has no place for: b: it is of another model") as error:
        restore(fewer, 0, wanted)
    assert error.value.hint == f"isotrain resume {wanted.run_dir} --explain"
    job = dataclasses.replace(JOB, model=ModelConfig(path="/smaller"))
    with pytest.raises(ConfigError, match="has no place for: b") as error:
        restore(fewer, 0, dataclasses.replace(wanted, job=job))
    assert error.value.hint == f"isotrain resume {wanted.run_dir} model.path=/model"
    more: Any = Named("a", "b", "c")
    with pytest.raises(ConfigError, match=r"has no tensor .*'c'.*, which this job trains"):
        restore(more, 0, wanted)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_sha256": "e" * 64}, "data.path=/data has changed since step 6: sha256 dddddddddddd then, eeeeeeeeeeee"),
        ({"base": "c" * 64}, "weights of model.path=/model have changed since step 6: fingerprint bbbbbbbbbbbb then"),
    ],
)
def test_what_has_changed_under_its_name_is_refused(wanted: Restoring, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        restore(Named("a", "b"), 0, dataclasses.replace(wanted, **changes))  # type: ignore[arg-type]


def test_other_weights_under_another_name_are_another_run(wanted: Restoring) -> None:
    job = dataclasses.replace(JOB, model=ModelConfig(path="/other"))
    other = dataclasses.replace(wanted, job=job, base="c" * 64)
    assert restore(Named("a", "b"), 0, other).steps == 6  # type: ignore[arg-type]


def test_a_fingerprint_is_of_the_weights_and_of_nothing_else(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_model("llama")
    file = tmp_path / "moved" / "model.safetensors"
    file.parent.mkdir()
    file.write_bytes((model / "model.safetensors").read_bytes())
    (file.parent / "README.md").write_text("mine")
    assert fingerprint(file.parent) == fingerprint(model)
    tensors = load_file(file)
    for name in tensors:  # each tensor is larger than the room between two samples, or nearly
        save_file({key: data + (key == name) for key, data in tensors.items()}, file, metadata={"format": "pt"})
        if tensors[name].numel() * 4 > file.stat().st_size / 60:
            assert fingerprint(file.parent) != fingerprint(model), name


def test_a_merge_into_other_weights_is_refused(wanted: Restoring, tiny_model: Callable[..., Path]) -> None:
    checkpoint = wanted.run_dir / "checkpoints" / "step-000006"
    with pytest.raises(DataError, match=r"was trained on other weights than .* holds: fingerprint bbbbbbbbbbbb, "):
        check_base(checkpoint, tiny_model("llama"))
