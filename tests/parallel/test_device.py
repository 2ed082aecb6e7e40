"""The CPU's stand-in for CUDA, each thing that it stands in for by name."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from parallel import device

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
    assert len(device.STAND_INS) == 8
