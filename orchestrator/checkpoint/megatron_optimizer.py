"""The state of megatron-core's Adam in a ``torch_dist`` checkpoint: where each tensor and number of it lies.

What is reshardable lies in whole tensors beside the weights, ``optimizer.state.exp_avg.WEIGHT``, whichever of its
optimizers wrote it: FP32Optimizer, Float16OptimizerWithFloat16Params, DistributedOptimizer with ``fully_reshardable``
(or ``fully_sharded_model_space``, which earlier versions cut into rows of flat pieces). Numbers (steps, learning rate)
lie in ``common.pt``. It is a pickle of much else, of which only plain values are looked at, and nothing is run.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from orchestrator.checkpoint.megatron_names import find_places, stored_place, wholes
from orchestrator.checkpoint.torch_dist import COMMON, Stored, TorchDistReader
from orchestrator.checkpoint.unpickling import BROKEN, ValuesUnpickler, reason
from orchestrator.errors import ConfigError, DataError
from parallel.shards import Box
from parallel.specs import ModelSpec

OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")  # keys of what is no weight
BUFFER = re.compile(r"(chained_\d+\.)?optimizer\.distributed\.")  # of them what its ranks hold, as it lies there
# Our kinds of state by megatron-core's names for them; masters are named in one of three ways.
STATES = {"exp_avg": ("exp_avg",), "exp_avg_sq": ("exp_avg_sq",), "master": ("fp32_param", "param", "master_param")}
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_DTYPES = ("F32", "BF16")
SCALARS = {"FloatStorage": "<f", "DoubleStorage": "<d", "LongStorage": "<q", "IntStorage": "<i"}
HYPERPARAMETERS = ("lr", "eps", "weight_decay")
# What megatron-core finds a group of parameters by; the second one has the norms and biases, which do not decay.
GROUPS = (
    {"wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False},
    {"wd_mult": 0.0, "lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False},
)
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
    "singleton_local_shards": False,
}


class StateReader:
    """One kind of optimizer state of a folder, as a reader of tensors that have the weights' keys and shapes."""

    def __init__(self, reader: TorchDistReader, kind: str) -> None:
        """``kind``: exp_avg, exp_avg_sq or master."""
        self.folder, self._reader = reader.folder, reader
        names = "|".join(STATES[kind])
        pattern = re.compile(rf"(?:chained_\d+\.)?optimizer\.state\.(?:{names})\.(.+)")
        self._keys = {found[1]: key for key in reader.keys if (found := pattern.fullmatch(key))}

    @property
    def keys(self) -> Collection[str]:
        """The keys of the weights that have such a state."""
        return self._keys.keys()

    def stored(self, key: str) -> Stored:
        """What is said of the state of a weight. Raises as :meth:`TorchDistReader.stored`."""
        stored = self._reader.stored(self._keys[key])
        shape = self._reader.stored(key).shape if key in self._reader.keys else stored.shape
        return Stored(stored.dtype, shape, ()) if _cells(stored.shape, shape) else stored

    def read(self, key: str, box: Box) -> torch.Tensor:
        """Read one box in fp32. Raises as :meth:`TorchDistReader.read`."""
        flat, shape = self._reader.stored(self._keys[key]).shape, self.stored(key).shape
        if flat == shape:
            return self._reader.read(self._keys[key], box).float()
        result = torch.empty(box.size)
        for cell in _cells(flat, shape):
            if (common := cell.intersect(box)) is not None:
                at = tuple(a // b for a, b in zip(cell.offset, cell.size, strict=True))
                row = Box((*at, 0), (*(1 for _ in at), cell.elements))
                data = self._reader.read(self._keys[key], row).reshape(cell.size)
                inside, target = (common.shift(tuple(-n for n in each.offset)) for each in (cell, box))
                result[target.slices] = data[inside.slices].float()
        return result


def _cells(flat: tuple[int, ...], shape: tuple[int, ...]) -> list[Box]:
    """The boxes of a tensor that is stored as a grid of flat pieces; none where it is stored as it is.

    As megatron-core 0.16's ``sharded_tensor_to_torch_sharded_tensor`` says of what is flattened: ``[X, Y]`` cut into
    local tensors ``[x, y]`` is stored as ``[X // x, Y // y, x * y]``.

    Example:
        >>> [cell.offset for cell in _cells((2, 1, 6), (4, 3))]
        [(0, 0), (2, 0)]
    """
    if len(flat) != len(shape) + 1 or prod(flat) != prod(shape):
        return []
    size = tuple(whole // cells for whole, cells in zip(shape, flat[:-1], strict=True))
    if prod(size) != flat[-1]:
        return []
    boxes = [Box((), ())]
    for cells, width in zip(flat[:-1], size, strict=True):
        boxes = [Box((*box.offset, i * width), (*box.size, width)) for box in boxes for i in range(cells)]
    return boxes


def open_states(reader: TorchDistReader, spec: ModelSpec, kinds: Collection[str]) -> dict[str, StateReader]:
    """Readers of these kinds of state, each of which all weights have.

    Raises:
        ConfigError: the optimizer was not saved, not in whole tensors, is no Adam, or trained only a part.
    """
    if not any(OPTIMIZER.match(key) for key in (*reader.keys, *reader.objects)):
        raise ConfigError(f"{reader.folder} holds no optimizer state, only weights", "leave --moments away")
    states = {kind: StateReader(reader, kind) for kind in kinds}
    buffers = sorted(filter(BUFFER.match, (*reader.keys, *reader.objects)))
    if buffers and not states["exp_avg"].keys:
        raise ConfigError(
            f"{reader.folder} holds the optimizer's state as flat buffers of data-parallel ranks ({len(buffers)} of "
            f"them, first {buffers[0]}), which only the topology that saved them can read",
            "load it in Megatron-LM once and save it with --dist-ckpt-optim-fully-reshardable, or leave --moments away",
        )
    for kind, state in states.items():
        for whole in wholes(spec):
            if not find_places(whole, state.keys):
                raise ConfigError(
                    f"{reader.folder} holds {kind} of {len(state.keys)} tensors, none of {stored_place(whole).key}: "
                    "only Adam's state of a model that was trained as a whole goes on here",
                    "leave --moments away",
                )
        for key in state.keys:
            if (dtype := state.stored(key).dtype) not in STATE_DTYPES:
                raise ConfigError(
                    f"{reader.folder} holds {kind} of {key} as {dtype}; read are {' and '.join(STATE_DTYPES)}",
                    "save it without --use-precision-aware-optimizer, or leave --moments away",
                )
    return states


@dataclass(frozen=True)
class Numbers:
    """What ``common.pt`` says: training iterations completed, Adam's count of steps, and its hyperparameters."""

    iteration: int
    steps: int
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


def read_numbers(folder: Path) -> Numbers:
    """Read a checkpoint's ``common.pt``; nothing in it is run, and no class in it is made.

    Raises:
        DataError: it is missing, damaged, or does not say how many steps Adam has taken.
    """
    path = folder / COMMON
    try:
        with zipfile.ZipFile(path) as archive:
            listed = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
            if listed.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed, which torch's are not")
            with archive.open(listed) as file:
                common = ValuesUnpickler(file).load()
            tables = list(_tables(common["optimizer"]))
            steps = {_number(table[key], archive, listed.filename) for table in tables
                     for key in ("step", "common_step") if table.get(key) is not None}  # fmt: skip
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: the count of the optimizer's steps is in it") from error
    except (*BROKEN, zipfile.BadZipFile, StopIteration) as error:
        raise DataError(f"{path} does not say how many steps the optimizer has taken: {reason(error)}") from error
    if len(steps) != 1:
        raise DataError(f"{path} says that the optimizer has taken {sorted(steps)} steps, where one count is needed")
    taken = int(steps.pop())
    iteration = common.get("iteration")
    groups = [table for table in tables if _is_number(table.get("lr")) and "betas" in table]
    return Numbers(iteration if type(iteration) is int and iteration >= 0 else taken, taken, _hyperparameters(groups))


def _tables(value: Any, depth: int = 0) -> Iterator[dict[Any, Any]]:
    """All dicts in dicts and lists."""
    if depth > 8:  # a pickle may hold itself
        return
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tables(each, depth + 1)


def _number(value: Any, archive: zipfile.ZipFile, list_file: str) -> float:
    """A number, or the one in a tensor."""
    if _is_number(value):
        return float(value)
    (_, storage, name, *_), *_ = value.state  # of _rebuild_tensor_v2: where its storage lies
    form = SCALARS[storage.__name__]
    with archive.open(list_file.replace("data.pkl", f"data/{name}")) as file:
        return float(struct.unpack(form, file.read(struct.calcsize(form)))[0])


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _hyperparameters(groups: list[dict[Any, Any]]) -> dict[str, Any]:
    """What all groups have in common; of decay and learning rate, which have multipliers, the largest."""
    found: dict[str, Any] = {}
    for name in HYPERPARAMETERS:
        values = [group[name] for group in groups if _is_number(group.get(name))]
        if values:
            found[name] = max(values)
    betas = [group["betas"] for group in groups]
    plain = [list(pair) for pair in betas if isinstance(pair, (tuple, list)) and all(map(_is_number, pair))]
    return found | ({"betas": max(plain)} if plain else {})


def common_values(numbers: Numbers, samples: int) -> dict[str, Any]:
    """A new checkpoint's ``common.pt``, in which each of megatron-core's three optimizers finds what it looks for.

    Args:
        samples: sequences trained on so far, by which megatron-core's scheduler of the learning rate counts.
    """
    usual: dict[str, Any] = {"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    adam = usual | dict(numbers.hyperparameters)
    per_step = max(1, samples // max(1, numbers.iteration))
    scheduler = {
        "max_lr": adam["lr"],
        "min_lr": adam.get("min_lr", 0.0),
        "lr_warmup_steps": adam.get("warmup_steps", 0) * per_step,
        "lr_decay_steps": adam.get("steps", numbers.iteration) * per_step,
        "lr_decay_style": adam.get("schedule", "constant"),
        "num_steps": samples,
    }
    rates = {"lr": adam["lr"], "max_lr": adam["lr"], "min_lr": 0.0, "default_config": True}
    groups = [
        {
            **group,
            **rates,
            "betas": tuple(adam["betas"]),
            "eps": adam["eps"],
            "weight_decay": adam["weight_decay"] * group["wd_mult"],
            "bias_correction": True,
            "step": numbers.steps,
        }
        for group in GROUPS
    ]
    inner = {"param_groups": groups, "state": {"common_step": numbers.steps}}
    return {
        "checkpoint_version": 3.0,
        "iteration": numbers.iteration,
        "content_metadata": CONTENT,
        "opt_param_scheduler": scheduler,
        "optimizer": {**inner, "optimizer": inner, "param_state_sharding_type": CONTENT["distrib_optim_sharding_type"]},
    }


def state_key(name: str, key: str) -> str:
    """Where the state of a weight is stored. ``name`` is megatron-core's.

    Example:
        >>> state_key("exp_avg", "decoder.final_layernorm.weight")
        'optimizer.state.exp_avg.decoder.final_layernorm.weight'
    """
    return f"optimizer.state.{name}.{key}"
