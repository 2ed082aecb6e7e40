"""Weights in and out of megatron-core's ``torch_dist`` checkpoints, from and to Hugging Face folders, bit for bit.


Both ways go tensor by tensor; the largest one is in memory twice at most. The table of names is a family's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestrator.checkpoint.folder import sync_folder, write_durably
from orchestrator.checkpoint.hf_reader import HfReader, weight_files
from orchestrator.checkpoint.layout import LogicalTensor, make_layout, weight_index
from orchestrator.checkpoint.load import CheckpointReader
from orchestrator.checkpoint.megatron_names import LAYERS, Place, Whole, find_places, stored_place, wholes
from orchestrator.checkpoint.out_folder import copy_companions, fresh_folder, write_json
from orchestrator.checkpoint.tensor_file import TORCH_DTYPES, FileWriter
from orchestrator.checkpoint.torch_dist import METADATA, TorchDistReader
from orchestrator.errors import ConfigError, DataError
from parallel import names
from parallel.families import read_model
from parallel.shards import Box
from parallel.specs import ModelSpec, read_hf_config

NEWEST = "latest_checkpointed_iteration.txt"  # in the folder above, where Megatron-LM saves
OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")  # tensors that are no weights
# Modules of transformer-engine's layers that keep a state of their own for fp8; it is empty otherwise.
STATEFUL = ("self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj")
STATEFUL_DENSE, STATEFUL_EXPERT = ("mlp.linear_fc1", "mlp.linear_fc2"), ("linear_fc1", "linear_fc2")


@dataclass(frozen=True)
class _Source:
    """Where a logical tensor comes from: boxes of tensors that are stored whole."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Place, Whole], ...]


def checkpoint_folder(folder: Path) -> Path:
    """The folder with the newest checkpoint where Megatron-LM has saved, or the folder itself.

    Raises:
        DataError: ``latest_checkpointed_iteration.txt`` names none that is there.
    """
    newest = folder / NEWEST
    if (folder / METADATA).exists() or not newest.exists():
        return folder
    word = newest.read_bytes().decode(errors="replace").strip()
    name = f"iter_{int(word):07d}" if re.fullmatch(r"[0-9]{1,9}", word) else "release"
    if (name == "release" and word != name) or not (folder / name / METADATA).exists():
        raise DataError(f"{newest} names {word[:40]!r}, which is no torch_dist checkpoint in {folder}")
    return folder / name


def import_torch_dist(folder: Path, config: Path, out: Path) -> None:
    """Write the weights of a torch_dist checkpoint as a Hugging Face model folder, in their stored types.

    Args:
        folder: of a checkpoint, or where Megatron-LM has saved several (then the newest). Needs no trust.
        config: a folder with the model's ``config.json`` (and tokenizer), which are copied.
        out: a new folder.
    Raises:
        ConfigError: the checkpoint is not of the model in ``config``, or ``out`` is taken.
        DataError: the checkpoint is damaged.
        ResourceError: no space is left.
    """
    spec = read_model(read_hf_config(config))
    reader = TorchDistReader(checkpoint_folder(folder))
    sources = _sources(spec, reader)
    layout = make_layout(
        (LogicalTensor(name, "weight", each.shape, each.dtype) for name, each in sources.items()), "model", ranks=1
    )
    embedded = sources[names.EMBEDDING].dtype
    with fresh_folder(out, layout.bytes, [folder, config], {"to": "safetensors"}) as temporary:
        for file in layout.files:
            writer = FileWriter(temporary / Path(file.path).name, file.entries)
            try:
                for tensor in file.tensors:
                    writer.write(_gathered(reader, tensor.name, sources[tensor.name]))
                writer.close()
            finally:
                writer.abort()
        if (index := weight_index(layout.files)) is not None:
            write_json(temporary / "model.safetensors.index.json", index)
        copy_companions(config, temporary, embedded)


def _sources(spec: ModelSpec, reader: TorchDistReader) -> dict[str, _Source]:
    """Where each logical tensor lies. Raises ConfigError where the checkpoint lacks one, or has more."""
    used: set[str] = set()
    parts: dict[str, list[tuple[Place, Whole]]] = {}
    for whole in wholes(spec):
        places = find_places(whole, reader.keys)
        if not places:
            raise _other_model(reader, spec, f"has no {stored_place(whole).key}")
        for place, part in places:
            _check_shape(reader, spec, place, part)
            used.add(place.key)
            for name in dict.fromkeys(piece.name for piece in part.pieces):
                parts.setdefault(name, []).append((place, part))
    more = sorted(key for key in reader.keys if key not in used and not OPTIMIZER.match(key))
    if more:
        raise _other_model(reader, spec, f"holds {len(more)} tensors more, first {more[0]}")
    shapes = {piece.name: piece.shape for found in parts.values() for _, part in found for piece in part.pieces}
    return {
        name: _Source(reader.stored(found[0][0].key).dtype, shapes[name], tuple(found)) for name, found in parts.items()
    }


