"""Saving from any cut over any ranks gives the same bytes; a failure on any rank leaves what was there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from orchestrator.checkpoint import exchange as exchange_module
from orchestrator.checkpoint.coverage import CoverageError
from orchestrator.checkpoint.load import CheckpointReader, open_checkpoint
from orchestrator.checkpoint.publish import Contents
from orchestrator.checkpoint.save import SavePolicy, save
from orchestrator.checkpoint.verify import verify
from orchestrator.errors import IsotrainError, ResourceError
from parallel.shards import KINDS, Box, Shard, flat_boxes
from tests.helpers.pool import Pool

LAYER = {"q": (12, 8), "k": (6, 8), "norm": (7,), "experts": (2, 5, 3)}
SHAPES = {f"model.layers.{layer}.{name}.weight": shape for layer in (0, 2, 10) for name, shape in LAYER.items()}
SHAPES |= {"scale": (), "none": (0, 4)}


def logical(name: str, kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that depends on its name only, never on who asks."""
    seed = int.from_bytes(hashlib.sha256(f"{name}{kind}".encode()).digest()[:4], "little")
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed)).to(dtype)


def boxes_of(shape: tuple[int, ...], cut: str, rank: int, world: int, position: int) -> Iterator[Box]:
    """This rank's boxes of a tensor under a kind of cut."""
    whole = Box.whole(shape)
    if cut == "replicas" or not shape or not whole.elements:
        yield whole
    elif cut == "stages":
        if position % world == rank:
            yield whole
    elif cut == "flat":
        edges = [whole.elements * part // world for part in range(world + 1)]
        yield from (box for box, _ in flat_boxes(shape, edges[rank], edges[rank + 1]))
    else:
        axis = 0 if cut == "rows" else len(shape) - 1
        edges = [shape[axis] * part // world for part in range(world + 1)]
        offset, size = list(whole.offset), list(shape)
        offset[axis], size[axis] = edges[rank], edges[rank + 1] - edges[rank]
        yield Box(tuple(offset), tuple(size))


def shards_of(cut: str, moments_cut: str) -> Iterator[Shard]:
    """This rank's shards: weights in bf16 cut one way, moments in fp32 cut another (a distributed optimizer)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for position, (name, shape) in enumerate(SHAPES.items()):
        for kind in KINDS:
            dtype = torch.bfloat16 if kind == "weight" else torch.float32
            for box in boxes_of(shape, cut if kind == "weight" else moments_cut, rank, world, position):
                data = logical(name, kind, dtype)[box.slices] if shape else logical(name, kind, dtype)
                yield Shard(name, kind, shape, box, data)


def contents(room: str = "model", step: int = 3) -> Contents:
    return Contents(room, {"step": step, "seed": 1}, {"config.json": b"{}"}, {"ranks": dist.get_world_size()})


SMALL = SavePolicy(buffer_bytes=512, file_bytes=700)


def save_cut(folder: Path, cut: str, moments_cut: str, room: str) -> str:
    final = save(folder, 3, shards_of(cut, moments_cut), contents(room), policy=SMALL)
    dist.barrier()
    return final.name


def tensor_files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("room", ["adapter", "model"])
def test_every_cut_over_every_world_writes_the_same_bytes(pool: Pool, tmp_path: Path, room: str) -> None:
    layouts = [(1, "rows", "rows"), (2, "rows", "flat"), (3, "columns", "flat"), (3, "stages", "rows")]
    layouts += [(4, "replicas", "flat"), (4, "rows", "columns"), (2, "replicas", "stages")]
    written = []
    for number, (world, cut, moments_cut) in enumerate(layouts):
        folder = tmp_path / str(number)
        assert pool.run(world, save_cut, folder, cut, moments_cut, room) == ["step-000003"] * world
        files = tensor_files(folder / "step-000003")
        manifest = json.loads(files.pop("manifest.json"))
        written.append((files, manifest["tensors"], manifest["files"]))
        assert manifest["about"] == {"ranks": world}
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000003"]
    assert all(other == written[0] for other in written)
    assert len(written[0][0]) > 4
    assert verify(folder / "step-000003").problems == ()


def test_files_are_the_safetensors_librarys_own_and_tensors_are_whole(pool: Pool, tmp_path: Path) -> None:
    pool.run(3, save_cut, tmp_path, "columns", "flat", "model")
    folder = tmp_path / "step-000003"
    seen: dict[str, torch.Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        seen |= tensors
        save_file(tensors, tmp_path / "again.safetensors", metadata={"format": "pt"})
        assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    assert len(seen) == len(KINDS) * len(SHAPES)
    reader = CheckpointReader(folder, verify=True)
    for name, shape in SHAPES.items():
        for kind in KINDS:
            expected = logical(name, kind, torch.bfloat16 if kind == "weight" else torch.float32)
            assert torch.equal(seen[name if kind == "weight" else f"{name}.{kind}"], expected)
            assert torch.equal(reader.read(name, kind, Box.whole(shape)), expected)
            digest = hashlib.sha256(expected.reshape(-1).view(torch.uint8).numpy()).hexdigest()
            assert reader.manifest.tensors[name, kind].sha256 == digest
    index = json.loads((folder / "model/model.safetensors.index.json").read_text())
    assert {folder / "model" / file for file in index["weight_map"].values()} == set(folder.glob("model/*.safetensors"))


@pytest.mark.parametrize("cut", ["rows", "columns", "flat", "stages", "replicas"])
@pytest.mark.parametrize("world", [1, 2, 5])
def test_a_save_loads_at_any_other_cut(pool: Pool, tmp_path: Path, cut: str, world: int) -> None:
    pool.run(3, save_cut, tmp_path, "columns", "flat", "model")
    reader = open_checkpoint(tmp_path)
    for rank in range(world):
        for position, (name, shape) in enumerate(SHAPES.items()):
            for kind in KINDS:
                expected = logical(name, kind, torch.bfloat16 if kind == "weight" else torch.float32)
                for box in boxes_of(shape, cut, rank, world, position):
                    assert torch.equal(reader.read(name, kind, box), expected[box.slices] if shape else expected)


def save_then(folder: Path, change: Callable[[], None] | str, step: int = 4) -> tuple[str, str, str, int]:
    """Save step 3, then step 4 with something broken on some rank; the error as every rank sees it."""
    save(folder, 3, shards_of("rows", "flat"), contents(), policy=SMALL)
    undo = BREAKAGES[str(change)]() if dist.get_rank() == dist.get_world_size() - 1 or change in FIRST else None
    try:
        save(folder, step, shards_of("rows", "flat"), contents(step=step), policy=SMALL)
    except IsotrainError as error:
        return type(error).__name__, str(error), error.hint, int(error.code)
    finally:
        if undo is not None:
            undo()
        dist.barrier()
    return "", "", "", 0


def limit_file_size() -> Callable[[], None]:
    """A real failing write: the kernel refuses files longer than 300 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def fail_fsync(code: int) -> Callable[[], Callable[[], None]]:
    def start() -> Callable[[], None]:
        real = os.fsync

        def fsync(handle: int) -> None:
            raise OSError(code, os.strerror(code), "/some/disk")

        os.fsync = fsync
        return lambda: setattr(os, "fsync", real)

    return start


def no_free_bytes() -> Callable[[], None]:
    real = shutil.disk_usage
    shutil.disk_usage = lambda folder: real(folder)._replace(free=17)
    return lambda: setattr(shutil, "disk_usage", real)


FIRST = ("full-beforehand",)  # only the first rank looks
BREAKAGES: dict[str, Callable[[], Callable[[], None]]] = {
    "too-big": limit_file_size,
    "full": fail_fsync(errno.ENOSPC),
    "quota": fail_fsync(errno.EDQUOT),
    "forbidden": fail_fsync(errno.EROFS),
    "unseen": fail_fsync(errno.ENOENT),
    "broken": fail_fsync(errno.EIO),
    "full-beforehand": no_free_bytes,
}


@pytest.mark.parametrize(
    ("breakage", "name", "message", "hint"),
    [
        ("too-big", "ResourceError", "would be larger than this process or its file system allows", "ulimit -f"),
        ("full", "ResourceError", "/some/disk: No space left on device; ", "run_dir="),
        ("quota", "ResourceError", "Disk quota exceeded", "run_dir="),
        ("full-beforehand", "ResourceError", "bytes are needed, 17 are free", "free some space"),
        ("forbidden", "ResourceError", "/some/disk cannot be written: Read-only", "let it be written again"),
        ("unseen", "ResourceError", "/some/disk cannot be written: No such file", "all nodes share"),
        ("broken", "ResourceError", "Input/output error", "check the disk"),
    ],
)
def test_a_failing_disk_on_one_rank_is_the_same_error_on_all_and_harms_nothing(
    pool: Pool, tmp_path: Path, breakage: str, name: str, message: str, hint: str
) -> None:
    answers = pool.run(3, save_then, tmp_path, breakage)
    assert len(set(answers)) == 1
    assert answers[0][0] == name and message in answers[0][1] and hint in answers[0][2]
    assert answers[0][3] == ResourceError.code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-000003"]
    assert verify(tmp_path / "step-000003").good and open_checkpoint(tmp_path).step == 3


def save_wrongly(folder: Path, fault: str) -> tuple[str, str]:
    rank = dist.get_rank()
    whole = torch.zeros(4, 4)
    shards = [Shard("a.weight", "weight", (4, 4), Box((2 * rank, 0), (2, 4)), whole[:2])]
    if fault == "hole" and rank == 1:
        shards = [Shard("a.weight", "weight", (4, 4), Box((3, 0), (1, 4)), whole[:1])]
    if fault == "overlap" and rank == 1:
        shards = [Shard("a.weight", "weight", (4, 4), Box((1, 0), (3, 4)), whole[:3])]
    if fault == "outside" and rank == 1:
        shards = [Shard("a.weight", "weight", (4, 4), Box((3, 0), (2, 4)), whole[:2])]
    if fault == "shape" and rank == 1:
        shards = [Shard("a.weight", "weight", (4, 5), Box((2, 0), (2, 4)), whole[:2])]
    if fault == "type" and rank == 1:
        shards = [Shard("a.weight", "weight", (4, 4), Box((2, 0), (2, 4)), whole[:2].half())]
    if fault == "data" and rank == 1:
        shards = [Shard("a.weight", "weight", (4, 4), Box((2, 0), (2, 4)), whole)]
    state = {"bad": {1, 2}} if fault == "state" else {}
    try:
        save(folder, 1, shards, Contents("model", state))
    except IsotrainError as error:
        return type(error).__name__, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("hole", r"[2:3, 0:4] is held by no rank (12 of 16 elements are)"),
        ("overlap", r"[0:2, 0:4] on rank 0 and [1:4, 0:4] on rank 1 overlap in [1:2, 0:4] without being equal"),
        ("outside", r"[3:5, 0:4] on rank 1 lies outside"),
        ("shape", r"rank 0 says shape (4, 4) F32, rank 1 says shape (4, 5) F32"),
        ("type", r"rank 0 says shape (4, 4) F32, rank 1 says shape (4, 4) F16"),
        ("data", r"data (4, 4) torch.float32 for a box of size (2, 4)"),
        ("state", r"the checkpoint's state is not JSON-able"),
    ],
)
def test_shards_that_make_no_whole_tensor_are_refused_on_every_rank(
    pool: Pool, tmp_path: Path, fault: str, message: str
) -> None:
    answers = pool.run(2, save_wrongly, tmp_path, fault)
    assert answers[0] == answers[1] and message in answers[0][1]
    assert answers[0][0] == (IsotrainError if fault == "state" else CoverageError).__name__
    if fault != "state":
        assert "a.weight" in answers[0][1]
    assert not list(tmp_path.iterdir())


