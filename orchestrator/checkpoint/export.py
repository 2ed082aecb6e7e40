"""Handing a checkpoint on: as a PEFT adapter, or merged into its base. Streams; the base is only read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from orchestrator.checkpoint.adapter import OURS, LoraPair, lora_pairs, saved_tensors
from orchestrator.checkpoint.experts import (
    JoinedHalf,
    common_name,
    has_experts,
    join,
    joined_config,
    joined_halves,
    weight_places,
)
from orchestrator.checkpoint.hf_reader import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    AdapterReader,
    read_json,
    weight_files,
)
from orchestrator.checkpoint.load import CheckpointReader, check_file
from orchestrator.checkpoint.out_folder import copy_companions, copy_file, fresh_folder, write_json
from orchestrator.checkpoint.quantised_base import QuantisedBase
from orchestrator.checkpoint.tensor_file import TORCH_DTYPES, FileWriter, TensorEntry, TensorFiles, lay_out
from orchestrator.errors import ConfigError
from parallel.families import read_model
from parallel.shards import Box
from parallel.specs import read_hf_config

BUFFER_BYTES = 64 * 2**20
FLOATS = ("F64", "F32", "BF16", "F16")
PRECISIONS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


def export_adapter(checkpoint_folder: Path, out: Path) -> None:
    """Copy a checkpoint's adapter, proven by its digests, into ``out``: PEFT loads it as it is.

    Adapters of experts are joined as PEFT 0.21 writes them itself for transformers 5.

    Raises:
        ConfigError: it is a checkpoint of full tuning, PEFT has no place for what it has learnt, or ``out`` holds
            something that is not ours.
        DataError: a file is damaged.
        ResourceError: no space is left.
    """
    checkpoint = CheckpointReader(checkpoint_folder)
    if checkpoint.manifest.room != "adapter":
        raise ConfigError(f"{checkpoint.folder} holds a full model, no adapter", "export it with --to merged")
    check_peft(checkpoint.folder / "adapter")
    records = {path: record for path, record in checkpoint.manifest.files.items() if path.startswith("adapter/")}
    needed = sum(record.bytes for record in records.values())
    with fresh_folder(out, needed, [checkpoint.folder], {"step": checkpoint.step, "to": "peft"}) as folder:
        for path, record in records.items():
            check_file(checkpoint.folder / path, record, verify=True)
        adapter = AdapterReader(checkpoint.folder / "adapter")
        joined = has_experts(adapter.names)
        if joined:
            _write_joined(adapter, folder)
        for path in records:
            name = path.removeprefix("adapter/")
            if not joined or name not in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
                copy_file(checkpoint.folder / path, folder / name)


def check_peft(adapter: Path) -> None:
    """Raises ConfigError where PEFT has no place for what an adapter's folder holds."""
    if read_json(adapter / ADAPTER_CONFIG).get("peft_type") == OURS:
        raise ConfigError(
            f"{adapter} has DoRA or dropout on experts or routers, which PEFT has no place for",
            "export it with --to merged",
        )


def _write_joined(adapter: AdapterReader, folder: Path) -> None:
    """Write an adapter with one tensor for all experts of a layer, tensor by tensor."""

    def whole(name: str) -> torch.Tensor:
        return adapter.read(name, "weight", Box.whole(adapter.shape(name)))

    def joined(half: JoinedHalf) -> torch.Tensor:
        return join(half, [[whole(name) for name in parts] for parts in half.parts])

    halves, rest = joined_halves(adapter.names)
    made: dict[str, Callable[[], torch.Tensor]] = {common_name(name): partial(whole, name) for name in rest}
    entries = [TensorEntry(common_name(name), adapter.dtype(name), adapter.shape(name)) for name in rest]
    for half in halves:
        first = half.parts[0][0]
        out, r = adapter.shape(first)
        count, parts = len(half.parts), len(half.parts[0])
        shape = (count * parts * out, r) if half.side == "A" else (parts * out, parts * r * count)
        entries.append(TensorEntry(half.key, adapter.dtype(first), shape))
        made[half.key] = partial(joined, half)
    writer = FileWriter(folder / ADAPTER_WEIGHTS, placed := lay_out(entries))
    try:
        for entry in placed:
            writer.write(made[entry.key]().contiguous())
        writer.close()
    finally:
        writer.abort()
    write_json(folder / ADAPTER_CONFIG, joined_config(adapter.config, adapter.names))