def _check_shape(reader: TorchDistReader, spec: ModelSpec, place: Place, part: Whole) -> None:
    shape = reader.stored(place.key).shape
    axes, inner = shape[: len(place.axes)], shape[len(place.axes) :]
    fits = inner == part.shape or (part.padded and inner[1:] == part.shape[1:] and inner[0] > part.shape[0])
    if axes != place.counts or not fits:
        raise _other_model(reader, spec, f"has {place.key} of shape {shape}, not {(*place.counts, *part.shape)}")
    if reader.stored(place.key).dtype not in TORCH_DTYPES:
        raise _other_model(reader, spec, f"has {place.key} of type {reader.stored(place.key).dtype}")


def _other_model(reader: TorchDistReader, spec: ModelSpec, what: str) -> ConfigError:
    return ConfigError(
        f"{reader.folder} {what}: it is not a checkpoint of the {spec.family} model with {spec.layers} layers",
        "name the folder of this model's config.json: --model FOLDER",
    )


def _gathered(reader: TorchDistReader, name: str, source: _Source) -> torch.Tensor:
    result = torch.empty(source.shape, dtype=TORCH_DTYPES[source.dtype])
    for place, part in source.parts:
        inner = Box.whole(part.shape)
        box = Box((*place.lead, *inner.offset), (*(1 for _ in place.lead), *inner.size))
        data = reader.read(place.key, box).reshape(part.shape)
        for piece in part.pieces:
            if piece.name == name:
                result[piece.box.slices] = data[piece.local.slices]
    return result


def export_torch_dist(model: Path, out: Path, step: int = 0) -> None:
    """Write a Hugging Face model folder as a torch_dist checkpoint, in its own types, as Megatron-LM's ``release``.

    ``out/release`` is what megatron-core's dist_checkpointing loads, on any topology. The vocabulary is not padded;
    megatron-core pads it with zeros while it loads. There is no optimizer state in it.

    Raises:
        ConfigError, SpecError: the model is of a family that megatron-core has no layers for, its fused tensors have
            several types, or ``out`` is taken.
        DataError: the model is damaged.
        ResourceError: no space is left.
    """
    from orchestrator.checkpoint.torch_dist_writer import TorchDistWriter

    spec = read_model(read_hf_config(model))
    reader = HfReader(model)
    needed = sum(path.stat().st_size for path in weight_files(model))
    with fresh_folder(out, needed, [model], {"to": "torch_dist"}) as temporary:
        (temporary / "release").mkdir()
        with TorchDistWriter(temporary / "release", {"checkpoint_version": 3.0, "iteration": step}) as writer:
            for whole in wholes(spec):
                place = stored_place(whole)
                writer.add(place.key, place.lead, place.counts, _fused(reader, whole))
            for key in _stateful(spec):
                writer.add_nothing(key)
        sync_folder(temporary / "release")
        write_durably(temporary / NEWEST, b"release\n")


def export_checkpoint(checkpoint_folder: Path, out: Path) -> None:
    """:func:`export_torch_dist` of a checkpoint of full tuning, proven by its digests.

    Raises:
        ConfigError: it holds an adapter; says how to merge it first. And as :func:`export_torch_dist`.
    """
    checkpoint = CheckpointReader(checkpoint_folder, verify=True)
    if checkpoint.manifest.room != "model":
        raise ConfigError(
            f"{checkpoint.folder} holds an adapter, and megatron-core's checkpoints hold whole models",
            f"isotrain export {checkpoint.folder} --to merged MERGED && isotrain export MERGED --to torch_dist {out}",
        )
    export_torch_dist(checkpoint.folder / "model", out, checkpoint.step)


def _fused(reader: HfReader, whole: Whole) -> torch.Tensor:
    dtypes: Mapping[str, str] = {piece.name: reader.dtype(piece.name) for piece in whole.pieces}
    if len(set(dtypes.values())) > 1:
        raise ConfigError(
            f"{' and '.join(f'{name} ({dtype})' for name, dtype in dtypes.items())} are one tensor in megatron-core",
            "export the model in one precision first",
        )
    result = torch.empty(whole.shape, dtype=TORCH_DTYPES[next(iter(dtypes.values()))])
    for piece in whole.pieces:
        result[piece.local.slices] = reader.read(piece.name, "weight", piece.box)
    return result


def _stateful(spec: ModelSpec) -> Iterator[str]:
    """Keys of the empty states that transformer-engine's layers, and megatron-core's linears, ask for."""
    norms = (*("self_attention.q_layernorm", "self_attention.k_layernorm") * spec.qk_norm, "pre_mlp_layernorm")
    yield "decoder.final_layernorm._extra_state/shard_0_1"
    for layer in range(spec.layers):
        for path in (*STATEFUL, *norms, *(STATEFUL_DENSE * (not spec.is_moe))):
            yield f"{LAYERS}{path}._extra_state/shard_{layer}_{spec.layers}"
        for expert in range(spec.experts):
            for leaf in STATEFUL_EXPERT:
                place = f"shard_{layer}.{expert}_{spec.layers}.{spec.experts}"
                yield f"{LAYERS}mlp.experts.experts.{leaf}._extra_state/{place}"
