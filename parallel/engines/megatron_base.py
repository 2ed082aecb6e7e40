"""One frozen base in memory for several engines: each has its own adapters around the same tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from parallel.lora import LoraLinear, LoraPart
from parallel.quantised import QuantisedLinear

_Key = tuple[int, str]  # number of the chunk, path of the tensor as if nothing was adapted


class SharedBase:
    """The frozen tensors of one base on one rank: of the same model, files, precision, topology and quantisation.

    They are told apart by where they are in the unadapted model, so that engines may adapt different modules. What one
    engine trains (``modules_to_save``) it has for itself, and is here only from an engine that leaves it frozen.
    """

    def __init__(self) -> None:
        self._tensors: dict[_Key, torch.Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self._tensors)

    @property
    def bytes(self) -> int:
        """What it holds."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def adopted_by(self, chunks: Sequence[torch.nn.Module]) -> frozenset[int]:
        """Let new chunks have these tensors as their own frozen ones, before any weight of them is written.

        Returns:
            ``id`` of the parameters that have their values now.
        """
        found = set()
        for key, parameter in _frozen(chunks):
            if key in self._tensors:
                parameter.data = self._tensors[key]
                found.add(id(parameter))
        for (number, path), linear in _quantised(chunks):
            held = {name: self._tensors.get((number, f"{path}.{name}")) for name in QuantisedLinear.HELD}
            for name, tensor in held.items():
                if tensor is not None:
                    linear.register_buffer(name, tensor, persistent=False)
        return frozenset(found)

    def add(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Keep the frozen tensors of filled chunks, on their device, where it has none yet."""
        for key, parameter in _frozen(chunks):
            self._tensors.setdefault(key, parameter.data)
        for (number, path), linear in _quantised(chunks):
            for name, tensor in linear.named_buffers(recurse=False):
                self._tensors.setdefault((number, f"{path}.{name}"), tensor)


def _frozen(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[_Key, torch.nn.Parameter]]:
    for key, module in _modules(chunks):
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                yield (key[0], f"{key[1]}.{name}"), parameter


def _quantised(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[_Key, QuantisedLinear]]:
    return ((key, module) for key, module in _modules(chunks) if isinstance(module, QuantisedLinear))


def _modules(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[_Key, torch.nn.Module]]:
    """All modules but adapters' own, each where it would be without adapters."""

    def walk(module: torch.nn.Module, path: str) -> Iterator[tuple[str, torch.nn.Module]]:
        yield path, module
        for name, child in module.named_children():
            if not isinstance(child, LoraPart):
                is_wrapped = isinstance(module, LoraLinear) and name == "base"
                yield from walk(child, path if is_wrapped else f"{path}.{name}")

    for number, chunk in enumerate(chunks):
        yield from (((number, path), module) for path, module in walk(chunk, ""))
