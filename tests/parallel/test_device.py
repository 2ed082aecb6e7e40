"""The CPU's stand-in for CUDA, each thing that it stands in for by name."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist

from parallel import device
from tests.helpers.pool import Pool

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA nothing is stood in for")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module of megatron-core as it looks after the stand-in: its global ``torch`` is ours."""
    module = types.ModuleType("megatron.core.pretended")
    module.torch = torch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.cuda)
    assert module.__name__ in device.stand_in_for_cuda()
    return module


@pytest.mark.parametrize("name", device.FACTORIES)
def test_factories_build_on_the_cpu(seen: types.ModuleType, name: str) -> None:
    like = name.endswith("_like")
    arguments = {"full": ((2,), 1.0), "arange": (2,), "tensor": ([1.0, 2.0],)}.get(name, ((2,),))
    made = getattr(seen.torch, name)(*((torch.ones(2),) if like else arguments), device="cuda")
    assert made.device.type == "cpu"
    assert made.shape == (2,)


def test_factories_pin_no_memory(seen: types.ModuleType) -> None:
    with pytest.raises(RuntimeError, match="pin"):
        torch.tensor([1.0], pin_memory=True)
    assert not seen.torch.tensor([1.0], pin_memory=True).is_pinned()


def test_the_current_device_is_the_cpu(seen: types.ModuleType) -> None:
    assert torch.zeros(1, device=seen.torch.cuda.current_device()).device.type == "cpu"


def test_streams_and_events_do_nothing(seen: types.ModuleType) -> None:
    cuda = seen.torch.cuda
    with cuda.stream(cuda.Stream()):
        cuda.current_stream().wait_stream(cuda.default_stream())
        cuda.Event().record()
    cuda.synchronize()
    cuda.empty_cache()
    cuda.nvtx.range_push("x")
    assert not torch.cuda.is_initialized()


def test_the_cuda_generator_has_no_state_and_the_cpu_one_is_left_alone(seen: types.ModuleType) -> None:
    before = torch.get_rng_state()
    seen.torch.cuda.set_rng_state(seen.torch.cuda.get_rng_state())
    seen.torch.cuda.manual_seed(1)
    assert torch.equal(before, torch.get_rng_state())


def test_tensor_cuda_is_the_tensor_itself(seen: types.ModuleType) -> None:
    value = torch.ones(2)
    assert value.cuda() is value


def gather_by_the_definition(lengths: list[int]) -> list[bool]:
    """On each rank: gather tensors of these lengths, and compare with every rank's tensor made here."""
    rank = dist.get_rank()
    made = [torch.arange(length * 3.0).view(length, 3) + 100 * owner for owner, length in enumerate(lengths)]
    found = [torch.empty_like(each) for each in made]
    device.gather_unequal(found, made[rank].t().contiguous().t())  # not contiguous
    flat = [torch.empty(length, dtype=torch.int64) for length in lengths]
    device.gather_unequal(flat, torch.full((lengths[rank],), rank))
    return [
        *(torch.equal(a, b) for a, b in zip(found, made, strict=True)),
        *(torch.equal(each, torch.full_like(each, owner)) for owner, each in enumerate(flat)),
    ]


@pytest.mark.parametrize("lengths", [[3, 1, 0], [2, 2, 2], [0, 0, 5]])
def test_a_gather_of_unequal_lengths_is_every_ranks_tensor(pool: Pool, lengths: list[int]) -> None:
    for answers in pool.run(3, gather_by_the_definition, lengths):
        assert all(answers)


def test_megatron_core_gathers_by_the_stand_in(seen: types.ModuleType) -> None:
    assert seen.torch.distributed.all_gather is device.gather_unequal
    assert seen.torch.distributed.all_reduce is dist.all_reduce
    assert dist.all_gather is not device.gather_unequal


def test_split_sizes_are_arrays_and_the_rest_is_as_it_was(seen: types.ModuleType) -> None:
    sizes = torch.tensor([2, 0, 1])
    assert device.to_cpu(sizes, as_numpy=True).tolist() == [2, 0, 1]
    assert isinstance(device.to_cpu(sizes, as_numpy=True, record_stream=True), np.ndarray)
    assert device.to_cpu(sizes) is sizes
    assert device.to_cpu(None, as_numpy=True) is None and device.to_cpu(7) == 7
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    device.stand_in_for_cuda()
    assert moe_utils.maybe_move_tensor_to_cpu is token_dispatcher.maybe_move_tensor_to_cpu is device.to_cpu


def test_type_names_are_those_of_cuda_only_while_asked() -> None:
    with device.cuda_type_names():
        assert torch.ones(1).type() == "torch.cuda.FloatTensor"
        assert torch.ones(1).type(torch.int32).dtype == torch.int32
    assert torch.ones(1).type() == "torch.FloatTensor"


def test_everything_else_is_torch_itself(seen: types.ModuleType) -> None:
    assert seen.torch.nn is torch.nn
    assert seen.torch.Tensor is torch.Tensor
    assert isinstance(torch.ones(1), seen.torch.Tensor)


def test_torch_itself_is_untouched(seen: types.ModuleType) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|cuda"):
        torch.zeros(1, device="cuda")


def test_every_stand_in_is_listed() -> None:
    assert len(device.STAND_INS) == 10
