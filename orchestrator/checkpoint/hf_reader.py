"""Reading tensors of Hugging Face model folders and PEFT adapter folders, box by box and without those libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.tensor_file import TensorFiles
from orchestrator.errors import ConfigError, DataError
from parallel.shards import Box

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


class WeightReader:
    """A ``TensorReader`` over safetensors files that hold weights only, under the names stored there."""

    def __init__(self, paths: list[Path]) -> None:
        self._files = TensorFiles(paths)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, file by file in file order."""
        return self._files.keys

    def shape(self, name: str, kind: str = "weight") -> tuple[int, ...]:
        """The whole shape. Raises KeyError when there is no such tensor (or ``kind`` is no weight)."""
        return self._files.entry(_weight(name, kind)).shape

    def dtype(self, name: str) -> str:
        """The stored type as a safetensors code ("F32", "BF16"). Raises KeyError when there is no such tensor."""
        return self._files.entry(name).dtype

    def read(self, name: str, kind: str, box: Box) -> torch.Tensor:
        """Read one box: a new CPU tensor of shape ``box.size`` in the stored type.

        Raises:
            KeyError: there is no such tensor (or ``kind`` is no weight).
            ValueError: the box does not lie in it.
        """
        return self._files.read(_weight(name, kind), box)


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
            held = {name: self._files.path(name).name for name in self.names}
            for name, file in read_json(index)["weight_map"].items():
                if held.get(name) != file:
                    raise DataError(f"{index} places {name} in {file}, which does not hold it")


class AdapterReader(WeightReader):
    """Weights of a PEFT adapter folder under the names stored there; ``config`` is its adapter_config.json."""

    def __init__(self, folder: Path) -> None:
        """Read header and configuration.

        Raises:
            ConfigError: the folder is no adapter, or holds only pickled weights.
            DataError: a file is truncated or broken.
        """
        if not (folder / ADAPTER_WEIGHTS).exists():
            raise ConfigError(f"{folder} has no {ADAPTER_WEIGHTS}{_pickles(folder)}", _convert_hint("peft", folder))
        if not (folder / ADAPTER_CONFIG).exists():
            raise ConfigError(f"{folder} has no {ADAPTER_CONFIG}", "name a folder that PEFT's save_pretrained wrote")
        super().__init__([folder / ADAPTER_WEIGHTS])
        self.config: dict[str, Any] = read_json(folder / ADAPTER_CONFIG)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in the order of their names.

    Raises:
        ConfigError: there are none (pickled ``.bin`` files are never read).
        DataError: the index is broken, names a file outside of the folder or one that is missing.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.exists():
        raise ConfigError(f"{folder} has no {WEIGHTS} and no {INDEX}{_pickles(folder)}", _convert_hint("hf", folder))
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise DataError(f"{index} has no weight_map of tensor names to file names")
    files = sorted(set(names.values()))
    for file in files:
        if Path(file).name != file or file in (".", "..") or "\\" in file or not file.endswith(".safetensors"):
            raise DataError(f"{index} names {file!r}: only safetensors files beside it are read")
        if not (folder / file).exists():
            present = sum((folder / other).exists() for other in files)
            raise DataError(f"{folder / file} is missing: {present} of {len(files)} files named by {INDEX} are there")
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


def _pickles(folder: Path) -> str:
    found = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    return f"; it has {', '.join(found[:3])}, but pickled weights are never opened" if found else ""


def _convert_hint(kind: str, folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder: check the path"
    if kind == "peft":
        return "load it once in PEFT and write it again with save_pretrained(FOLDER), which writes safetensors"
    return (
        'python -c "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])'
        f'.save_pretrained(sys.argv[2])" {folder} NEW_FOLDER'
    )
