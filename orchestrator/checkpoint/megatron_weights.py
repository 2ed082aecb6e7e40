"""Weights in and out of megatron-core's ``torch_dist`` checkpoints, from and to Hugging Face folders, bit for bit.


Both ways go tensor by tensor; the largest one is in memory twice at most. The table of names is a family's own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from orchestrator.checkpoint.folder import sync_folder, write_durably
from orchestrator.checkpoint.hf_reader import HfReader, weight_files
from orchestrator.checkpoint.layout import LogicalTensor, make_layout, weight_index
from orchestrator.checkpoint.load import CheckpointReader
from orchestrator.checkpoint.megatron_names import LAYERS, Place, Whole, find_places, stored_place, wholes
from orchestrator.checkpoint.megatron_optimizer import (
    MOMENTS,
    OPTIMIZER,
    STATES,
    Numbers,
    common_values,
    state_key,
)
from orchestrator.checkpoint.out_folder import copy_companions, fresh_folder, write_json
from orchestrator.checkpoint.tensor_file import TORCH_DTYPES, FileWriter
from orchestrator.checkpoint.torch_dist import METADATA, Stored, TorchDistReader
from orchestrator.errors import ConfigError, DataError
from parallel import names
from parallel.engine import TensorReader
from parallel.families import read_model
from parallel.selection import weight_shapes
from parallel.shards import Box
from parallel.specs import ModelSpec, read_hf_config

if TYPE_CHECKING:
    from orchestrator.checkpoint.torch_dist_writer import TorchDistWriter

NEWEST = "latest_checkpointed_iteration.txt"  # in the folder above, where Megatron-LM saves
# Modules of transformer-engine's layers that keep a state of their own for fp8; it is empty otherwise.
STATEFUL = ("self_attention.linear_qkv", "self_attention.core_attention", "self_attention.linear_proj")
STATEFUL_DENSE, STATEFUL_EXPERT = ("mlp.linear_fc1", "mlp.linear_fc2"), ("linear_fc1", "linear_fc2")


class KeyedReader(Protocol):
    """Tensors by megatron-core's keys: weights, or one kind of their optimizer's state."""

    folder: Path

    @property
    def keys(self) -> Collection[str]: ...

    def stored(self, key: str) -> Stored: ...

    def read(self, key: str, box: Box) -> torch.Tensor: ...


@dataclass(frozen=True)
class Source:
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
    sources = sources_in(reader, spec)
    layout = make_layout(
        (LogicalTensor(name, "weight", each.shape, each.dtype) for name, each in sources.items()), "model", ranks=1
    )
    embedded = sources[names.EMBEDDING].dtype
    with fresh_folder(out, layout.bytes, [folder, config], {"to": "safetensors"}) as temporary:
        for file in layout.files:
            writer = FileWriter(temporary / Path(file.path).name, file.entries)
            try:
                for tensor in file.tensors:
                    writer.write(gathered(reader, tensor.name, sources[tensor.name]))
                writer.close()
            finally:
                writer.abort()
        if (index := weight_index(layout.files)) is not None:
            write_json(temporary / "model.safetensors.index.json", index)
        copy_companions(config, temporary, embedded)


def sources_in(reader: KeyedReader, spec: ModelSpec) -> dict[str, Source]:
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
        name: Source(reader.stored(found[0][0].key).dtype, shapes[name], tuple(found)) for name, found in parts.items()
    }


def _check_shape(reader: KeyedReader, spec: ModelSpec, place: Place, part: Whole) -> None:
    shape = reader.stored(place.key).shape
    axes, inner = shape[: len(place.axes)], shape[len(place.axes) :]
    fits = inner == part.shape or (part.padded and inner[1:] == part.shape[1:] and inner[0] > part.shape[0])
    if axes != place.counts or not fits:
        raise _other_model(reader, spec, f"has {place.key} of shape {shape}, not {(*place.counts, *part.shape)}")
    if reader.stored(place.key).dtype not in TORCH_DTYPES:
        raise _other_model(reader, spec, f"has {place.key} of type {reader.stored(place.key).dtype}")


def _other_model(reader: KeyedReader, spec: ModelSpec, what: str) -> ConfigError:
    return ConfigError(
        f"{reader.folder} {what}: it is not a checkpoint of the {spec.family} model with {spec.layers} layers",
        "name the folder of this model's config.json: --model FOLDER",
    )


def gathered(reader: KeyedReader, name: str, source: Source) -> torch.Tensor:
    """A whole logical tensor."""
    result = torch.empty(source.shape, dtype=TORCH_DTYPES[source.dtype])
    for place, part in source.parts:
        inner = Box.whole(part.shape)
        box = Box((*place.lead, *inner.offset), (*(1 for _ in place.lead), *inner.size))
        data = reader.read(place.key, box).reshape(part.shape)
        for piece in part.pieces:
            if piece.name == name:
                result[piece.box.slices] = data[piece.local.slices]
    return result


def export_torch_dist(model: Path, out: Path, step: int = 0, states: CheckpointReader | None = None) -> None:
    """Write a Hugging Face model folder as a torch_dist checkpoint, in its own types, as Megatron-LM's ``release``.

    ``out/release`` is what megatron-core's dist_checkpointing loads, on any topology. The vocabulary is not padded;
    megatron-core pads it with zeros while it loads.

    Args:
        states: holds the optimizer's state of all weights, which goes with them; then Megatron-LM is not told of a
            release (which it reads no optimizer of) but of an iteration, ``out/iter_NNNNNNN``.
    Raises:
        ConfigError, SpecError: the model is of a family that megatron-core has no layers for, its fused tensors have
            several types, or ``out`` is taken.
        DataError: the model is damaged.
        ResourceError: no space is left.
    """
    from orchestrator.checkpoint.torch_dist_writer import TorchDistWriter

    spec = read_model(read_hf_config(model))
    reader = HfReader(model)
    reader.check(model, weight_shapes(spec))
    needed = sum(path.stat().st_size for path in weight_files(model))
    name, word, common = "release", "release", {"checkpoint_version": 3.0, "iteration": step}
    if states is not None:
        needed = sum(record.bytes for record in states.manifest.files.values())
        name, word = f"iter_{step:07d}", str(step)
        numbers = Numbers(step, int(states.state["optimizer_steps"]), states.state.get("schedule", {}))
        common = common_values(numbers, int(states.state.get("samples_consumed", step)))
    with fresh_folder(out, needed, [model], {"to": "torch_dist"}) as temporary:
        (temporary / name).mkdir()
        with TorchDistWriter(temporary / name, common) as writer:
            for whole in wholes(spec):
                place = stored_place(whole)
                writer.add(place.key, place.lead, place.counts, _fused(reader, whole, "weight", _dtype(reader, whole)))
            for key in _stateful(spec):
                writer.add_nothing(key)
            if states is not None:
                _add_states(writer, spec, states)
        sync_folder(temporary / name)
        write_durably(temporary / NEWEST, f"{word}\n".encode())


def _add_states(writer: TorchDistWriter, spec: ModelSpec, states: CheckpointReader) -> None:
    """Moments, and the fp32 masters (which fp32 weights are themselves) under both names that they have there."""
    for whole in wholes(spec):
        place = stored_place(whole)
        held = states.manifest.tensors
        for kind in (*MOMENTS, *(["master"] * ((whole.pieces[0].name, "master") in held))):
            key = state_key(STATES[kind][0], place.key)
            writer.add(key, place.lead, place.counts, _fused(states, whole, kind, "F32"))  # unnamed: gone at once
    masters = {state_key("fp32_param", stored_place(whole).key): stored_place(whole).key for whole in wholes(spec)}
    for master, weight in masters.items():
        if not writer.has(master):
            writer.add_name(master, weight)
        writer.add_name(state_key("param", weight), master)


def export_checkpoint(checkpoint_folder: Path, out: Path) -> str:
    """:func:`export_torch_dist` of a checkpoint of full tuning, with its optimizer's state, proven by its digests.

    Returns:
        Why the optimizer's state was left out; nothing where it was not.
    Raises:
        ConfigError: it holds an adapter; says how to merge it first. And as :func:`export_torch_dist`.
    """
    checkpoint = CheckpointReader(checkpoint_folder, verify=True)
    if checkpoint.manifest.room != "model":
        raise ConfigError(
            f"{checkpoint.folder} holds an adapter, and megatron-core's checkpoints hold whole models",
            f"isotrain export {checkpoint.folder} --to merged MERGED && isotrain export MERGED --to torch_dist {out}",
        )
    left_out = _left_out(checkpoint, read_model(read_hf_config(checkpoint.folder / "model")))
    export_torch_dist(checkpoint.folder / "model", out, checkpoint.step, None if left_out else checkpoint)
    return left_out


def _left_out(checkpoint: CheckpointReader, spec: ModelSpec) -> str:
    """Why the optimizer's state of a checkpoint cannot go out; nothing where it can."""
    if spec.is_moe:
        return "megatron-core keeps that of experts in one optimizer with the rest, or apart, as its own EP size says"
    if any(kind == "projector" for _, kind in checkpoint.manifest.tensors):
        return "its moments are those of projected gradients (GaLore), which megatron-core has none of"
    every = [piece.name for whole in wholes(spec) for piece in whole.pieces]
    bare = [name for name in every if any((name, kind) not in checkpoint.manifest.tensors for kind in MOMENTS)]
    return f"{len(bare)} weights have none, first {bare[0]}, and megatron-core wants it of all" if bare else ""


def _dtype(reader: HfReader, whole: Whole) -> str:
    dtypes: Mapping[str, str] = {piece.name: reader.dtype(piece.name) for piece in whole.pieces}
    if len(set(dtypes.values())) > 1:
        raise ConfigError(
            f"{' and '.join(f'{name} ({dtype})' for name, dtype in dtypes.items())} are one tensor in megatron-core",
            "export the model in one precision first",
        )
    return next(iter(dtypes.values()))


def _fused(reader: TensorReader, whole: Whole, kind: str, dtype: str) -> torch.Tensor:
    result = torch.empty(whole.shape, dtype=TORCH_DTYPES[dtype])
    for piece in whole.pieces:
        result[piece.local.slices] = reader.read(piece.name, kind, piece.box)
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
