"""Pickled weights into safetensors. A pickle is opened only by torch's weights-only unpickler, which runs no code.

Who converts says that he wants the pickle opened; nothing else in isotrain opens one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.export import row_boxes
from orchestrator.checkpoint.hf_reader import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    indexed_files,
    read_json,
)
from orchestrator.checkpoint.out_folder import copy_companions, fresh_folder, write_json
from orchestrator.checkpoint.tensor_file import DTYPE_CODES, FileWriter, TensorEntry, lay_out
from orchestrator.checkpoint.unpickling import BROKEN, load_tensors, reason
from orchestrator.errors import ConfigError, DataError

PICKLED_WEIGHTS = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
PICKLED_ADAPTER = "adapter_model.bin"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Pickled:
    """The pickled weights of a folder: its ``files`` in order, and the names of the safetensors files they become.

    ``index`` places tensors in files, where there is one.
    """

    files: tuple[Path, ...]
    names: tuple[str, ...]
    index: Path | None = None


def find_pickled(folder: Path) -> Pickled:
    """The pickled weights of a Hugging Face model folder or of a PEFT adapter folder; none is opened.

    Raises:
        ConfigError: there are none, or there are safetensors beside them, which need no conversion.
        DataError: an index is broken, or names a file outside of the folder or one that is missing.
    """
    for name in (WEIGHTS, INDEX, ADAPTER_WEIGHTS):
        if (folder / name).exists():
            raise ConfigError(f"{folder} has a {name}: there is nothing to convert", "use the folder as it is")
    if (folder / PICKLED_ADAPTER).exists() and (folder / ADAPTER_CONFIG).exists():
        return Pickled((folder / PICKLED_ADAPTER,), (ADAPTER_WEIGHTS,))
    if (folder / PICKLED_WEIGHTS).exists():
        return Pickled((folder / PICKLED_WEIGHTS,), (WEIGHTS,))
    index = folder / PICKLED_INDEX
    if index.exists():
        files = tuple(indexed_files(index, ".bin"))
        names = tuple(f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1))
        return Pickled(files, names, index)
    raise ConfigError(
        f"{folder} has no {PICKLED_WEIGHTS}, no {PICKLED_INDEX} and no {PICKLED_ADAPTER} with an {ADAPTER_CONFIG}",
        "name a model's or an adapter's folder as transformers or PEFT wrote it",
    )


def convert_pickles(folder: Path, out: Path) -> None:
    """Write a folder with the same weights in safetensors, bit for bit, and all that is no weights copied.

    Goes file by file and tensor by tensor: the pickles are mapped, never read whole. A ``lm_head.weight`` that shares
    its memory with the embedding is left out where ``config.json`` ties them, as transformers does.

    Raises:
        ConfigError: as :func:`find_pickled`, or ``out`` holds something that is not ours.
        DataError: a file holds anything but named tensors (none of it is run), or is not what the index says.
        ResourceError: no space is left.
    """
    pickled = find_pickled(folder)
    found: dict[str, str] = {}
    placed: dict[str, str] = {}
    total = 0
    needed = sum(file.stat().st_size for file in pickled.files)
    with fresh_folder(out, needed, [folder], {"to": "safetensors"}) as temporary:
        for file, name in zip(pickled.files, pickled.names, strict=True):
            tensors = load_pickle(file)
            for twice in sorted(found.keys() & tensors.keys()):
                raise DataError(f"{twice} is both in {folder / found[twice]} and in {file}")
            found |= dict.fromkeys(tensors, file.name)
            kept = _without_tied_head(tensors, folder)
            placed |= dict.fromkeys(kept, name)
            total += _write(temporary / name, kept)
        if pickled.index is not None:
            _check_index(pickled.index, found)
            write_json(temporary / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
        copy_companions(folder, temporary)


def load_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The named tensors of a file that ``torch.save`` wrote: mapped, and through the weights-only unpickler.

    Raises:
        DataError: it holds something else; nothing of it is run.
    """
    try:
        loaded = load_tensors(file)
    except BROKEN as error:
        problem = f"{file} is no file of tensors that can be opened without running code"
        raise DataError(f"{problem}: {reason(error)}") from error
    if not isinstance(loaded, Mapping):
        raise DataError(f"{file} holds a {type(loaded).__name__}, not a table of named tensors")
    for name, value in loaded.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise DataError(f"{file} holds {name!r}, which is no plain tensor but a {_kind(value)}")
    return dict(loaded)


def _is_plain(value: Any) -> bool:
    return (
        type(value) in (torch.Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in DTYPE_CODES
    )


def _kind(value: Any) -> str:
    return f"{value.layout} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def _without_tied_head(tensors: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    head, config = tensors.get(HEAD), folder / "config.json"
    if head is None or not config.exists() or not read_json(config).get("tie_word_embeddings"):
        return tensors
    if any(other.data_ptr() == head.data_ptr() for name, other in tensors.items() if name != HEAD):
        return {name: tensor for name, tensor in tensors.items() if name != HEAD}
    return tensors


def _write(path: Path, tensors: Mapping[str, torch.Tensor]) -> int:
    """Write tensors block of rows by block of rows, those that share memory too; returns the bytes of the data."""
    entries = lay_out(TensorEntry(key, DTYPE_CODES[data.dtype], tuple(data.shape)) for key, data in tensors.items())
    writer = FileWriter(path, entries)
    try:
        for entry in entries:
            for rows in row_boxes(entry):
                writer.write(tensors[entry.key].detach()[rows.slices].contiguous())
        writer.close()
    finally:
        writer.abort()
    return sum(entry.bytes for entry in entries)


def _check_index(index: Path, found: Mapping[str, str]) -> None:
    for name, file in read_json(index)["weight_map"].items():
        if found.get(name) != file:
            raise DataError(f"{index} places {name} in {file}, which does not hold it")
