"""Reading tensors of Hugging Face model folders and PEFT adapter folders, box by box and without those libraries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.experts import (
    LogicalHalf,
    common_name,
    is_block_diagonal,
    logical_config,
    logical_halves,
    weight_places,
)
from orchestrator.checkpoint.tensor_file import TensorFiles
from orchestrator.errors import ConfigError, DataError
from parallel.shards import Box

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


class WeightReader:
    """A ``TensorReader`` over safetensors files that hold weights only, under the names stored there.

    Where experts are stored joined (``experts.gate_up_proj``), each has its logical names instead
    (``experts.3.up_proj.weight``), which a tensor of Mixtral is found by too.
    """

    def __init__(self, paths: list[Path]) -> None:
        self._files = TensorFiles(paths)
        self._places: dict[str, tuple[str, Box]] = {}
        self._names: list[str] = []
        for key in self._files.keys:
            places = {name: (key, box) for name, box in weight_places(key, self._files.entry(key).shape)}
            self._places |= places
            self._names += places or [key]
        self._known = frozenset(self._names)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, file by file in file order."""
        return tuple(self._names)

    def shape(self, name: str, kind: str = "weight") -> tuple[int, ...]:
        """The whole shape. Raises KeyError when there is no such tensor (or ``kind`` is no weight)."""
        if (name := self._held(_weight(name, kind))) in self._places:
            return self._places[name][1].size[1:]
        return self._files.entry(name).shape

    def dtype(self, name: str) -> str:
        """The stored type as a safetensors code ("F32", "BF16"). Raises KeyError when there is no such tensor."""
        name = self._held(name)
        return self._files.entry(self._places[name][0] if name in self._places else name).dtype

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        """Read one box: a new CPU tensor of shape ``box.size`` in the stored type.

        Raises:
            KeyError: there is no such tensor (or ``kind`` is no weight).
            ValueError: the box does not lie in it.
        """
        if (name := self._held(_weight(name, kind))) not in self._places:
            return self._files.read(name, box)
        key, place = self._places[name]
        if box.intersect(Box.whole(place.size[1:])) != box:
            raise ValueError(f"{name} has shape {place.size[1:]}: {box} does not lie in it")
        inside = Box((0, *box.offset), (1, *box.size)).shift(place.offset)
        return self._files.read(key, inside).squeeze(0)

    def _held(self, name: str) -> str:
        """The name under which a tensor is held here: joined ones have lost their family's."""
        return name if name in self._known else common_name(name)


