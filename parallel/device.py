"""The one place where a CPU stands in for CUDA.

megatron-core names CUDA in its schedules, buffers and optimizers. Without an accelerator, :func:`stand_in_for_cuda`
gives those modules (and only those; torch itself is left alone, but for ``Tensor.cuda``) a view of ``torch`` whose
factories build on the CPU and whose streams and events do nothing. With an accelerator nothing here is used.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

# torch functions that megatron-core calls with device="cuda" or device=torch.cuda.current_device()
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like", "rand")
STAND_INS = (
    "torch.<factory>(device='cuda'): built on the CPU, for the factories in FACTORIES",
    "torch.<factory>(pin_memory=True): not pinned, for the same factories",
    "torch.cuda.current_device: the CPU device",
    "torch.cuda streams and events: objects that do nothing",
    "torch.cuda.synchronize, empty_cache, nvtx: nothing",
    "the CUDA generator: its state is empty and seeding it does nothing (the CPU's generator is always kept beside it)",
    "Tensor.cuda(): the tensor itself",
    "Tensor.type(): 'torch.cuda.*' names, only while an optimizer is built or steps",
    "torch.distributed.all_gather of tensors of unequal length, which NCCL does and gloo refuses: padded, then trimmed",
    "moe_utils.maybe_move_tensor_to_cpu(as_numpy=True): an array also of a tensor that is on the CPU already",
)
_CPU = torch.device("cpu")


class _Nothing:
    """A stream or an event: every method does nothing, and it can be entered as a context."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _Nothing]:
        return lambda *_, **__: self

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: Any) -> None: ...


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") is not None:
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return build


class _CpuCuda(ModuleType):
    """What megatron-core sees as ``torch.cuda``."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.current_device = lambda: _CPU
        self.device_count = lambda: 1
        self.Stream = self.Event = self.stream = self.device = _Nothing
        self.current_stream = self.default_stream = lambda *_: _Nothing()
        self.synchronize = self.empty_cache = lambda *_: None
        self.nvtx = _Nothing()
        self.get_rng_state = lambda *_, **__: torch.empty(0)
        self.set_rng_state = self.manual_seed = lambda *_, **__: None

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


def gather_unequal(tensors: list[torch.Tensor], tensor: torch.Tensor, group: Any = None) -> None:
    """``dist.all_gather`` into ``tensors``, which may differ in their first dimension; for gloo, which refuses that.

    The plain definition: ``tensors[r]`` becomes rank ``r``'s ``tensor``. Every rank knows all lengths, so each one is
    padded to the longest, gathered, and trimmed.
    """
    longest = max(each.shape[0] for each in tensors)
    if all(each.shape[0] == longest for each in tensors):
        dist.all_gather(tensors, tensor.contiguous(), group=group)
        return
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: tensor.shape[0]] = tensor
    whole = [torch.empty_like(padded) for _ in tensors]
    dist.all_gather(whole, padded, group=group)
    for target, source in zip(tensors, whole, strict=True):
        target.copy_(source[: target.shape[0]])


class _GlooDistributed(ModuleType):
    """What megatron-core sees as ``torch.distributed``."""

    def __init__(self) -> None:
        super().__init__("torch.distributed")
        self.all_gather = gather_unequal

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)


class _CpuTorch(ModuleType):
    """What megatron-core sees as ``torch``."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CpuCuda()
        self.distributed = _GlooDistributed()
        for name in FACTORIES:
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def device_type() -> str:
    """``cuda`` where there is one, ``cpu`` otherwise."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def current_device() -> torch.device:
    """The device that this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else _CPU


def backend(device: str) -> str:
    """The torch.distributed backend for a device.

    Example:
        >>> backend("cpu"), backend("cuda")
        ('gloo', 'nccl')
    """
    return "nccl" if device == "cuda" else "gloo"


def stand_in_for_cuda() -> list[str]:
    """Let the megatron-core modules loaded so far run on a CPU; a no-op where there is CUDA. Safe to call again.

    Returns:
        Names of the modules that were given the stand-in.
    """
    if torch.cuda.is_available():
        return []
    proxy = _CpuTorch()
    touched = []
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = proxy  # type: ignore[attr-defined]
            touched.append(name)
    random = sys.modules.get("megatron.core.tensor_parallel.random")
    if random is not None:  # activation recompute saves and restores CUDA's generator beside the CPU's
        random._get_cuda_rng_state = lambda *_, **__: torch.empty(0)  # type: ignore[attr-defined]
        random._set_cuda_rng_state = lambda *_, **__: None  # type: ignore[attr-defined]
    _stand_in_for_expert_tools()
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    return touched


def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """megatron-core's ``maybe_move_tensor_to_cpu`` for tensors that are there: what is no tensor stays what it is."""
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


def _stand_in_for_expert_tools() -> None:
    """The split sizes of all-to-alls must be numbers, also of tensors that need no move."""
    for name in ("moe_utils", "token_dispatcher"):
        user = sys.modules.get(f"megatron.core.transformer.moe.{name}")
        if user is not None:
            user.maybe_move_tensor_to_cpu = to_cpu  # type: ignore[attr-defined]


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """While open, ``Tensor.type()`` of a CPU tensor answers as if it were on CUDA (optimizers check the name)."""
    if torch.cuda.is_available():
        yield
        return
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def peak_memory_bytes(device: str) -> int:
    """The most that this process has held: on CUDA what torch's allocator handed out, else its resident memory.

    Example:
        >>> peak_memory_bytes("cpu") > 2**20
        True
    """
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