def export_merged(checkpoint_folder: Path, base: Path | None, out: Path, precision: str | None = None) -> None:
    """Write the whole model with the adapter merged into it: transformers loads it as it is.

    ``W + scale * B @ A`` (its rows stretched to DoRA's magnitudes; of an embedding its columns) is computed in fp32,
    block of rows by block of rows, and cast once. Files are cut as the base's are. A checkpoint of full tuning is its
    own base.

    Args:
        base: the Hugging Face folder that the adapter was trained on; only read. None for full tuning.
        precision: "fp32", "bf16" or "fp16"; by default each tensor keeps the base's type.
    Raises:
        ConfigError: there is no base, or it lacks a target or has it in another shape, the adapter is no plain LoRA,
            or ``out`` holds something that is not ours.
        DataError: a file is damaged.
        ResourceError: no space is left.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is not known", f"choose one of {', '.join(PRECISIONS)}")
    checkpoint = CheckpointReader(checkpoint_folder)
    room = checkpoint.folder / checkpoint.manifest.room
    for name, record in checkpoint.manifest.files.items():
        if name.startswith(f"{checkpoint.manifest.room}/"):
            check_file(checkpoint.folder / name, record, verify=True)
    adapter = AdapterReader(room) if checkpoint.manifest.room == "adapter" else None
    if adapter is None:
        base = room
    elif base is None:
        raise ConfigError(
            f"{checkpoint.folder} holds an adapter: a merge needs its base model", "export it with --to peft"
        )
    pairs = {common_name(name): pair for name, pair in lora_pairs(adapter, room).items()} if adapter else {}
    paths = weight_files(base)
    tensors = TensorFiles(paths)
    _check_targets(tensors, pairs, adapter, base)
    saved = saved_tensors(adapter, room) if adapter else {}
    source = QuantisedBase(tensors, base, checkpoint.manifest.about)
    plans = _plan_files(tensors, paths, PRECISIONS.get(precision or ""))
    needed = sum(entry.bytes for entries in plans.values() for entry in entries)
    with fresh_folder(out, needed, [checkpoint.folder, base], {"step": checkpoint.step, "to": "merged"}) as folder:
        for path, entries in plans.items():
            writer = FileWriter(folder / path.name, entries)
            try:
                for entry in entries:
                    columns = _column_factors(source, entry, pairs, adapter)
                    for rows in row_boxes(entry):
                        if adapter is not None and entry.key in saved:
                            whole = adapter.read(saved[entry.key], "weight", rows)
                            writer.write(whole.to(TORCH_DTYPES[entry.dtype]))
                            continue
                        merged = _merged(source, entry, rows, pairs, adapter)
                        merged = merged if columns is None else merged * columns
                        writer.write(merged.to(TORCH_DTYPES[entry.dtype]))
                writer.close()
            finally:
                writer.abort()
        if len(plans) > 1:
            weight_map = {entry.key: path.name for path, entries in plans.items() for entry in entries}
            write_json(folder / INDEX, {"metadata": {"total_size": needed}, "weight_map": weight_map})
        copy_companions(base, folder, PRECISIONS.get(precision or ""))


def _check_targets(
    tensors: TensorFiles, pairs: Mapping[str, LoraPair], adapter: AdapterReader | None, base: Path
) -> None:
    held: dict[str, tuple[str, tuple[int, ...]]] = {}
    for key in tensors.keys:
        entry = tensors.entry(key)
        held |= {name: (key, box.size[1:]) for name, box in weight_places(key, entry.shape)} or {
            common_name(key): (key, entry.shape)
        }
    for name, pair in pairs.items():
        if name not in held:
            hint = "give the base model that the adapter was trained on"
            if name == "lm_head.weight":
                hint = "its lm_head is tied to the embedding: merging would change both. Export with --to peft"
            raise ConfigError(f"{base} has no {pair.base}, which the adapter changes", hint)
        key, shape = held[name]
        entry = tensors.entry(key)
        assert adapter is not None
        a, b = adapter.shape(pair.a), adapter.shape(pair.b)
        if pair.transposed and read_model(read_hf_config(base)).tied_embeddings:
            raise ConfigError(
                f"the head of {base} is tied to {pair.base}, and merging would change both",
                "export it with --to peft",
            )
        if shape != ((a[1], b[0]) if pair.transposed else (b[0], a[1])) or a[0] != b[1]:
            raise ConfigError(f"{name} has shape {shape} in {base}, the adapter's update is {b} @ {a}")
        if entry.dtype not in FLOATS:
            raise ConfigError(f"{name} has type {entry.dtype} in {base}: nothing can be merged into quantised weights")


def _plan_files(tensors: TensorFiles, paths: Sequence[Path], dtype: str | None) -> dict[Path, tuple[TensorEntry, ...]]:
    """The tensors of each file with their types after the merge."""
    plans: dict[Path, list[TensorEntry]] = {path: [] for path in paths}
    for key in tensors.keys:
        entry = tensors.entry(key)
        if entry.dtype not in TORCH_DTYPES:
            raise ConfigError(f"{key} has type {entry.dtype}, which is not supported")
        kept = dtype is None or entry.dtype not in FLOATS
        plans[tensors.path(key)].append(TensorEntry(key, entry.dtype if kept else str(dtype), entry.shape))
    return {path: lay_out(entries) for path, entries in plans.items()}


def row_boxes(entry: TensorEntry) -> Iterator[Box]:
    """Boxes of whole rows in order, each of about BUFFER_BYTES in fp32 (one row at least)."""
    whole = Box.whole(entry.shape)
    if not whole.elements:
        return
    if not entry.shape:
        yield whole
        return
    rows = max(1, BUFFER_BYTES // (4 * whole.elements // entry.shape[0]))
    for start in range(0, entry.shape[0], rows):
        count = min(rows, entry.shape[0] - start)
        yield Box((start, *whole.offset[1:]), (count, *entry.shape[1:]))


def _merged(
    source: QuantisedBase, entry: TensorEntry, rows: Box, pairs: Mapping[str, LoraPair], adapter: AdapterReader | None
) -> torch.Tensor:
    """Some rows of a tensor (of joined experts: some experts) as they are written, in fp32 or more where they change.

    The columns of an embedding are not stretched yet.
    """
    data = source.read(entry.key, rows)
    if adapter is not None:
        wide = torch.promote_types(data.dtype, torch.float32)
        if (pair := pairs.get(common_name(entry.key))) is not None:
            data = data.to(wide) + _update(adapter, pair, rows.offset[0], rows.size[0]).to(wide)
            # arXiv:2402.09353, equation 5; a block holds whole rows
            if pair.magnitude is not None and not pair.transposed:
                length = adapter.read(pair.magnitude, "weight", Box(rows.offset[:1], rows.size[:1])).to(wide)
                data *= (length / torch.linalg.vector_norm(data, dim=1))[:, None]
        for name, place in weight_places(entry.key, entry.shape):
            if name in pairs and (box := place.intersect(rows)) is not None:
                data = data.to(wide)
                inside = data[box.shift(tuple(-offset for offset in rows.offset)).slices]
                inside += _update(adapter, pairs[name], 0, box.size[1]).to(wide)
                if (magnitude := pairs[name].magnitude) is not None:
                    length = adapter.read(magnitude, "weight", Box((0,), (box.size[1],))).to(wide)
                    inside *= (length / torch.linalg.vector_norm(inside, dim=2))[..., None]
    return data


def _column_factors(
    source: QuantisedBase, entry: TensorEntry, pairs: Mapping[str, LoraPair], adapter: AdapterReader | None
) -> torch.Tensor | None:
    """By what DoRA stretches the columns of an embedding: they go over all rows, so these are read once before."""
    pair = pairs.get(common_name(entry.key))
    if adapter is None or pair is None or pair.magnitude is None or not pair.transposed:
        return None
    blocks = (_merged(source, entry, rows, pairs, adapter) for rows in row_boxes(entry))
    squares = torch.stack([block.double().square().sum(dim=0) for block in blocks]).sum(dim=0)
    length = adapter.read(pair.magnitude, "weight", Box.whole(entry.shape[1:]))
    return (length / squares.sqrt()).float()


def _update(adapter: AdapterReader, pair: LoraPair, start: int, count: int) -> torch.Tensor:
    """Rows ``start .. start + count`` of ``scale * B @ A``, in fp32."""
    r = adapter.shape(pair.a)[0]
    if pair.transposed:
        columns = adapter.read(pair.a, "weight", Box((0, start), (r, count))).float()
        whole = adapter.read(pair.b, "weight", Box.whole(adapter.shape(pair.b))).float()
        return pair.scale * (whole @ columns).t()
    a = adapter.read(pair.a, "weight", Box.whole(adapter.shape(pair.a))).float()
    b = adapter.read(pair.b, "weight", Box((start, 0), (count, r))).float()
    return pair.scale * (b @ a)