class HfReader(WeightReader):
    """Weights of a Hugging Face model folder: ``model.safetensors``, or an index and its shards.

    Names are those of the files. A tied ``lm_head.weight`` is not in them: asking for it is a KeyError.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers of all shards.

        Raises:
            ConfigError: the folder has no safetensors weights.
            DataError: a shard is missing, truncated or broken, or lacks a tensor that the index places there.
        """
        super().__init__(weight_files(folder))
        index = folder / INDEX
        if not (folder / WEIGHTS).exists():
            held = {name: self._files.path(name).name for name in self._files.keys}
            for name, file in read_json(index)["weight_map"].items():
                if held.get(name) != file:
                    raise DataError(f"{index} places {name} in {file}, which does not hold it")

    def check(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Find out that the weights are those of the model in the folder's config.json, before any is read.

        Raises:
            DataError: one is not there, or has another shape.
        """
        for name, shape in shapes.items():
            try:
                found = self.shape(name)
            except KeyError as error:
                raise DataError(f"{folder} has no tensor {name}, which its config.json asks for") from error
            if found != shape:
                raise DataError(f"{folder} has {name} of shape {list(found)}, its config.json asks for {list(shape)}")


class AdapterReader(WeightReader):
    """Weights of a PEFT adapter folder under the names stored there; ``config`` is its adapter_config.json.

    Where PEFT has joined experts, names and ``config`` are those of an adapter per logical expert and part.
    """

    def __init__(self, folder: Path) -> None:
        """Read header and configuration.

        Raises:
            ConfigError: the folder is no adapter, holds only pickled weights, or gate and up of its experts share one
                dense adapter.
            DataError: a file is truncated or broken.
        """
        weights, config = adapter_files(folder)
        super().__init__([weights])
        self.config: dict[str, Any] = read_json(config)
        self._halves: dict[str, LogicalHalf] = {}
        self._last: dict[str, torch.Tensor] = {}
        if self.config.get("target_parameters"):
            self._split(folder)
            self._known = frozenset(self._names)

    def shape(self, name: str, kind: str = "weight") -> tuple[int, ...]:
        """The whole shape. Raises KeyError when there is no such tensor (or ``kind`` is no weight)."""
        name = self._held(_weight(name, kind))
        half = self._halves.get(name)
        return super().shape(name) if half is None else half.shape

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        """Read one box; raises as :meth:`WeightReader.read`."""
        name = self._held(_weight(name, kind))
        half = self._halves.get(name)
        if half is None:
            return super().read(name, kind, box)
        if box.intersect(Box.whole(half.shape)) != box:
            raise ValueError(f"{name} has shape {half.shape}: {box} does not lie in it")
        return half.cut(self._joined(half.key))[box.slices].clone(memory_format=torch.contiguous_format)

    def _joined(self, key: str) -> torch.Tensor:
        """A whole joined tensor. The last ones stay, for a layer's experts are read one after the other."""
        if key not in self._last:
            self._last = dict(list(self._last.items())[-3:])  # A and B of gate_up and of down are four
            self._last[key] = self._files.read(key, Box.whole(self._files.entry(key).shape))
        return self._last[key]

    def _split(self, folder: Path) -> None:
        """Give every logical expert and part its names, if they have adapters of their own."""
        shapes = {key: self._files.entry(key).shape for key in self._files.keys}
        self._halves = dict(logical_halves(shapes, self.config))
        joined = {half.key for half in self._halves.values()}
        self._names = [key for key in self._names if key not in joined] + list(self._halves)
        for name, half in self._halves.items():
            first = name.endswith(".0.gate_proj.lora_B.weight")
            if first and not is_block_diagonal(self._joined(half.key), 2 * half.shape[1]):
                raise ConfigError(
                    f"{folder} has one dense adapter over gate and up of its experts ({half.key}); here each has one",
                    "merge the adapter into the base with PEFT (merge_and_unload), and start from that: "
                    "model.path=MERGED",
                )
        self.config = logical_config(self.config)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names.

    Raises:
        ConfigError: there are none (pickled ``.bin`` files are not opened here).
        DataError: as :func:`indexed_files`.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.exists():
        raise ConfigError(f"{folder} has no {WEIGHTS} and no {INDEX}{_pickles(folder)}", _convert_hint(folder))
    return indexed_files(index, ".safetensors")


def adapter_files(folder: Path) -> tuple[Path, Path]:
    """The weights and the configuration of a PEFT adapter folder.

    Raises:
        ConfigError: one of them is not there (pickled ``.bin`` files are not opened here).
    """
    if not (folder / ADAPTER_WEIGHTS).exists():
        raise ConfigError(f"{folder} has no {ADAPTER_WEIGHTS}{_pickles(folder)}", _convert_hint(folder))
    if not (folder / ADAPTER_CONFIG).exists():
        raise ConfigError(f"{folder} has no {ADAPTER_CONFIG}", "name a folder that PEFT's save_pretrained wrote")
    return folder / ADAPTER_WEIGHTS, folder / ADAPTER_CONFIG


def indexed_files(index: Path, suffix: str) -> list[Path]:
    """The files that an index places tensors in, in the order of their names.

    Raises:
        DataError: the index is broken, names a file that does not lie beside it with this suffix, or one that is
            missing.
    """
    folder = index.parent
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise DataError(f"{index} has no weight_map of tensor names to file names")
    files = sorted(set(names.values()))
    for file in files:
        if Path(file).name != file or file in (".", "..") or "\\" in file or not file.endswith(suffix):
            raise DataError(f"{index} names {file!r}: only {suffix} files beside it are read")
        if not (folder / file).exists():
            present = sum((folder / other).exists() for other in files)
            raise DataError(
                f"{folder / file} is missing: {present} of {len(files)} files named by {index.name} are there"
            )
    return [folder / file for file in files]


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        DataError: there is no such file, or it holds no JSON object.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object")
    return value


def _weight(name: str, kind: str) -> str:
    if kind != "weight":
        raise KeyError(f"{name}.{kind}")
    return name


def _pickled(folder: Path) -> list[str]:
    return sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))


def _pickles(folder: Path) -> str:
    found = _pickled(folder)
    return f"; it has {', '.join(found[:3])}, but pickled weights are not opened" if found else ""


def _convert_hint(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder: check the path"
    if (folder / ".metadata").exists():
        return f"isotrain convert {folder} NEW_FOLDER --model CONFIG_FOLDER  (it is a torch_dist checkpoint)"
    if _pickled(folder):
        return f"isotrain convert {folder} NEW_FOLDER --allow-pickle"
    return "name a folder with safetensors weights, as save_pretrained writes it"
