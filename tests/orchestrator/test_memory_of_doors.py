"""Merging, converting and exporting a model take less memory than the model: they stream over its files."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orchestrator.checkpoint.adapter import adapter_config
from orchestrator.checkpoint.layout import LogicalTensor, make_layout, weight_index
from orchestrator.checkpoint.megatron_names import wholes
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.save import save
from orchestrator.checkpoint.tensor_file import header_bytes
from orchestrator.config.job import TunerConfig
from parallel.families import read_model
from parallel.shards import Box, Shard
from tests.helpers.runs import config

CONFIG = config(
    "llama",
    num_hidden_layers=4,
    hidden_size=2048,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    intermediate_size=8192,
    vocab_size=8192,
)
LARGEST = 2 * 8192 * 2048 * 4  # gate|up of a layer, fp32
ALLOWED = 2 * LARGEST + 128 * 2**20

MEASURE = textwrap.dedent("""
    import sys, threading, time
    from pathlib import Path

    import orchestrator.exporting, orchestrator.convert, orchestrator.checkpoint.pickles
    import orchestrator.checkpoint.megatron_weights, orchestrator.checkpoint.torch_dist_writer
    from orchestrator.checkpoint.export import export_merged

    def private_bytes():
        return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line[:7] == "RssAnon") * 1024

    peak, ended = [0], threading.Event()
    def watch():
        while not ended.is_set():
            peak[0] = max(peak[0], private_bytes())
            time.sleep(0.002)
        peak[0] = max(peak[0], private_bytes())  # what held the interpreter until the end

    before = private_bytes()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        {work}
    finally:
        ended.set()
        thread.join()
    print(peak[0] - before)
""")


def peak_bytes(work: str) -> int:
    """How much private memory a process needs for some work, beyond what it has with everything imported."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE.format(work=work)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of more than a GiB, all zeros: files with holes."""
    folder = tmp_path_factory.mktemp("large") / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shapes = {piece.name: piece.shape for whole in wholes(read_model(CONFIG)) for piece in whole.pieces}
    layout = make_layout((LogicalTensor(name, "weight", size, "F32") for name, size in shapes.items()), "model", 1)
    for file in layout.files:
        with (folder / Path(file.path).name).open("wb") as stream:
            stream.write(header_bytes(file.entries))
            stream.truncate(file.bytes)
    (folder / "model.safetensors.index.json").write_text(json.dumps(weight_index(layout.files)))
    assert layout.bytes > 2**30 > 2 * ALLOWED
    return folder


def merge(model: Path, tmp_path: Path) -> str:
    a, b = torch.ones(8, 2048), torch.ones(8192, 8)
    stem = "base_model.model.model.layers.3.mlp.up_proj.lora_"
    shards = [Shard(f"{stem}{side}.weight", "weight", tuple(m.shape), Box.whole(tuple(m.shape)), m) for side, m in (("A", a), ("B", b))]  # fmt: skip # noqa: E501
    files = {"adapter_config.json": json.dumps(adapter_config(TunerConfig(r=8), ["up_proj"], str(model))).encode()}
    saved = save(tmp_path / "checkpoints", 1, shards, Contents("adapter", {}, files))
    return f"export_merged(Path({str(saved)!r}), Path({str(model)!r}), Path({str(tmp_path / 'out')!r}))"


def to_torch_dist(model: Path, tmp_path: Path) -> str:
    return f"orchestrator.exporting.export(Path({str(model)!r}), 'torch_dist', Path({str(tmp_path / 'out')!r}))"


def from_torch_dist(model: Path, tmp_path: Path, run: Path | None = None) -> str:
    from orchestrator.exporting import export

    export(run or model, "torch_dist", tmp_path / "megatron")
    words = f"Path({str(tmp_path / 'megatron')!r}), Path({str(tmp_path / 'out')!r}), model={str(model)!r}"
    return f"orchestrator.convert.convert({words}, moments={run is not None})"


def from_pickle(model: Path, tmp_path: Path) -> str:
    from tests.helpers.exported import hf_weights

    (tmp_path / "old").mkdir()
    (tmp_path / "old/config.json").write_text(json.dumps(CONFIG))
    torch.save(hf_weights(model), tmp_path / "old/pytorch_model.bin")
    words = f"Path({str(tmp_path / 'old')!r}), Path({str(tmp_path / 'out')!r}), allow_pickle=True"
    return f"orchestrator.convert.convert({words})"


def a_run(model: Path, run: Path) -> Path:
    """A checkpoint of full tuning with moments, all of one stored zero."""
    shapes = {piece.name: piece.shape for whole in wholes(read_model(CONFIG)) for piece in whole.pieces}
    shards = [
        Shard(name, kind, size, Box.whole(size), torch.zeros(1).expand(size))
        for name, size in shapes.items()
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    ]
    schedule = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "schedule": "constant"}
    state = {"step": 6, "samples_consumed": 48, "optimizer_steps": 6, "schedule": schedule | {"steps": 10}}
    save(run / "checkpoints", 6, shards, Contents("model", state, {"config.json": model / "config.json"}))
    return run


def run_to_torch_dist(model: Path, tmp_path: Path) -> str:
    return to_torch_dist(a_run(model, tmp_path / "run"), tmp_path)


def run_from_torch_dist(model: Path, tmp_path: Path) -> str:
    return from_torch_dist(model, tmp_path, a_run(model, tmp_path / "run"))


@pytest.mark.grid  # each writes a GiB to six
@pytest.mark.parametrize(
    "door", [merge, to_torch_dist, from_torch_dist, from_pickle, run_to_torch_dist, run_from_torch_dist]
)
def test_a_model_larger_than_what_it_may_use_passes(
    model: Path, tmp_path: Path, door: Callable[[Path, Path], str]
) -> None:
    used = peak_bytes(door(model, tmp_path))
    print(f"{door.__name__}: {used / 2**20:.0f} MiB of private memory")
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*")) > 2**30
    assert used < ALLOWED
    assert peak_bytes(f"x = bytearray({ALLOWED})") > 0.9 * ALLOWED  # more would have been seen