def save_big(folder: Path, buffer_bytes: int) -> tuple[int, int]:
    """Save 3 x 24 MB with a watch on every buffer that is made; returns (peak of live buffers, sent messages)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    shape = (1500, 4000)
    data = torch.ones(shape[0] // world, shape[1])
    box = Box((rank * data.shape[0], 0), tuple(data.shape))
    live, peak, made = 0, 0, 0
    real = torch.empty

    def counted(size: int, **options: Any) -> torch.Tensor:
        nonlocal live, peak, made
        buffer = real(size, **options)
        if size < 1024:  # gathers of a few numbers, which stage nothing
            return buffer
        live, made = live + size, made + 1
        peak = max(peak, live)
        weakref.finalize(buffer.untyped_storage(), release, size)
        return buffer

    def release(size: int) -> None:
        nonlocal live
        live -= size

    exchange_module.torch.empty = counted  # type: ignore[assignment]
    try:
        shards = [Shard("w", kind, shape, box, data) for kind in KINDS]
        save(folder, 1, shards, Contents("model", {}), policy=SavePolicy(buffer_bytes=buffer_bytes, file_bytes=2**20))
    finally:
        torch.empty = real
    return peak, made


@pytest.mark.parametrize("buffer_bytes", [2**20, 2**24])
def test_no_rank_stages_more_than_the_stated_buffer(pool: Pool, tmp_path: Path, buffer_bytes: int) -> None:
    for peak, made in pool.run(3, save_big, tmp_path, buffer_bytes):
        assert made > 0 and peak <= buffer_bytes
    assert verify(tmp_path / "step-000001").good
